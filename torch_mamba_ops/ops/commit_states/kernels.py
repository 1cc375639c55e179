"""The commit of states in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from torch_mamba_ops.ops.copy_kernels import copy_slots


@triton.jit(  # not size and dim: known as multiples of 16, they let masked accesses be of 16 bytes
    do_not_specialize=["copies", "pad_slot_id", "last", "window_tiles"],
    do_not_specialize_on_alignment=["src_indices", "dst_indices", "accepted", "parents", "rows"],
)
def commit_states(
    conv_states,
    ssm_states,
    accepted,
    parents,
    intermediate,
    rows,
    src_indices,
    dst_indices,
    copies,
    pad_slot_id,
    src_copy,
    src_token,
    dst_copy,
    accepted_copy,
    parents_copy,
    parents_token,
    row_copy,
    last,
    dim,
    columns,
    window_tiles,
    window_slot,
    window_channel,
    window_column,
    size,
    state_slot,
    source_row,
    source_token,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    COLUMNS_INNERMOST: tl.constexpr,
    HAS_ACCEPTED: tl.constexpr,
    HAS_PARENTS: tl.constexpr,
    HAS_BUFFER: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_WINDOWS: tl.constexpr,
    HAS_STATES: tl.constexpr,
    WINDOW_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: tiles of the windows and then of the states, one and copies (see `copy_slots`).

    ``COLUMNS`` is the power of two from ``columns`` on: a program has all columns of its channels, since they move from
    one to another. Strides of states count ``UNIT`` elements, so that the compiler knows whether they keep to 16 bytes.
    """
    tile_number = tl.program_id(0)
    copy = tl.program_id(1)
    if HAS_WINDOWS:
        if tile_number < window_tiles:
            lane = tl.arange(0, WINDOW_BLOCK)
            CHANNELS: tl.constexpr = WINDOW_BLOCK // COLUMNS
            if COLUMNS_INNERMOST:
                channel = lane // COLUMNS
                column = lane % COLUMNS
            else:
                channel = lane % CHANNELS
                column = lane // CHANNELS
            channel = tile_number.to(tl.int64) * CHANNELS + channel
            column = column.to(tl.int64)
            at = channel * window_channel
            listed = (
                copies, pad_slot_id, src_indices, dst_indices, accepted if HAS_ACCEPTED else None, None, src_copy, 0,
                dst_copy, accepted_copy, 0, FIRST, columns - 1,
            )  # fmt: skip
            window = (column, columns, parents if HAS_PARENTS else None, parents_copy, parents_token, WIDTH)
            slot = tl.full([], window_slot, tl.int64)
            tile = (
                conv_states, conv_states, at, at + column * window_column, (channel < dim) & (column < columns), window,
                slot, slot, window_column,
            )  # fmt: skip
            copy_slots(copy, listed, tile, "window")
    if HAS_STATES:
        if tile_number >= window_tiles:
            start = (tile_number - window_tiles).to(tl.int64) * BLOCK
            at = tl.arange(0, BLOCK)
            slot = tl.full([], state_slot, tl.int64) * UNIT
            if HAS_BUFFER:
                listed = (
                    copies, pad_slot_id, src_indices, dst_indices, accepted if HAS_ACCEPTED else None,
                    rows if HAS_ROWS else None, src_copy, 0, dst_copy, accepted_copy, row_copy, FIRST, last,
                )  # fmt: skip
                tile = (
                    intermediate + start, ssm_states + start, at, at, start + at < size, 0,
                    tl.full([], source_row, tl.int64) * UNIT, slot, tl.full([], source_token, tl.int64) * UNIT,
                )  # fmt: skip
                copy_slots(copy, listed, tile, "buffer")
            else:
                listed = (
                    copies, pad_slot_id, src_indices, dst_indices, accepted if HAS_ACCEPTED else None, None, src_copy,
                    src_token, dst_copy, accepted_copy, 0, FIRST, last,
                )  # fmt: skip
                tile = (ssm_states + start, ssm_states + start, at, at, start + at < size, 0, slot, slot, 0)
                copy_slots(copy, listed, tile, "pool")
