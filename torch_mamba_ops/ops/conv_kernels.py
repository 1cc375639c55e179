# mypy: ignore-errors
"""The causal convolution of whole sequences in Triton, packed side by side in one row or dense.

`convolve_channels` is for memory where channels lie side by side, and right for any other; `convolve_tokens` for memory
where tokens do. A program has some channels of a block of tokens of one sequence. That of a sequence's first block
reads the window before the sequence and writes the one after it, so that no program reads what another one writes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from torch_mamba_ops.ops.launch import INTERPRET
from torch_mamba_ops.ops.tiles import LOG2_E, from_lanes, silu, to_lanes

_INTERPRETED = tl.constexpr(INTERPRET)


@triton.jit(
    do_not_specialize=["length", "sequences", "pad_slot_id"],
    do_not_specialize_on_alignment=["bounds_ptr", "slots_ptr", "known_ptr", "owners_ptr"],
)
def convolve_channels(
    out_ptr,
    state_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    bounds_ptr,
    slots_ptr,
    known_ptr,
    owners_ptr,
    length,
    sequences,
    columns,
    pad_slot_id,
    x_sequence,
    x_dim,
    x_token,
    out_sequence,
    out_dim,
    out_token,
    state_slot,
    state_dim,
    state_column,
    owners_sequence,
    owners_token,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    WEIGHT_DIM: tl.constexpr,
    WEIGHT_TAP: tl.constexpr,
    BIAS_DIM: tl.constexpr,
    PACKED: tl.constexpr,
    READS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_OWNERS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """A thread walks down the block's tokens with the last inputs of its channels in registers, and has the next UNROLL
    tokens on their way while it computes UNROLL others.

    PACKED: all sequences are in one row of ``length`` tokens and begin at ``bounds``; else each is a row of ``length``
    tokens. READS: there are windows before the sequences. OWNERS: inputs count for tokens of the same owner.
    """
    program = tl.program_id(0) // tl.cdiv(DIM, BLOCK_D)
    if PACKED:
        start, end, block, valid, slot, known = _place(
            bounds_ptr, slots_ptr, known_ptr, length, sequences, pad_slot_id, program, BLOCK_T, READS, HAS_SLOTS
        )
        # Loads of nothing: for torch, all that a function was given is written where its result is an address.
        start = tl.load(bounds_ptr, False, start).to(tl.int32)
        block = tl.load(bounds_ptr, False, block).to(tl.int32)
        slot = tl.load(bounds_ptr, False, slot).to(tl.int64)
        sequence = slot * 0
    else:
        start, end, valid, known = 0, length, True, True
        sequence = (program // tl.cdiv(length, BLOCK_T)).to(tl.int64)
        block = program % tl.cdiv(length, BLOCK_T)
        slot = sequence
    channel = (tl.program_id(0) % tl.cdiv(DIM, BLOCK_D) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    inside = tl.full([BLOCK_D], True, tl.int1)
    if DIM % BLOCK_D != 0:
        inside = channel < DIM
    first = start + block * BLOCK_T
    count = tl.minimum(end - first, BLOCK_T)
    if count <= 0:
        return

    out_ptrs = out_ptr + sequence * out_sequence + first.to(tl.int64) * out_token + channel * out_dim
    if not valid:
        for _ in range(count):
            tl.store(out_ptrs, tl.zeros([BLOCK_D], out_ptr.dtype.element_ty), inside)
            out_ptrs += out_token
        return

    x_ptrs = x_ptr + sequence * x_sequence + first.to(tl.int64) * x_token + channel * x_dim
    if PACKED or READS:
        state_ptrs = state_ptr + slot * state_slot + channel * state_dim
    token_ptrs = x_ptrs
    ahead = ()
    for i in tl.static_range(UNROLL):
        ahead += (tl.load(token_ptrs, inside & (i < count)),)
        token_ptrs += x_token

    window = ()
    for i in tl.static_range(WIDTH - 1):
        back = WIDTH - 1 - i
        value = tl.load(x_ptrs - back * tl.full([], x_token, tl.int64), inside & (block > 0), 0.0).to(tl.float32)
        if READS:
            column = (tl.full([], columns, tl.int64) - back) * state_column
            before = tl.load(state_ptrs + column, inside & (block == 0) & known, 0.0).to(tl.float32)
            value = tl.where(block == 0, before, value)
        window += (value,)
    taps, bias = _filter(
        weight_ptr, bias_ptr, channel, inside, WIDTH, WEIGHT_DIM, WEIGHT_TAP, BIAS_DIM, HAS_BIAS, BLOCK_D
    )
    if HAS_OWNERS:
        owners_ptr += sequence * owners_sequence
        owners = ()
        for i in tl.static_range(WIDTH - 1):
            # What is before the sequence is its first token's.
            at = tl.maximum(first - (WIDTH - 1) + i, 0).to(tl.int64)
            owners += (tl.load(owners_ptr + at * owners_token),)

    for t in range(0, count, UNROLL):
        values = ahead
        ahead = ()
        for i in tl.static_range(UNROLL):
            ahead += (tl.load(token_ptrs, inside & (t + UNROLL + i < count)),)
            token_ptrs += x_token
        for i in tl.static_range(UNROLL):
            inputs = window
            inputs += (values[i].to(tl.float32),)
            seen = inputs
            if HAS_OWNERS:
                at = (first + tl.minimum(t + i, count - 1)).to(tl.int64)
                owners += (tl.load(owners_ptr + at * owners_token),)
                seen = _of_one_owner(inputs, owners, WIDTH)
                owners = owners[1:]
            y = _convolve(seen, taps, bias, WIDTH, HAS_BIAS, SILU).to(out_ptr.dtype.element_ty)
            tl.store(out_ptrs, y, inside & (t + i < count))
            out_ptrs += out_token
            window = inputs[1:]

    if PACKED:
        if block == 0:
            _shift_window(
                state_ptrs, x_ptrs, inside, known, end - start, columns, state_column, x_token, READS, CHUNK=4
            )


@triton.jit(
    do_not_specialize=["sequences", "pad_slot_id"],
    do_not_specialize_on_alignment=["bounds_ptr", "slots_ptr", "known_ptr", "owners_ptr"],
)
def convolve_tokens(
    out_ptr,
    state_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    bounds_ptr,
    slots_ptr,
    known_ptr,
    owners_ptr,
    length,
    sequences,
    columns,
    pad_slot_id,
    x_sequence,
    x_dim,
    out_sequence,
    out_dim,
    state_slot,
    state_dim,
    state_column,
    owners_sequence,
    owners_token,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    WEIGHT_DIM: tl.constexpr,
    WEIGHT_TAP: tl.constexpr,
    BIAS_DIM: tl.constexpr,
    PACKED: tl.constexpr,
    READS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_OWNERS: tl.constexpr,
    SILU: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The same where ``x_token`` and ``out_token`` are 1.

    A thread has groups of GROUP tokens that are one access of 16 bytes; the inputs before a group's tokens are in the
    group before, which it loads as well, from the cache. Groups begin at multiples of GROUP in the row, wherever the
    sequence begins.
    """
    program = tl.program_id(0) // tl.cdiv(DIM, BLOCK_D)
    if PACKED:
        start, end, block, valid, slot, known = _place(
            bounds_ptr, slots_ptr, known_ptr, length, sequences, pad_slot_id, program, BLOCK_T, READS, HAS_SLOTS
        )
        # Loads of nothing: for torch, all that a function was given is written where its result is an address.
        start = tl.load(bounds_ptr, False, start).to(tl.int32)
        block = tl.load(bounds_ptr, False, block).to(tl.int32)
        slot = tl.load(bounds_ptr, False, slot).to(tl.int64)
        sequence = slot * 0
    else:
        start, end, valid, known = 0, length, True, True
        sequence = (program // tl.cdiv(length, BLOCK_T)).to(tl.int64)
        block = program % tl.cdiv(length, BLOCK_T)
        slot = sequence
    first = (start // GROUP + block * (BLOCK_T // GROUP)) * GROUP
    if (first >= end) | (start >= end):
        return
    channels = tl.program_id(0) % tl.cdiv(DIM, BLOCK_D) * BLOCK_D
    row = tl.arange(0, BLOCK_D * BLOCK_T // GROUP)
    channel = (channels + row // (BLOCK_T // GROUP)).to(tl.int64)
    inside = (channel < DIM)[:, None]
    place = row % (BLOCK_T // GROUP) * GROUP
    place = place[:, None] + tl.arange(0, GROUP)[None, :]
    token = first - start + place  # of the sequence

    out_ptrs = out_ptr + sequence * out_sequence + first.to(tl.int64) + channel[:, None] * out_dim + place
    here = inside & (token >= 0) & (token < end - start)
    if not valid:
        tl.store(out_ptrs, tl.zeros(token.shape, out_ptr.dtype.element_ty), here)
        return

    x_ptrs = x_ptr + sequence * x_sequence + first.to(tl.int64) + channel[:, None] * x_dim + place
    state_ptrs = None
    if READS:
        state_ptrs = state_ptr + slot * state_slot + channel[:, None] * state_dim
    whole = (block > 0) & (first + BLOCK_T <= end)  # nothing but tokens of this sequence, so that whole groups move
    if whole:
        group = tl.load(x_ptrs, inside, 0.0).to(tl.float32)
        before = tl.load(x_ptrs - GROUP, inside, 0.0).to(tl.float32)
    else:
        group = _edge(x_ptrs, state_ptrs, token, end - start, columns, state_column, inside, known, WIDTH, READS)
        before = _edge(
            x_ptrs - GROUP, state_ptrs, token - GROUP, end - start, columns, state_column, inside, known, WIDTH, READS
        )
    taps = ()
    for i in tl.static_range(WIDTH):
        tap = tl.load(weight_ptr + channel * WEIGHT_DIM + i * WEIGHT_TAP, channel < DIM, 0.0)
        taps += (tap.to(tl.float32),)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel * BIAS_DIM, channel < DIM, 0.0).to(tl.float32)

    inputs = to_lanes(before, GROUP)
    inputs += to_lanes(group, GROUP)
    if HAS_OWNERS:
        # What is before the sequence is its first token's.
        owner_ptrs = owners_ptr + sequence * owners_sequence
        at = tl.minimum(tl.maximum(token, 0), end - 1).to(tl.int64)
        after = to_lanes(tl.load(owner_ptrs + at * owners_token), GROUP)
        at = tl.minimum(tl.maximum(token - GROUP, 0), end - 1).to(tl.int64)
        owners = to_lanes(tl.load(owner_ptrs + at * owners_token), GROUP)
        owners += after
    outputs = ()
    for i in tl.static_range(GROUP):
        seen = inputs[GROUP + i - (WIDTH - 1) : GROUP + i + 1]
        if HAS_OWNERS:
            seen = _of_one_owner(seen, owners[GROUP + i - (WIDTH - 1) : GROUP + i + 1], WIDTH)
        outputs += (_convolve(seen, taps, bias, WIDTH, HAS_BIAS, SILU).to(out_ptr.dtype.element_ty),)
    y = from_lanes(outputs, GROUP)
    tl.store(out_ptrs, y, here & (not whole))  # as an else the compiler would make one store of both, token by token
    if whole:
        tl.store(out_ptrs, y, inside)

    if PACKED:
        if block == 0:
            one_each = (channels + tl.arange(0, BLOCK_D)).to(tl.int64)
            _shift_window(
                state_ptr + slot * state_slot + one_each * state_dim, x_ptr + start.to(tl.int64) + one_each * x_dim,
                one_each < DIM, known, end - start, columns, state_column, 1, READS, CHUNK=4,
            )  # fmt: skip


@triton.jit
def _place(
    bounds_ptr,
    slots_ptr,
    known_ptr,
    length,
    sequences,
    pad_slot_id,
    program,
    BLOCK_T: tl.constexpr,
    READS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
):
    """What a program is about in a packed row: the first token and the end of its sequence, its block of tokens,
    whether it is one and not padding, the slot of its window and whether that counts.

    Packed sequences, with what is before the first and after the last of them, part the row. A part that begins at
    token b and has p parts before it gets the programs from b // BLOCK_T + p on: enough of them, whatever its length,
    and no table is needed to find it. Some programs get nothing to do.
    """
    part = tl.full([], 0, tl.int32)
    step = tl.full([], 1, tl.int32)
    while step * 128 <= sequences:
        step *= 128
    while step > 0:  # of the 128 stretches of `step` parts from here on, the ones that lie wholly before
        last = part + tl.arange(0, 128) * step + step - 1
        bound = tl.load(bounds_ptr + last, last <= sequences, 0).to(tl.int32)
        part += step * tl.sum(((last <= sequences) & (bound // BLOCK_T + last + 1 <= program)).to(tl.int32))
        step //= 128
    start = tl.load(bounds_ptr + part - 1, part > 0, 0).to(tl.int32)
    end = tl.load(bounds_ptr + part, part <= sequences, length).to(tl.int32)
    valid = (part > 0) & (part <= sequences)
    slot = (part - 1).to(tl.int64)
    known = program >= 0
    if READS:
        known = tl.load(known_ptr + slot, valid, 0) != 0
    if HAS_SLOTS:
        slot = tl.load(slots_ptr + slot, valid, pad_slot_id).to(tl.int64)
        valid = valid & (slot != pad_slot_id)
    return start, end, program - start // BLOCK_T - part, valid, slot, known


@triton.jit
def _filter(
    weight_ptr,
    bias_ptr,
    channel,
    inside,
    WIDTH: tl.constexpr,
    WEIGHT_DIM: tl.constexpr,
    WEIGHT_TAP: tl.constexpr,
    BIAS_DIM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The taps, each for all channels, and the bias. All taps of a channel are loaded at once: one after the other they
    would cost as much as the tokens of a block."""
    i = tl.arange(0, 4)[None, :]
    weights = tl.load(
        weight_ptr + channel[:, None] * WEIGHT_DIM + i * WEIGHT_TAP, inside[:, None] & (i < WIDTH), 0.0
    ).to(tl.float32)
    taps = to_lanes(weights, 4)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel * BIAS_DIM, inside, 0.0).to(tl.float32)
    return taps, bias


@triton.jit
def _convolve(inputs, taps, bias, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr):
    """One output of each channel."""
    y = inputs[0] * taps[0]
    if HAS_BIAS:
        y += bias
    for i in tl.static_range(1, WIDTH):
        y += inputs[i] * taps[i]
    if SILU:
        y = _silu(y)
    return y


@triton.jit
def _silu(y):
    """y * sigmoid(y). `silu` handles denormal numbers too, which makes the whole kernel half as long again."""
    if _INTERPRETED:
        return silu(y)
    else:
        return libdevice.fast_dividef(y, 1.0 + libdevice.exp2(y * -LOG2_E))


@triton.jit
def _of_one_owner(inputs, owners, WIDTH: tl.constexpr):
    """The inputs, zero where they are not the last one's owner's."""
    seen = ()
    for i in tl.static_range(WIDTH - 1):
        seen += (tl.where(owners[i] == owners[WIDTH - 1], inputs[i], 0.0),)
    seen += (inputs[WIDTH - 1],)
    return seen


@triton.jit
def _edge(
    x_ptrs, state_ptrs, token, length, columns, state_column, inside, known, WIDTH: tl.constexpr, READS: tl.constexpr
):
    """Inputs of a sequence around its begin or its end: tokens, the window before them, zeros."""
    values = tl.load(x_ptrs, inside & (token >= 0) & (token < length), 0.0).to(tl.float32)
    if READS:
        of_window = inside & (token < 0) & (token >= 1 - WIDTH) & known
        values += tl.load(state_ptrs + (columns + token).to(tl.int64) * state_column, of_window, 0.0).to(tl.float32)
    return values


@triton.jit
def _shift_window(
    state_ptrs,
    x_ptrs,
    inside,
    known,
    length,
    columns,
    state_column,
    x_token,
    READS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Moves the window on to after the sequence, CHUNK columns at a time; ``x_ptrs`` are its first token's."""
    for begin in range(0, columns, CHUNK):
        column = begin + tl.arange(0, CHUNK)
        token = (length - columns + column).to(tl.int64)[None, :]
        mask = inside[:, None] & (column < columns)[None, :]
        new = tl.load(x_ptrs[:, None] + token * x_token, mask & (token >= 0), 0.0).to(state_ptrs.dtype.element_ty)
        if READS:
            old = state_ptrs[:, None] + (columns + token) * state_column
            new = tl.where(token < 0, tl.load(old, mask & (token < 0) & known, 0.0), new)
        tl.debug_barrier()  # a thread may store to columns that another one loads
        tl.store(state_ptrs[:, None] + column.to(tl.int64)[None, :] * state_column, new, mask)
