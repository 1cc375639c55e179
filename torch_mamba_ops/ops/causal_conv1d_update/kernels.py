"""The decode step of the convolution in Triton: one token a sequence at the speed of memory, and every other step."""

from __future__ import annotations

import triton
import triton.language as tl

from torch_mamba_ops.ops.tiles import from_lanes, to_lanes
from torch_mamba_ops.ops.tree_kernels import parent_of


@triton.jit(do_not_specialize=["batch", "pad_slot_id"], do_not_specialize_on_alignment=["conv_state_indices_ptr"])
def update_one_token(
    conv_state_ptr,
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    conv_state_indices_ptr,
    batch,
    dim,
    pad_slot_id,
    x_stride,
    out_stride,
    slot_stride,
    column_stride,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    COLUMNS_INNERMOST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INDICES: tl.constexpr,
    SILU: tl.constexpr,
    SEQUENCES: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One token of SEQUENCES sequences, for GROUPS * GROUP channels that lie side by side.

    A thread has whole groups of channels. Memory is read and written in tiles [GROUPS, GROUP] whose rows are one access
    of 16 bytes: one column of a group or, where columns (or taps) are innermost, a part of all its columns, which are
    told apart in registers.
    """
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[:, None]
    lane = tl.arange(0, GROUP)[None, :]
    inside = group < dim // GROUP
    # Groups and sequences beyond the last one load it again: loads without a mask are sent off earlier.
    group = tl.minimum(group, dim // GROUP - 1)
    channel = group * GROUP + lane

    sequences = ()
    for i in tl.static_range(SEQUENCES):
        sequence = tl.program_id(0).to(tl.int64) * SEQUENCES + i
        present = sequence < batch
        sequence = tl.minimum(sequence, batch - 1)
        slot = sequence
        valid = present
        if HAS_INDICES:
            slot = tl.load(conv_state_indices_ptr + sequence).to(tl.int64)
            valid = present & (slot != pad_slot_id)
        sequences += ((sequence, conv_state_ptr + slot * slot_stride, present, valid),)

    weights = read_groups(weight_ptr, group, lane, True, WIDTH, GROUP, False)
    bias = weights[0]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel)
    tokens = ()
    for i in tl.static_range(SEQUENCES):
        sequence, page_ptr, present, valid = sequences[i]
        tokens += (tl.load(x_ptr + sequence * x_stride + channel),)
    pages = ()
    for i in tl.static_range(SEQUENCES):
        sequence, page_ptr, present, valid = sequences[i]
        pages += (read_page(page_ptr, group, lane, valid, column_stride, COLUMNS, COLUMNS_INNERMOST, GROUP),)

    # Where addresses are not aligned, the thread that stores an element need not be the one that loaded it.
    tl.debug_barrier()
    taps = dealt(weights, WIDTH, GROUP)
    for i in tl.static_range(SEQUENCES):
        sequence, page_ptr, present, valid = sequences[i]
        columns = pages[i]
        if COLUMNS_INNERMOST:
            columns = dealt(columns, COLUMNS, GROUP)
        y = convolved(columns, tokens[i], taps, bias, valid, WIDTH, COLUMNS, HAS_BIAS, SILU)
        y = y.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + sequence * out_stride + channel, y, mask=inside & present)
        write_page(
            page_ptr, columns, tokens[i], group, lane, inside & valid, column_stride, COLUMNS, COLUMNS_INNERMOST, GROUP
        )


@triton.jit
def read_groups(ptr, group, lane, mask, COUNT: tl.constexpr, GROUP: tl.constexpr, MASKED: tl.constexpr):
    """COUNT numbers of each channel that lie side by side, in COUNT tiles [groups, GROUP], see `dealt`."""
    parts = ()
    for part in tl.static_range(COUNT):
        place = group * (GROUP * COUNT) + (part * GROUP + lane)
        if MASKED:
            parts += (tl.load(ptr + place, mask=mask, other=0.0),)
        else:
            parts += (tl.load(ptr + place),)
    return parts


@triton.jit
def read_page(
    page_ptr,
    group,
    lane,
    valid,
    column_stride,
    COLUMNS: tl.constexpr,
    COLUMNS_INNERMOST: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A sequence's columns, each a tile [groups, GROUP]; where they are innermost, still to be `dealt`."""
    if COLUMNS_INNERMOST:
        return read_groups(page_ptr, group, lane, valid, COLUMNS, GROUP, True)
    parts = ()
    for _ in tl.static_range(COLUMNS):
        parts += (tl.load(page_ptr + (group * GROUP + lane), mask=valid, other=0.0),)
        page_ptr += column_stride
    return parts


@triton.jit
def convolved(
    columns,
    token,
    taps,
    bias,
    valid,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
):
    """The output in float32; zero for a padded sequence."""
    y = tl.zeros(token.shape, tl.float32)
    for tap in tl.static_range(WIDTH - 1):
        y += columns[COLUMNS - (WIDTH - 1) + tap].to(tl.float32) * taps[tap].to(tl.float32)
    y += token.to(tl.float32) * taps[WIDTH - 1].to(tl.float32)
    if HAS_BIAS:
        y += bias.to(tl.float32)
    if SILU:
        y *= tl.sigmoid(y)
    return tl.where(valid, y, 0.0)


@triton.jit
def write_page(
    page_ptr,
    columns,
    token,
    group,
    lane,
    mask,
    column_stride,
    COLUMNS: tl.constexpr,
    COLUMNS_INNERMOST: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The columns but for the oldest, and the token."""
    parts = ()
    for column in tl.static_range(1, COLUMNS):
        parts += (columns[column],)
    parts += (token.to(page_ptr.dtype.element_ty),)
    if COLUMNS_INNERMOST:
        parts = collected(parts, COLUMNS, GROUP)
    for part in tl.static_range(COLUMNS):
        if COLUMNS_INNERMOST:
            place = group * (GROUP * COLUMNS) + (part * GROUP + lane)
            tl.store(page_ptr + place, parts[part], mask=mask)
        else:
            tl.store(page_ptr + (group * GROUP + lane), parts[part], mask=mask)
            page_ptr += column_stride


@triton.jit
def dealt(parts, COUNT: tl.constexpr, GROUP: tl.constexpr):
    """COUNT tiles [groups, GROUP] that hold, one after the other, COUNT numbers of each channel: tile i of the result
    has the i-th of every channel."""
    if COUNT == 1:
        return parts
    flat = ()
    for part in tl.static_range(COUNT):
        flat += to_lanes(parts[part], GROUP)
    tiles = ()
    for i in tl.static_range(COUNT):
        lanes = ()
        for lane in tl.static_range(GROUP):
            lanes += (flat[lane * COUNT + i],)
        tiles += (from_lanes(lanes, GROUP),)
    return tiles


@triton.jit
def collected(tiles, COUNT: tl.constexpr, GROUP: tl.constexpr):
    """The inverse of `dealt`."""
    if COUNT == 1:
        return tiles
    lanes = ()
    for i in tl.static_range(COUNT):
        lanes += to_lanes(tiles[i], GROUP)
    parts = ()
    for part in tl.static_range(COUNT):
        flat = ()
        for lane in tl.static_range(GROUP):
            flat += (lanes[(part * GROUP + lane) % COUNT * GROUP + (part * GROUP + lane) // COUNT],)
        parts += (from_lanes(flat, GROUP),)
    return parts


@triton.jit(
    do_not_specialize=["pad_slot_id", "parents_sequence_stride"],
    do_not_specialize_on_alignment=[
        "conv_state_indices_ptr",
        "cache_seqlens_ptr",
        "num_accepted_tokens_ptr",
        "query_start_loc_ptr",
        "parents_ptr",
    ],
)
def update_tokens(
    conv_state_ptr,
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    conv_state_indices_ptr,
    cache_seqlens_ptr,
    num_accepted_tokens_ptr,
    query_start_loc_ptr,
    parents_ptr,
    dim,
    length,
    columns,
    pad_slot_id,
    x_sequence_stride,
    x_dim_stride,
    x_token_stride,
    out_sequence_stride,
    out_dim_stride,
    out_token_stride,
    slot_stride,
    state_dim_stride,
    column_stride,
    weight_dim_stride,
    weight_tap_stride,
    bias_stride,
    parents_sequence_stride,
    parents_token_stride,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INDICES: tl.constexpr,
    RING: tl.constexpr,
    ACCEPTED: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_PARENTS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """All tokens of one sequence, for a block of channels: any strides, any option. CHUNK columns move at a time."""
    sequence = tl.program_id(0).to(tl.int64)
    channel = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = channel < dim
    # Triton makes arguments that are 1 constants; as tensors they behave like all others.
    columns = tl.full([], columns, tl.int32)
    if PACKED:
        first = tl.load(query_start_loc_ptr + sequence).to(tl.int64)
        count = (tl.load(query_start_loc_ptr + sequence + 1).to(tl.int64) - first).to(tl.int32)
        x_ptr += first * x_token_stride
        out_ptr += first * out_token_stride
        if HAS_PARENTS:
            parents_ptr += first * parents_token_stride
    else:
        count = tl.full([], length, tl.int32)
        x_ptr += sequence * x_sequence_stride
        out_ptr += sequence * out_sequence_stride
        if HAS_PARENTS:
            parents_ptr += sequence * parents_sequence_stride
    slot = sequence
    touched = count > 0
    if HAS_INDICES:
        slot = tl.load(conv_state_indices_ptr + sequence).to(tl.int64)
        touched = touched & (slot != pad_slot_id)
    x_ptrs = x_ptr + channel * x_dim_stride
    out_ptrs = out_ptr + channel * out_dim_stride
    state_ptrs = conv_state_ptr + slot * slot_stride + channel * state_dim_stride
    state_mask = inside & touched

    oldest = columns - (WIDTH - 1)
    if ACCEPTED:
        accepted = tl.maximum(tl.load(num_accepted_tokens_ptr + sequence), 1).to(tl.int32)
        oldest = accepted - 1
    if RING:
        place = (tl.load(cache_seqlens_ptr + sequence) % columns).to(tl.int32)  # where the next token goes
        place = tl.where(place < 0, place + columns, place)
        oldest += place
    window = ()
    for i in tl.static_range(WIDTH - 1):
        column = oldest + i
        if RING:
            column = tl.where(column >= columns, column - columns, column)
        column = tl.minimum(column, columns - 1).to(tl.int64)
        window += (tl.load(state_ptrs + column * column_stride, mask=state_mask, other=0.0).to(tl.float32),)
    taps = ()
    tap_ptrs = weight_ptr + channel * weight_dim_stride
    for _ in tl.static_range(WIDTH):
        taps += (tl.load(tap_ptrs, mask=inside, other=0.0).to(tl.float32),)
        tap_ptrs += weight_tap_stride
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel * bias_stride, mask=inside, other=0.0).to(tl.float32)
    if RING:
        tl.debug_barrier()  # a thread may store to the ring what another one loads from it

    token_ptrs = x_ptrs
    for number in range(count):
        token = tl.load(token_ptrs, mask=inside, other=0.0)
        inputs = window
        if HAS_PARENTS:
            node = sequence * 0 + number
            inputs = _up(node, parents_ptr, parents_token_stride, x_ptrs, x_token_stride, window, inside, WIDTH)
        inputs += (token.to(tl.float32),)
        y = inputs[0] * taps[0]
        for i in tl.static_range(1, WIDTH):
            y += inputs[i] * taps[i]
        if HAS_BIAS:
            y += bias
        if SILU:
            y *= tl.sigmoid(y)
        tl.store(out_ptrs, tl.where(touched, y, 0.0).to(out_ptr.dtype.element_ty), mask=inside)
        if RING:
            value = token.to(conv_state_ptr.dtype.element_ty)
            tl.store(state_ptrs + place.to(tl.int64) * column_stride, value, mask=state_mask)
            place = tl.where(place == columns - 1, 0, place + 1)
        if not HAS_PARENTS:
            window = inputs[1:]
        token_ptrs += x_token_stride
        out_ptrs += out_token_stride

    if not RING:
        # The first columns come from further right, the next ones are the new tokens, and the rest stays.
        shift = count
        kept = columns - count
        stop = columns
        if ACCEPTED:
            shift = accepted
            kept = tl.full([], WIDTH - 2, tl.int32)
            stop = tl.minimum(kept + count, columns)
        for start in range(0, columns, CHUNK):
            target = start + tl.arange(0, CHUNK)
            mask = state_mask[:, None] & (target < stop)[None, :]
            moves = (target < kept)[None, :]
            source = tl.minimum(target + shift, columns - 1).to(tl.int64)[None, :]
            old = tl.load(state_ptrs[:, None] + source * column_stride, mask=mask & moves, other=0.0)
            source = (target - kept).to(tl.int64)[None, :]
            new = tl.load(x_ptrs[:, None] + source * x_token_stride, mask=mask & (target >= kept)[None, :], other=0.0)
            moved = tl.where(moves, old, new.to(conv_state_ptr.dtype.element_ty))
            tl.debug_barrier()  # a thread may store to columns that another one loads
            tl.store(state_ptrs[:, None] + target.to(tl.int64)[None, :] * column_stride, moved, mask=mask)


@triton.jit
def _up(node, parents_ptr, parents_token_stride, x_ptrs, x_token_stride, window, inside, WIDTH: tl.constexpr):
    """The WIDTH - 1 inputs before a token of a tree, oldest first: its path's and, from a root on, the window's."""
    inputs = ()
    for _ in tl.static_range(WIDTH - 1):
        node = parent_of(node, parents_ptr, parents_token_stride)
        token_ptrs = x_ptrs + tl.maximum(node, 0) * x_token_stride
        value = tl.load(token_ptrs, mask=inside & (node >= 0), other=0.0).to(tl.float32)
        for i in tl.static_range(WIDTH - 1):
            value = tl.where(node == i - (WIDTH - 1), window[i], value)
        inputs = (value,) + inputs  # noqa: RUF005 - not in Triton
    return inputs
