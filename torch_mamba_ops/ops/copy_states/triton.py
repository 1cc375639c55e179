"""The copy of state blocks on GPUs: which blocks the Triton kernel can take, and how it is started."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from torch_mamba_ops.dispatch import register_backend
from torch_mamba_ops.ops.copying import BLOCK_BYTES, joined, reasons_against_copies, tiles, units
from torch_mamba_ops.ops.launch import Launch, launch, reasons_against_triton


def _why_not(
    src_pool: Tensor | None, dst_pool: Tensor, src_indices: Tensor, dst_indices: Tensor, **options: Any
) -> list[str]:
    reasons = reasons_against_triton((dst_pool,))
    reasons += reasons_against_copies(dst_pool, dst_indices.shape[0], one_pool=src_pool is None)
    dims = joined(dst_pool.shape[1:], *(pool.stride()[1:] for pool in (dst_pool, src_pool) if pool is not None))
    if len(dims) > 3:
        reasons.append(f"it copies blocks of up to three dimensions that do not follow each other, not {len(dims)}")
    return reasons


@register_backend("copy_states", "triton", trace="inline", why_not=_why_not)
def copy_states(
    src_pool: Tensor | None, dst_pool: Tensor, src_indices: Tensor, dst_indices: Tensor, *, pad_slot_id: int
) -> None:
    """See ``op.copy_states``."""
    launch(_plan, dst_pool, src_pool, src_indices, dst_indices, pad_slot_id)


def _plan(
    dst_pool: Tensor, src_pool: Tensor | None, src_indices: Tensor, dst_indices: Tensor, pad_slot_id: int
) -> Launch:
    from torch_mamba_ops.ops.copy_states import kernels

    source = dst_pool if src_pool is None else src_pool
    dims = joined(dst_pool.shape[1:], dst_pool.stride()[1:], source.stride()[1:])
    size = math.prod(dst_pool.shape[1:])
    (_, *inner), (dst_0, dst_1, dst_2), (src_0, src_1, src_2) = zip(
        *([(1, 0, 0)] * (3 - len(dims)) + dims), strict=True
    )
    block = BLOCK_BYTES // dst_pool.element_size()
    unit = units(dst_pool.element_size(), dst_pool.stride(0), source.stride(0))
    one_pool = src_pool is None
    return Launch(
        kernels.copy_states,
        (tiles(size, block), src_indices.shape[0] + one_pool),
        {"dst_pool": dst_pool, "src_pool": src_pool, "src_indices": src_indices, "dst_indices": dst_indices},
        {
            "copies": src_indices.shape[0],
            "pad_slot_id": pad_slot_id,
            "src_stride": src_indices.stride(0),
            "dst_stride": dst_indices.stride(0),
            "src_slot": source.stride(0) // unit,
            "dst_slot": dst_pool.stride(0) // unit,
            "size": size,
            "size_1": inner[0],
            "size_2": inner[1],
            "src_0": src_0,
            "src_1": src_1,
            "src_2": src_2,
            "dst_0": dst_0,
            "dst_1": dst_1,
            "dst_2": dst_2,
            "UNIT": unit,
            "ONE_POOL": one_pool,
            "CONTIGUOUS": len(dims) <= 1 and dst_2 == src_2 == 1,
            "BLOCK": block,
            "num_warps": 4,
        },
    )
