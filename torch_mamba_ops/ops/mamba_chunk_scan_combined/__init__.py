"""State space dual scan over dense batches (Mamba2 prefill and training)."""

from .op import mamba_chunk_scan_combined
from .reference import mamba_chunk_scan_combined as _reference  # noqa: F401 - registers the backend

__all__ = ["mamba_chunk_scan_combined"]
