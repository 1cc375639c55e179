"""Mamba operations as PyTorch operators whose schema names the backend that runs them."""

from torch_mamba_ops import inductor as _inductor  # noqa: F401 - lowers operators once Inductor compiles
from torch_mamba_ops import settings
from torch_mamba_ops.dispatch import (
    BackendError,
    NoBackendError,
    backends,
    explain,
    register_backend,
    set_backend,
    use_backend,
)
from torch_mamba_ops.dispatch.backend import entry_points as _entry_points
from torch_mamba_ops.dispatch.selection import read_environment as _read_environment
from torch_mamba_ops.ops import *  # noqa: F403
from torch_mamba_ops.ops import __all__ as _operations
from torch_mamba_ops.startup import prepare, warmup
from torch_mamba_ops.tuning.preference import read as _read_tables
from torch_mamba_ops.version import VERSION

__version__ = VERSION

__all__ = [
    "BackendError",
    "NoBackendError",
    "backends",
    "explain",
    "prepare",
    "register_backend",
    "set_backend",
    "settings",
    "use_backend",
    "warmup",
    *_operations,
]

_entry_points()
_read_environment()
_read_tables()
