"""The copy of state blocks in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from torch_mamba_ops.ops.copy_kernels import copy_slots


@triton.jit(do_not_specialize=["copies", "pad_slot_id"], do_not_specialize_on_alignment=["src_indices", "dst_indices"])
def copy_states(
    src_pool,
    dst_pool,
    src_indices,
    dst_indices,
    copies,
    pad_slot_id,
    src_stride,
    dst_stride,
    src_slot,
    dst_slot,
    size,
    size_1,
    size_2,
    src_0,
    src_1,
    src_2,
    dst_0,
    dst_1,
    dst_2,
    UNIT: tl.constexpr,
    ONE_POOL: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: tiles of a slot, one and copies (see `copy_slots`; without the one if there are two pools).

    A slot has ``size`` elements in up to three dimensions, the inner two of ``size_1`` and ``size_2``. Strides over
    slots count ``UNIT`` elements, so that the compiler knows whether they keep to 16 bytes.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    place = tl.arange(0, BLOCK)
    inside = start + place < size
    if ONE_POOL:
        src_pool = dst_pool
    if CONTIGUOUS:
        src_pool += start
        dst_pool += start
        src_at = place
        dst_at = place
    else:
        place = start + place
        inner = place % size_2
        middle = place // size_2 % size_1
        outer = place // size_2 // size_1
        src_at = outer * src_0 + middle * src_1 + inner * src_2
        dst_at = outer * dst_0 + middle * dst_1 + inner * dst_2
    listed = (
        copies, pad_slot_id, src_indices, dst_indices, None, None, src_stride, 0, dst_stride, 0, 0, 0, 0,
    )  # fmt: skip
    tile = (
        src_pool, dst_pool, src_at, dst_at, inside, 0, tl.full([], src_slot, tl.int64) * UNIT,
        tl.full([], dst_slot, tl.int64) * UNIT, 0,
    )  # fmt: skip
    if ONE_POOL:
        copy_slots(tl.program_id(1), listed, tile, "pool")
    else:
        copy_slots(tl.program_id(1) + 1, listed, tile, "apart")
