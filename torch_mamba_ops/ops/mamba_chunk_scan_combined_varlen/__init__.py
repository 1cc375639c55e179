"""State space dual scan over packed sequences and a pool of states (Mamba2 prefill)."""

from .op import mamba_chunk_scan_combined_varlen

# isort: split

from .reference import mamba_chunk_scan_combined_varlen as _reference  # noqa: F401 - registers the backend
from .triton import mamba_chunk_scan_combined_varlen as _triton  # noqa: F401 - registers the backend

__all__ = ["mamba_chunk_scan_combined_varlen"]
