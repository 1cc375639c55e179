"""Selective scan (Mamba1 prefill and training)."""

from .op import selective_scan_fn

# isort: split

from .reference import selective_scan_fn as _reference  # noqa: F401 - registers the backend
from .triton import selective_scan_fn as _triton  # noqa: F401 - registers the backend

__all__ = ["selective_scan_fn"]
