"""The selective scan in Triton: a program walks over the tokens of a block of channels, a tile of tokens at a time.

A tile is ``[tokens, state, channels]``. Triton's layout for it gives a thread all tokens of some states of a channel:
the scan is a chain of fused multiply-adds inside a thread. Sequences are not split, which would take every exponential
twice. What has no state (step sizes, the gate) is computed once, in a layout of its own, and handed round to the
threads that share a channel.

Exponentials set the pace: 16 a cycle and multiprocessor, so 145 us for 8,192 channels x 16 states x 4,096 tokens on an
H200, 175 us with those of softplus and the gate. The code issues 10 to 13 instructions for each; 8 take as long.
"""

from __future__ import annotations

import triton
import triton.language as tl

from torch_mamba_ops.ops.tiles import LOG2_E, silu, softplus


@triton.jit
def after(decay, update, later_decay, later_update):
    """Two steps of ``h -> decay * h + update`` as one."""
    return later_decay * decay, tl.fma(later_decay, update, later_update)


@triton.jit
def sum_over_states(values, HALVINGS: tl.constexpr):
    """``[T, N, D]`` to ``[T, D]``.

    A channel's states lie in ``2**HALVINGS`` threads: each adds up its own, then one adds up theirs, where `tl.sum`
    would have all of them do that.
    """
    T: tl.constexpr = values.shape[0]
    N: tl.constexpr = values.shape[1]
    D: tl.constexpr = values.shape[2]
    sums = tl.sum(tl.reshape(values, (T, N >> HALVINGS, 1 << HALVINGS, D)), 1)
    sums = tl.permute(sums, (0, 2, 1))
    for halving in tl.static_range(HALVINGS):
        even, odd = tl.split(tl.reshape(sums, (T, D, 1 << (HALVINGS - 1 - halving), 2)))
        sums = even + odd
    return tl.reshape(sums, (T, D))


@triton.jit
def read_tokens(
    u,
    delta,
    z,
    B,
    C,
    u_at,
    delta_at,
    z_at,
    B_at,
    C_at,
    in_t,
    in_d,
    in_n,
    HAS_Z: tl.constexpr,
    FIXED_B: tl.constexpr,
    FIXED_C: tl.constexpr,
):
    """A tile of each as it is in memory, zero where there is none: u, delta, z ``[T, D]``; B, C ``[T, N]``."""
    channels = in_t[:, None] & in_d[None, :]
    states = in_t[:, None] & in_n[None, :]
    gate = 0.0
    if HAS_Z:
        gate = tl.load(z + z_at, channels, 0.0)
    to_state = 0.0
    if not FIXED_B:
        to_state = tl.load(B + B_at, states, 0.0)
    from_state = 0.0
    if not FIXED_C:
        from_state = tl.load(C + C_at, states, 0.0)
    return (
        tl.load(u + u_at, channels, 0.0),
        tl.load(delta + delta_at, channels, 0.0),
        gate,
        to_state,
        from_state,
    )


@triton.jit(do_not_specialize=["length"])
def selective_scan_fn(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    out,
    last_state,
    length,
    u_batch,
    u_channel,
    u_token,
    delta_batch,
    delta_channel,
    delta_token,
    z_batch,
    z_channel,
    z_token,
    A_channel,
    A_state,
    B_batch,
    B_group,
    B_channel,
    B_state,
    B_token,
    C_batch,
    C_group,
    C_channel,
    C_state,
    C_token,
    D_channel,
    bias_channel,
    dim: tl.constexpr,
    N: tl.constexpr,
    SECTION: tl.constexpr,
    B_SHARING: tl.constexpr,
    C_SHARING: tl.constexpr,
    FIXED_B: tl.constexpr,
    FIXED_C: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HALVINGS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Grid: batch x blocks of channels.

    A block lies in a ``SECTION`` of channels that share one group of B and one of C, of ``B_SHARING`` and ``C_SHARING``
    channels.

    All places are counted in 64 bits. That costs nothing: in the loop a thread only moves its few addresses on.
    """
    BLOCKS: tl.constexpr = (SECTION + BLOCK_D - 1) // BLOCK_D
    ROW: tl.constexpr = dim // SECTION * BLOCKS
    block = tl.program_id(0) % ROW
    batch = (tl.program_id(0) // ROW).to(tl.int64)
    in_section = (block % BLOCKS) * BLOCK_D
    first = ((block // BLOCKS) * SECTION + in_section).to(tl.int64)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    t = tl.arange(0, BLOCK_T).to(tl.int64)
    tile = tl.full((), BLOCK_T, tl.int64)
    # Constant where tiles fit, so that nothing is masked.
    in_d = tl.full((BLOCK_D,), True, tl.int1)
    in_n = tl.full((BLOCK_N,), True, tl.int1)
    if SECTION % BLOCK_D != 0:
        in_d = in_section + d < SECTION
    if N != BLOCK_N:
        in_n = n < N
    states = in_n[:, None] & in_d[None, :]

    u += batch * u_batch + first * u_channel
    delta += batch * delta_batch + first * delta_channel
    out += (batch * dim + first) * length
    last_state += (batch * dim + first) * N
    A += first * A_channel
    # exp2 is what the hardware has.
    rate = tl.load(A + n[:, None] * A_state + d[None, :] * A_channel, states, 0.0).to(tl.float32) * LOG2_E
    skip = 0.0
    if HAS_D:
        skip = tl.load(D + first * D_channel + d * D_channel, in_d, 0.0).to(tl.float32)[None, :]
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(delta_bias + first * bias_channel + d * bias_channel, in_d, 0.0).to(tl.float32)[None, :]
    if HAS_Z:
        z += batch * z_batch + first * z_channel
    B += batch * B_batch + (first // B_SHARING) * B_group + first * B_channel
    C += batch * C_batch + (first // C_SHARING) * C_group + first * C_channel
    if FIXED_B:
        B_all = tl.load(B + n[:, None] * B_state + d[None, :] * B_channel, states, 0.0).to(tl.float32)[None, :, :]
    if FIXED_C:
        C_all = tl.load(C + n[:, None] * C_state + d[None, :] * C_channel, states, 0.0).to(tl.float32)[None, :, :]

    u_at = t[:, None] * u_token + d[None, :] * u_channel
    delta_at = t[:, None] * delta_token + d[None, :] * delta_channel
    z_at = t[:, None] * z_token + d[None, :] * z_channel
    B_at = t[:, None] * B_token + n[None, :] * B_state
    C_at = t[:, None] * C_token + n[None, :] * C_state
    out_at = t[:, None] + d[None, :] * length
    is_first = (t == 0)[:, None, None]
    is_last = (t == BLOCK_T - 1)[:, None, None]
    state = tl.zeros((1, BLOCK_N, BLOCK_D), tl.float32)
    u_tile, delta_tile, z_tile, B_tile, C_tile = read_tokens(
        u, delta, z, B, C, u_at, delta_at, z_at, B_at, C_at, t < length, in_d, in_n, HAS_Z, FIXED_B, FIXED_C
    )
    for start in range(0, length, BLOCK_T):
        left = length - start
        there = (t < left)[:, None] & in_d[None, :]
        inputs = u_tile.to(tl.float32)
        step = delta_tile.to(tl.float32) + bias
        if SOFTPLUS:
            step = softplus(step)
        step = tl.where(there, step, 0.0)  # keeps the state
        if HAS_Z:
            gate = silu(z_tile.to(tl.float32))
        # In pairs, so that they are handed round as float32 and at once: a single tile the compiler hands round as it
        # was loaded, and then every thread that gets it computes what follows.
        step, update = tl.split(tl.join(step, step * inputs)[:, None, :, :])
        if FIXED_B:
            to_state = B_all
        if FIXED_C:
            from_state = C_all
        if not FIXED_B and not FIXED_C:
            to_state, from_state = tl.split(tl.join(B_tile.to(tl.float32), C_tile.to(tl.float32))[:, :, None, :])
        elif not FIXED_B:
            to_state = B_tile.to(tl.float32)[:, :, None]
        elif not FIXED_C:
            from_state = C_tile.to(tl.float32)[:, :, None]

        # The next tile is on its way while this one is computed.
        u += tile * u_token
        delta += tile * delta_token
        if HAS_Z:
            z += tile * z_token
        B += tile * B_token
        C += tile * C_token
        u_tile, delta_tile, z_tile, B_tile, C_tile = read_tokens(
            u, delta, z, B, C, u_at, delta_at, z_at, B_at, C_at, t < left - BLOCK_T, in_d, in_n, HAS_Z, FIXED_B, FIXED_C
        )

        decay = tl.exp2(step * rate[None, :, :])
        update *= to_state
        state = tl.broadcast_to(state, (BLOCK_T, BLOCK_N, BLOCK_D))
        update = tl.where(is_first, tl.fma(decay, state, update), update)
        _, states_of_tile = tl.associative_scan((decay, update), 0, after)
        # The last one's. A sum of bits, since adding the zeros of the others costs nothing with integers.
        bits = tl.where(is_last, states_of_tile.to(tl.int32, bitcast=True), 0)
        state = tl.sum(bits, 0, keep_dims=True).to(tl.float32, bitcast=True)

        y = sum_over_states(states_of_tile * from_state, HALVINGS) + skip * inputs
        if HAS_Z:
            y *= gate
        tl.store(out + out_at, y.to(out.dtype.element_ty), there)
        out += tile

    tl.store(last_state + n[:, None] + d[None, :] * N, tl.sum(state, 0), states)
