"""One decode step of the causal convolution over a pool of windows."""

from .op import causal_conv1d_update
from .reference import causal_conv1d_update as _reference  # noqa: F401 - registers the backend
from .triton import causal_conv1d_update as _triton  # noqa: F401 - registers the backend

__all__ = ["causal_conv1d_update"]
