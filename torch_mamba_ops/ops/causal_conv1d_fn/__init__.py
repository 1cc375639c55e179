"""Causal depthwise convolution over dense batches."""

from .op import causal_conv1d_fn
from .reference import causal_conv1d_fn as _reference  # noqa: F401 - registers the backend
from .triton import causal_conv1d_fn as _triton  # noqa: F401 - registers the backend

__all__ = ["causal_conv1d_fn"]
