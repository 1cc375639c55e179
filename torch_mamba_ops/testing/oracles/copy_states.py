"""The state copy, one block after the other."""

from __future__ import annotations

from torch import Tensor


def copy_states(
    src_pool: Tensor, dst_pool: Tensor, src_indices: Tensor, dst_indices: Tensor, *, pad_slot_id: int = -1
) -> None:
    """See the public function."""
    before = src_pool.clone()
    for src, dst in zip(src_indices.tolist(), dst_indices.tolist(), strict=True):
        if pad_slot_id not in (src, dst):
            dst_pool[dst] = before[src]
