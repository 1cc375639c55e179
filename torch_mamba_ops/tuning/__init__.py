"""What was measured: configs of kernels and the fastest backends, from the user's tables over the shipped ones."""

from .files import key_of
from .ladder import Config, configs_for, use_config, version
from .preference import preferred

__all__ = ["Config", "configs_for", "key_of", "preferred", "use_config", "version"]
