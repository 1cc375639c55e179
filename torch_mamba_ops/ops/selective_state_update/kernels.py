"""The selective state update in Triton: one program a sequence, head and block of channels walks over the tokens with
the state in registers.

A step reads and writes each state once, so that memory sets the pace; see ``benchmarks/decode.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from torch_mamba_ops.ops.tiles import silu, softplus
from torch_mamba_ops.ops.tree_kernels import parent_of


@triton.jit
def random_bits(seed, row, n_calls, ROUNDS: tl.constexpr, CALLS: tl.constexpr):
    """16 random bits for each of CALLS * 8 places of each row, as in ``ops/rounding.py``: ``[rows, CALLS * 8]``."""
    call = row[:, None] * n_calls + tl.arange(0, CALLS)[None, :].to(tl.int64)
    low, high = (call & 0xFFFFFFFF).to(tl.uint32), (call >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, low * 0, low * 0, ROUNDS)
    # Joined from the outside in: word 0's halves, word 1's, 2's, 3's stand side by side.
    even = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    odd = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    return tl.join(even, odd).reshape(row.shape[0], CALLS * 8)


@triton.jit
def stochastic_round(values, random, DTYPE: tl.constexpr):
    """float32 to float16 or bfloat16 with 16 random bits each, as in ``ops/rounding.py``."""
    bits = values.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if tl.bfloat16 == DTYPE:
        rounded = ((bits + random) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        rounded = ((bits + (random >> 3)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        size = magnitude.to(tl.float32, bitcast=True)
        small = tl.floor(size * 16777216.0 + random.to(tl.float32) * 0.0000152587890625) * 5.9604644775390625e-08
        small = (small.to(tl.uint32, bitcast=True) | (bits & 0x80000000)).to(tl.float32, bitcast=True)
        rounded = tl.where(size < 0.00006103515625, small, rounded)
    return tl.where(magnitude < 0x7F800000, rounded, values).to(DTYPE)


@triton.jit
def read_head(
    A,
    D,
    dt_bias,
    head,
    channel,
    n,
    in_p,
    tile,
    A_HEAD: tl.constexpr,
    A_DIM: tl.constexpr,
    A_N: tl.constexpr,
    D_HEAD: tl.constexpr,
    D_DIM: tl.constexpr,
    DT_BIAS_HEAD: tl.constexpr,
    DT_BIAS_DIM: tl.constexpr,
    TIED: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr,
):
    """A head's A (a scalar if tied, else ``[P, N]``), D and dt_bias (``[P]`` or a scalar), in float32."""
    if TIED:
        rate = tl.load(A + head * A_HEAD).to(tl.float32)
    else:
        rate = tl.load(A + head * A_HEAD + channel[:, None] * A_DIM + n[None, :] * A_N, tile, 0.0).to(tl.float32)
    skip = 0.0
    if HAS_D:
        if D_DIM == 0:
            skip = tl.load(D + head * D_HEAD).to(tl.float32)
        else:
            skip = tl.load(D + head * D_HEAD + channel * D_DIM, in_p, 0.0).to(tl.float32)
    bias = 0.0
    if HAS_DT_BIAS:
        if TIED:
            bias = tl.load(dt_bias + head * DT_BIAS_HEAD).to(tl.float32)
        else:
            bias = tl.load(dt_bias + head * DT_BIAS_HEAD + channel * DT_BIAS_DIM, in_p, 0.0).to(tl.float32)
    return rate, skip, bias


@triton.jit
def read_token(
    x,
    dt,
    B,
    C,
    z,
    bias,
    channel,
    n,
    in_p,
    in_n,
    there,
    X_DIM: tl.constexpr,
    DT_DIM: tl.constexpr,
    B_N: tl.constexpr,
    C_N: tl.constexpr,
    Z_DIM: tl.constexpr,
    DT_SOFTPLUS: tl.constexpr,
    TIED: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr,
):
    """A token's x ``[P]``, step size (a scalar if tied, else ``[P]``), B and C ``[N]`` and gate, in float32; zero if it
    is not there."""
    if TIED:
        step = tl.load(dt, there, 0.0).to(tl.float32)
    else:
        step = tl.load(dt + channel * DT_DIM, in_p & there, 0.0).to(tl.float32)
    if HAS_DT_BIAS:
        step += bias
    if DT_SOFTPLUS:
        step = softplus(step)
    gate = 0.0
    if HAS_Z:
        gate = tl.load(z + channel * Z_DIM, in_p & there, 0.0).to(tl.float32)
    return (
        tl.load(x + channel * X_DIM, in_p & there, 0.0).to(tl.float32),
        step,
        tl.load(B + n * B_N, in_n & there, 0.0).to(tl.float32),
        tl.load(C + n * C_N, in_n & there, 0.0).to(tl.float32),
        gate,
    )


@triton.jit
def update(state, x, step, A, B, C, D, z, TIED: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr):
    """One token: the new state ``[P, N]`` and the output ``[P]``, all float32. ``A`` is a scalar if tied, else
    ``[P, N]``; ``D`` is ``[P]`` or a scalar."""
    if TIED:
        decay = tl.exp(step * A)
    else:
        decay = tl.exp(step[:, None] * A)
    state = state * decay + (step * x)[:, None] * B[None, :]
    y = tl.sum(state * C[None, :], axis=1)
    if HAS_D:
        y += D * x
    if HAS_Z:
        y *= silu(z)
    return state, y


@triton.jit
def replay(
    state,
    x,
    dt,
    B,
    rate,
    bias,
    parents,
    last,
    x_token,
    dt_token,
    B_token,
    parents_token,
    channel,
    n,
    in_p,
    in_n,
    X_DIM: tl.constexpr,
    DT_DIM: tl.constexpr,
    B_N: tl.constexpr,
    DT_SOFTPLUS: tl.constexpr,
    TIED: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr,
):
    """The state ``[P, N]`` after token ``last`` of a tree: ``state``, from before the step, updated along its path.

    Its tokens are computed again, where their states, if they were written, could be read again: arithmetic is to spare
    where memory sets the pace, and a state keeps the digits that its dtype in memory would cost it.
    """
    node = last * 0 - 1
    while node != last:
        # The next one down the path is found upwards, since a token knows its parent alone.
        child = last
        parent = parent_of(child, parents, parents_token)
        while parent != node:
            child = parent
            parent = parent_of(child, parents, parents_token)
        node = child
        # Without C, D and z, which make outputs.
        inputs, step, to_state, _, _ = read_token(
            x + node * x_token, dt + node * dt_token, B + node * B_token, B, x, bias, channel, n, in_p, in_n, True,
            X_DIM, DT_DIM, B_N, B_N, X_DIM, DT_SOFTPLUS, TIED, False, HAS_DT_BIAS,
        )  # fmt: skip
        state, _ = update(state, inputs, step, rate, to_state, to_state, 0.0, 0.0, TIED, False, False)
    return state


@triton.jit
def store_state(
    pool,
    values,
    at,
    slot,
    heads,
    head,
    head_dim,
    channel,
    mask,
    seed,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """Writes a tile of a slot's state; ``pool`` points to the slot and head."""
    dtype: tl.constexpr = pool.dtype.element_ty
    if STOCHASTIC:
        row = (slot * heads + head) * head_dim + channel
        random = random_bits(seed, row, (N + 7) // 8, ROUNDS, BLOCK_N // 8)
        tl.store(pool + at, stochastic_round(values, random, dtype), mask)
    else:
        tl.store(pool + at, values.to(dtype), mask)


@triton.jit(
    do_not_specialize=["pad_slot_id", "parents_row"],
    do_not_specialize_on_alignment=[
        *("read_slots", "write_slots", "cu_seqlens", "accepted", "buffer_rows", "rand_seed", "parents"),
    ],
)
def selective_state_update(
    state,
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    out,
    read_slots,
    write_slots,
    cu_seqlens,
    accepted,
    buffer,
    buffer_rows,
    rand_seed,
    parents,
    heads,
    length,
    read_columns,
    write_columns,
    pad_slot_id,
    state_slot,
    x_batch,
    x_token,
    dt_batch,
    dt_token,
    B_batch,
    B_token,
    C_batch,
    C_token,
    z_batch,
    z_token,
    out_batch,
    out_token,
    read_row,
    read_column,
    write_row,
    write_column,
    parents_row,
    parents_token,
    buffer_row,
    buffer_step,
    STATE_HEAD: tl.constexpr,
    STATE_DIM: tl.constexpr,
    STATE_N: tl.constexpr,
    X_HEAD: tl.constexpr,
    X_DIM: tl.constexpr,
    DT_HEAD: tl.constexpr,
    DT_DIM: tl.constexpr,
    A_HEAD: tl.constexpr,
    A_DIM: tl.constexpr,
    A_N: tl.constexpr,
    B_GROUP: tl.constexpr,
    B_N: tl.constexpr,
    C_GROUP: tl.constexpr,
    C_N: tl.constexpr,
    D_HEAD: tl.constexpr,
    D_DIM: tl.constexpr,
    Z_HEAD: tl.constexpr,
    Z_DIM: tl.constexpr,
    DT_BIAS_HEAD: tl.constexpr,
    DT_BIAS_DIM: tl.constexpr,
    OUT_HEAD: tl.constexpr,
    OUT_DIM: tl.constexpr,
    BUFFER_HEAD: tl.constexpr,
    BUFFER_DIM: tl.constexpr,
    BUFFER_N: tl.constexpr,
    head_dim: tl.constexpr,
    N: tl.constexpr,
    RATIO: tl.constexpr,
    ROUNDS: tl.constexpr,
    DT_SOFTPLUS: tl.constexpr,
    TIED: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_ACCEPTED: tl.constexpr,
    WRITE: tl.constexpr,
    ELSEWHERE: tl.constexpr,
    PACKED: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
    HAS_BUFFER: tl.constexpr,
    HAS_BUFFER_ROWS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    HAS_PARENTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: blocks of channels, heads, sequences. ``WRITE`` is "none", "last" (the state after the last token, to one
    slot a sequence) or "each" (the state after each token, to its column's slot); ``ELSEWHERE``: not to the slot read.

    Sequences and slots are counted in 64 bits, tiles in 32: with 64 bits a tile's addresses cost more than its numbers.
    """
    head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    group = head // RATIO
    channel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    # Constant where tiles fit, so that nothing is masked.
    in_p = tl.full((BLOCK_P,), True, tl.int1)
    in_n = tl.full((BLOCK_N,), True, tl.int1)
    if head_dim % BLOCK_P != 0:
        in_p = channel < head_dim
    if N != BLOCK_N:
        in_n = n < N
    tile = in_p[:, None] & in_n[None, :]

    first = sequence * 0
    tokens = length
    batch = sequence
    if PACKED:
        first = tl.load(cu_seqlens + sequence).to(tl.int64)
        tokens = (tl.load(cu_seqlens + sequence + 1) - first).to(tl.int32)
        batch = sequence * 0
        if tokens <= 0:
            return
    x += batch * x_batch + first * x_token + head * X_HEAD
    dt += batch * dt_batch + first * dt_token + head * DT_HEAD
    B += batch * B_batch + first * B_token + group * B_GROUP
    C += batch * C_batch + first * C_token + group * C_GROUP
    out += batch * out_batch + first * out_token + head * OUT_HEAD
    if HAS_Z:
        z += batch * z_batch + first * z_token + head * Z_HEAD

    slot = sequence
    if HAS_SLOTS:
        column = 0
        if HAS_ACCEPTED:
            column = tl.minimum(tl.maximum(tl.load(accepted + sequence).to(tl.int32) - 1, 0), read_columns - 1)
        slot = tl.load(read_slots + sequence * read_row + column * read_column).to(tl.int64)
    # While the slot is on its way, so that all but the state is ready when the state comes.
    rate, skip, bias = read_head(
        A, D, dt_bias, head, channel, n, in_p, tile, A_HEAD, A_DIM, A_N, D_HEAD, D_DIM, DT_BIAS_HEAD, DT_BIAS_DIM,
        TIED, HAS_D, HAS_DT_BIAS,
    )  # fmt: skip
    inputs, step, to_state, from_state, gate = read_token(
        x, dt, B, C, z, bias, channel, n, in_p, in_n, True,
        X_DIM, DT_DIM, B_N, C_N, Z_DIM, DT_SOFTPLUS, TIED, HAS_Z, HAS_DT_BIAS,
    )  # fmt: skip

    if HAS_SLOTS:
        if slot == pad_slot_id:
            for _ in range(tokens):
                tl.store(out + channel * OUT_DIM, tl.zeros((BLOCK_P,), out.dtype.element_ty), in_p)
                out += out_token
            return

    state += head * STATE_HEAD
    at = channel[:, None] * STATE_DIM + n[None, :] * STATE_N
    values = tl.load(state + slot * state_slot + at, tile, 0.0).to(tl.float32)
    seed = 0
    if STOCHASTIC:
        seed = tl.load(rand_seed)
    if HAS_BUFFER:
        row = sequence
        keep = row >= 0
        if HAS_BUFFER_ROWS:
            row = tl.load(buffer_rows + sequence).to(tl.int64)
            keep = row != pad_slot_id
        buffer += row * buffer_row + head * BUFFER_HEAD
        buffer_at = channel[:, None] * BUFFER_DIM + n[None, :] * BUFFER_N

    if HAS_PARENTS:
        parents += batch * parents_row + first * parents_token
        before, first_x, first_dt, first_B = values, x, dt, B

    for token in range(1 if ONE_TOKEN else tokens):
        if HAS_PARENTS:
            node = sequence * 0 + token
            parent = parent_of(node, parents, parents_token)
            if parent != node - 1:
                values = replay(
                    before, first_x, first_dt, first_B, rate, bias, parents, parent, x_token, dt_token, B_token,
                    parents_token, channel, n, in_p, in_n, X_DIM, DT_DIM, B_N, DT_SOFTPLUS, TIED, HAS_DT_BIAS,
                )  # fmt: skip
        values, y = update(values, inputs, step, rate, to_state, from_state, skip, gate, TIED, HAS_D, HAS_Z)
        tl.store(out + channel * OUT_DIM, y.to(out.dtype.element_ty), in_p)
        out += out_token
        if not ONE_TOKEN:
            x += x_token
            dt += dt_token
            B += B_token
            C += C_token
            if HAS_Z:
                z += z_token
            inputs, step, to_state, from_state, gate = read_token(
                x, dt, B, C, z, bias, channel, n, in_p, in_n, token + 1 < tokens,
                X_DIM, DT_DIM, B_N, C_N, Z_DIM, DT_SOFTPLUS, TIED, HAS_Z, HAS_DT_BIAS,
            )  # fmt: skip
        if HAS_BUFFER:
            tl.store(buffer + buffer_at, values.to(buffer.dtype.element_ty), tile & keep)
            buffer += buffer_step
        if WRITE == "each":
            if token < write_columns:
                slot = tl.load(write_slots + sequence * write_row + token * write_column).to(tl.int64)
                wanted = tile & (slot != pad_slot_id)
                pool = state + slot * state_slot
                store_state(
                    pool, values, at, slot, heads, head, head_dim, channel, wanted, seed, N, BLOCK_N, STOCHASTIC, ROUNDS
                )

    if WRITE == "last":
        wanted = tile
        if ELSEWHERE:
            slot = tl.load(write_slots + sequence * write_row).to(tl.int64)
            wanted = tile & (slot != pad_slot_id)
        pool = state + slot * state_slot
        store_state(
            pool, values, at, slot, heads, head, head_dim, channel, wanted, seed, N, BLOCK_N, STOCHASTIC, ROUNDS
        )
