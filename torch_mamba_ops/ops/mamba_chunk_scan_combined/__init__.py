"""State space dual scan over dense batches (Mamba2 prefill and training)."""

from .op import mamba_chunk_scan_combined

# isort: split

from .reference import mamba_chunk_scan_combined as _reference  # noqa: F401 - registers the backend
from .triton import mamba_chunk_scan_combined as _triton  # noqa: F401 - registers the backend

__all__ = ["mamba_chunk_scan_combined"]
