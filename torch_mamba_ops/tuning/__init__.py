"""Configs of kernels: what was given, what the user's file says, what the shipped table says, else a rule of thumb."""

from .ladder import configs_for, generation, key_of, use_config, version

__all__ = ["configs_for", "generation", "key_of", "use_config", "version"]
