"""Configs of kernels: what was given, what the user's file says, what the shipped table says, else a rule of thumb."""

from .ladder import Config, configs_for, generation, key_of, use_config, version

__all__ = ["Config", "configs_for", "generation", "key_of", "use_config", "version"]
