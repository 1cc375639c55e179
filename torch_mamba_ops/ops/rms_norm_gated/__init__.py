"""RMSNorm with a gate, the norm of Mamba2 mixers."""

from .op import rms_norm_gated
from .reference import rms_norm_gated as _reference  # noqa: F401 - registers the backend

__all__ = ["rms_norm_gated"]
