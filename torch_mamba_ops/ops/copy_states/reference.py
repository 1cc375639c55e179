"""The state copy in torch: gather, then scatter."""

from __future__ import annotations

from torch import Tensor

from torch_mamba_ops.dispatch import register_backend
from torch_mamba_ops.ops.pool import safe_index, write_rows


@register_backend("copy_states", "reference", trace="inline")
def copy_states(
    src_pool: Tensor | None, dst_pool: Tensor, src_indices: Tensor, dst_indices: Tensor, *, pad_slot_id: int
) -> None:
    """See ``op.copy_states``."""
    source = dst_pool if src_pool is None else src_pool
    valid = (src_indices != pad_slot_id) & (dst_indices != pad_slot_id)
    values = source[safe_index(src_indices, valid, source.shape[0])]
    write_rows(dst_pool, (safe_index(dst_indices, valid, dst_pool.shape[0]),), values, valid)
