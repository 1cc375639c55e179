"""The state space dual scan in Triton, by two kernels: what chunks of tokens need is prepared for all at once, then one
program a sequence, head and block of channels walks over its chunks with the state in registers, so that no chunk's
state is ever written.

Dao and Gu, "Transformers are SSMs" (2024), section 6. A sequence's result depends on nothing else in the batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from torch_mamba_ops.ops.tiles import LOG2_E, silu, softplus


@triton.jit
def factor(values, PRODUCT: tl.constexpr, INTERPRETED: tl.constexpr):
    """A factor of a matrix product in the dtype of products. Triton's interpreter multiplies bfloat16's bits as
    integers, so there it is widened again."""
    values = values.to(PRODUCT)
    if INTERPRETED:
        values = values.to(tl.float32)
    return values


@triton.jit
def multiply(values, scale, PRODUCT: tl.constexpr, INTERPRETED: tl.constexpr):
    """Scales what becomes a factor of a matrix product. A float32 one is then split by a subtraction, which must not be
    joined with this multiplication into one rounding: whether it is differs from loop to loop."""
    if PRODUCT == tl.float32 and not INTERPRETED:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [values, scale], dtype=tl.float32, is_pure=True, pack=1
        )
    return values * scale


@triton.jit
def is_mild(total, PRODUCT: tl.constexpr):
    """Whether so little decays in a chunk, in powers of two, that it may be split at its middle: half of it leaves room
    for sums of products, and costs no more digits than products of that dtype have to lose. All of it, by which a state
    is multiplied between two chunks, is far from the numbers that have fewer digits (2^-126)."""
    limit: tl.constexpr = -100.0 if PRODUCT == tl.bfloat16 else -16.0
    return total > limit


@triton.jit
def middle_of(total):
    """Where a mild chunk's decay is split. A whole power of two: the state is multiplied with it without rounding, so a
    sequence has the same bits whether or not its state was stored between two chunks."""
    return tl.floor(0.5 * total)


@triton.jit
def first_chunk(start, sequence, CHUNK: tl.constexpr):
    """The number of a packed sequence's first chunk: each has room for its chunks, wherever they are cut. ``start``,
    its first token, is no pointer: torch takes one for written if what a function makes of it becomes an address."""
    return start.to(tl.int64) // CHUNK + 2 * sequence


@triton.jit(
    do_not_specialize=["length", "sequences", "row_chunks"],
    do_not_specialize_on_alignment=["cu_seqlens", "computed", "seq_idx"],
)
def prepare(
    dt,
    A,
    B,
    C,
    dt_bias,
    totals,
    decays,
    scales,
    scores,
    cu_seqlens,
    computed,
    seq_idx,
    length,
    sequences,
    row_chunks,
    dt_min,
    dt_max,
    dt_batch,
    dt_token,
    B_batch,
    B_token,
    C_batch,
    C_token,
    seq_idx_batch,
    seq_idx_token,
    DT_HEAD: tl.constexpr,
    A_HEAD: tl.constexpr,
    B_GROUP: tl.constexpr,
    B_N: tl.constexpr,
    C_GROUP: tl.constexpr,
    C_N: tl.constexpr,
    DT_BIAS_HEAD: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    RATIO: tl.constexpr,
    CHUNK: tl.constexpr,
    DT_SOFTPLUS: tl.constexpr,
    HAS_DT_MIN: tl.constexpr,
    HAS_DT_MAX: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr,
    HAS_SEQ_IDX: tl.constexpr,
    HAS_COMPUTED: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Grid: chunks, groups, blocks of a group's heads. Writes what the tokens of a chunk are to the heads.

    ``totals`` ``[heads, chunks]`` are the decays over whole chunks, as logarithms to base 2. ``scales`` ``[chunks,
    heads, 2, Q]`` are what x and the outputs are multiplied with. ``scores`` ``[groups + heads, tokens, Q]`` are C
    times B of a token and those of its chunk that it sees: each group's, then each head's own. In a mild chunk the
    decay between two tokens is split at the middle between none and all of the chunk's: a part goes with x, the other
    with the output, and a group's heads share its scores.

    In a steep chunk own scores are written, times the decay between the two tokens, an exponential each. They are taken
    here, for all chunks at once: in the scan every later chunk would wait for them. ``decays`` ``[chunks, heads, 2,
    Q]``, written for such chunks only, are what is left of the state before the chunk at each token, and of each
    token's step after the last one.
    """
    chunk = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    if PACKED:
        # The last sequence whose first chunk is not after this one.
        low = chunk * 0
        high = low + sequences - 1
        while low < high:
            middle = (low + high + 1) // 2
            if first_chunk(tl.load(cu_seqlens + middle), middle, CHUNK) <= chunk:
                low = middle
            else:
                high = middle - 1
        sequence = low
        batch = sequence * 0
        first = tl.load(cu_seqlens + sequence).to(tl.int64)
        local = (chunk - first_chunk(first, sequence, CHUNK)) * CHUNK
        tokens = tl.load(cu_seqlens + sequence + 1) - first
        if HAS_COMPUTED:
            local -= tl.load(computed + sequence) % CHUNK
    else:
        batch = chunk // row_chunks
        local = chunk % row_chunks * CHUNK
        first = local * 0
        tokens = first + length
    if local >= tokens:
        return

    place = tl.arange(0, BLOCK_Q)
    inside = (local + place >= 0) & (local + place < tokens)
    if CHUNK < BLOCK_Q:
        inside = inside & (place < CHUNK)
    row = first + local

    nth = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    heads = group * RATIO + nth
    ours = nth < RATIO
    at = dt + batch * dt_batch + row * dt_token + (place[:, None] * dt_token + heads[None, :] * DT_HEAD)
    step = tl.load(at, inside[:, None] & ours[None, :], 0.0).to(tl.float32)
    if HAS_DT_BIAS:
        step += tl.load(dt_bias + heads * DT_BIAS_HEAD, ours, 0.0).to(tl.float32)[None, :]
    if DT_SOFTPLUS:
        step = softplus(step)
    if HAS_DT_MIN:
        step = tl.maximum(step, dt_min)
    if HAS_DT_MAX:
        step = tl.minimum(step, dt_max)
    step = tl.where(inside[:, None], step, 0.0)
    rate = tl.load(A + heads * A_HEAD, ours, 0.0).to(tl.float64) * LOG2_E
    decay = tl.cumsum(step.to(tl.float64) * rate[None, :], 0)
    total = tl.sum(tl.where(place[:, None] == BLOCK_Q - 1, decay, 0.0), 0)
    remaining = total[None, :] - decay
    visible = place[:, None] >= place[None, :]
    if HAS_SEQ_IDX:
        seq_idx += batch * seq_idx_batch + row * seq_idx_token
        carried = tl.load(seq_idx + tl.maximum(-local, -1) * seq_idx_token)
        last = tl.load(seq_idx + (tl.minimum(tokens - local, CHUNK) - 1) * seq_idx_token)
        own = tl.load(seq_idx + place * seq_idx_token, inside, last)
        visible = visible & (own[:, None] == own[None, :])
        # Nothing is left of the state: no chunk with tokens of two sequences is mild, as none comes back.
        total = tl.where(last == carried, total, -float("inf"))
    product: tl.constexpr = scores.dtype.element_ty
    mild = is_mild(total.to(tl.float32), product)
    steep = ours & (mild == 0)
    middle = tl.where(mild, middle_of(total.to(tl.float32)), 0.0).to(tl.float64)
    from_middle = tl.where(mild[None, :], decay - middle[None, :], 0.0).to(tl.float32)
    tl.store(totals + heads * tl.num_programs(0) + chunk, total.to(tl.float32), ours)
    at = (chunk * GROUPS * RATIO + heads[None, :]) * 2 * BLOCK_Q + place[:, None]
    tl.store(scales + at, step * tl.exp2(-from_middle), ours[None, :])
    tl.store(scales + (at + BLOCK_Q), tl.exp2(from_middle), ours[None, :])

    any_steep = tl.max(steep.to(tl.int32), 0) != 0
    if (tl.program_id(2) == 0) | any_steep:
        n = tl.arange(0, BLOCK_N)
        shared = inside[:, None] & (n < N)[None, :]
        B += batch * B_batch + row * B_token + group * B_GROUP
        C += batch * C_batch + row * C_token + group * C_GROUP
        Bs = factor(tl.load(B + (place[:, None] * B_token + n[None, :] * B_N), shared, 0.0), product, INTERPRETED)
        Cs = factor(tl.load(C + (place[:, None] * C_token + n[None, :] * C_N), shared, 0.0), product, INTERPRETED)
        seen = tl.where(visible, tl.dot(Cs, tl.trans(Bs), input_precision=PRECISION), 0.0)
        pairs = scores + (batch * length + row) * BLOCK_Q + (place[:, None] * BLOCK_Q + place[None, :])
        matrix = (batch * 0 + length) * BLOCK_Q
        if not PACKED:
            matrix *= sequences
        if tl.program_id(2) == 0:
            tl.store(pairs + group * matrix, seen.to(product), inside[:, None])
        if any_steep:
            from_before = tl.exp2(decay.to(tl.float32))
            to_end = step * tl.exp2(remaining.to(tl.float32))
            if HAS_SEQ_IDX:
                from_before = tl.where((own == carried)[:, None], from_before, 0.0)
                to_end = tl.where((own == last)[:, None], to_end, 0.0)
            tl.store(decays + at, from_before, steep[None, :])
            tl.store(decays + (at + BLOCK_Q), to_end, steep[None, :])
            # Apart, as together a large decay would have few digits left for the small one between two tokens.
            whole = tl.floor(decay)
            fraction = (decay - whole).to(tl.float32)
            whole = whole.to(tl.float32)
            for i in range(BLOCK_H):
                this = tl.arange(0, BLOCK_H) == i
                if tl.max((this & steep).to(tl.int32), 0) != 0:
                    wholes = tl.sum(tl.where(this[None, :], whole, 0.0), 1)
                    fractions = tl.sum(tl.where(this[None, :], fraction, 0.0), 1)
                    between = (wholes[:, None] - wholes[None, :]) + (fractions[:, None] - fractions[None, :])
                    # Where a token does not see another, it would grow.
                    between = tl.exp2(tl.minimum(between, 0.0))
                    head = group * RATIO + tl.program_id(2) * BLOCK_H + i
                    tl.store(pairs + (GROUPS + head) * matrix, (seen * between).to(product), inside[:, None])


@triton.jit
def add_product(added, left, right, TURNED: tl.constexpr, PRECISION: tl.constexpr):
    """``added`` and the matrix product of the factors. ``TURNED``: by the transposed factors in the other order, as a
    matrix unit takes only its first one from registers."""
    if TURNED:
        return tl.trans(tl.dot(tl.trans(right), tl.trans(left), acc=tl.trans(added), input_precision=PRECISION))
    return tl.dot(left, right, acc=added, input_precision=PRECISION)


@triton.jit
def scan_chunk(
    state,
    pending,
    x,
    B,
    C,
    scores,
    to_middle,
    total,
    from_before,
    to_end,
    ALL_MILD: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """One chunk: the outputs ``[Q, P]`` before their scale, skip connection and gate; the state ``[N, P]``, and what it
    is still to be multiplied with.

    ``x`` is ``[Q, P]``, ``B`` and ``C`` are ``[Q, N]``, ``scores`` ``[Q, Q]``, ``to_middle`` ``[Q]``, ``total`` is the
    chunk's decay. ``from_before`` and ``to_end`` ``[Q]`` are a steep chunk's decays (see `prepare`); of a mild one, 1
    and ``to_middle``: it has the same bits as with ``ALL_MILD``.
    """
    x = x.to(tl.float32)
    inputs = factor(multiply(x, to_middle[:, None], PRODUCT, INTERPRETED), PRODUCT, INTERPRETED)
    y = tl.zeros((BLOCK_Q, state.shape[1]), tl.float32)
    added = inputs
    middle = middle_of(total)
    if not ALL_MILD:
        mild = is_mild(total, PRODUCT)
        middle = tl.where(mild, middle, 0.0)
    state = multiply(state, pending * tl.exp2(middle), PRODUCT, INTERPRETED)
    y = add_product(y, C, factor(state, PRODUCT, INTERPRETED), TURNED, PRECISION)
    if not ALL_MILD:
        # Not in one with what is pending: a sequence that was cut here has that behind it, rounded.
        state = multiply(state, tl.where(mild, 1.0, tl.exp2(total)), PRODUCT, INTERPRETED)
        y *= from_before[:, None]
        added = factor(multiply(x, to_end[:, None], PRODUCT, INTERPRETED), PRODUCT, INTERPRETED)
    pending = tl.exp2(total - middle)
    if not ALL_MILD:
        pending = tl.where(mild, pending, 1.0)
    y = add_product(y, factor(scores, PRODUCT, INTERPRETED), inputs, TURNED, PRECISION)
    state = add_product(state, tl.trans(B), added, TURNED, PRECISION)
    return y, state, pending


@triton.jit
def store_zeros(out, first, last, columns, mask, TOKEN: tl.constexpr, BLOCK: tl.constexpr):
    """Zero for the tokens from ``first`` to before ``last``."""
    for token in range(first, last, BLOCK):
        row = token + tl.arange(0, BLOCK).to(tl.int64)
        tile = out + row[:, None] * TOKEN + columns[None, :]
        tl.store(tile, tl.zeros(tile.shape, out.dtype.element_ty), (row < last)[:, None] & mask[None, :])


@triton.jit(
    do_not_specialize=["length", "sequences", "row_chunks", "all_chunks", "pad_slot_id"],
    do_not_specialize_on_alignment=["cu_seqlens", "slots", "has_initial", "computed"],
)
def scan(
    x,
    B,
    C,
    D,
    z,
    out,
    totals,
    decays,
    scales,
    scores,
    initial,
    final,
    row_final,
    cu_seqlens,
    slots,
    has_initial,
    computed,
    length,
    sequences,
    row_chunks,
    all_chunks,
    pad_slot_id,
    x_batch,
    x_token,
    B_batch,
    B_token,
    C_batch,
    C_token,
    z_batch,
    z_token,
    out_batch,
    initial_slot,
    final_slot,
    X_HEAD: tl.constexpr,
    X_DIM: tl.constexpr,
    B_GROUP: tl.constexpr,
    B_N: tl.constexpr,
    C_GROUP: tl.constexpr,
    C_N: tl.constexpr,
    D_HEAD: tl.constexpr,
    D_DIM: tl.constexpr,
    Z_HEAD: tl.constexpr,
    Z_DIM: tl.constexpr,
    OUT_TOKEN: tl.constexpr,
    INITIAL_HEAD: tl.constexpr,
    INITIAL_DIM: tl.constexpr,
    INITIAL_N: tl.constexpr,
    FINAL_HEAD: tl.constexpr,
    FINAL_DIM: tl.constexpr,
    FINAL_N: tl.constexpr,
    HEADS: tl.constexpr,
    head_dim: tl.constexpr,
    N: tl.constexpr,
    RATIO: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_COMPUTED: tl.constexpr,
    PACKED: tl.constexpr,
    POOL: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: blocks of channels, heads, sequences.

    ``INITIAL`` says which sequences start from a state: "none", "all", "first" or "flagged". With ``POOL`` states are
    a pool's: a sequence without tokens leaves its slot alone; without, ``row_final`` of a packed row receives the state
    after its last token. Sequences, tokens and slots are counted in 64 bits, tiles in 32.
    """
    PRODUCT: tl.constexpr = scores.dtype.element_ty
    # A matrix unit takes 64 rows of registers. By pointers it is slower: tiles lie in shared memory the other way.
    TURNED: tl.constexpr = TMA and BLOCK_P >= 64
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
    out += head * head_dim

    batch = sequence
    first = sequence * 0
    tokens = length
    chunk = sequence * row_chunks
    if PACKED:
        batch = sequence * 0
        start = tl.load(cu_seqlens).to(tl.int64)
        stop = tl.load(cu_seqlens + sequences).to(tl.int64)
        first = tl.load(cu_seqlens + sequence).to(tl.int64)
        tokens = (tl.load(cu_seqlens + sequence + 1) - first).to(tl.int32)
        chunk = first_chunk(first, sequence, CHUNK)
        # Tokens of no sequence.
        if sequence == 0:
            store_zeros(out, 0, start, channel, in_p, OUT_TOKEN, BLOCK_Q)
        if sequence == sequences - 1:
            store_zeros(out, stop, length, channel, in_p, OUT_TOKEN, BLOCK_Q)
    out += batch * out_batch

    slot = sequence
    if HAS_SLOTS:
        slot = tl.load(slots + sequence).to(tl.int64)
        if slot == pad_slot_id:
            store_zeros(out, first, first + tokens, channel, in_p, OUT_TOKEN, BLOCK_Q)
            return
    if POOL:
        if tokens <= 0:
            return

    state = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    tile = in_n[:, None] & in_p[None, :]
    if INITIAL != "none":
        starts = True
        if INITIAL == "first":
            starts = sequence == 0
        if INITIAL == "flagged":
            starts = tl.load(has_initial + sequence) != 0
        initial += slot * initial_slot + head * INITIAL_HEAD
        inner = channel[None, :] * INITIAL_DIM + n[:, None] * INITIAL_N
        state = tl.load(initial + inner, tile & starts, 0.0).to(tl.float32)

    if HAS_D:
        skip = tl.load(D + head * D_HEAD + channel * D_DIM, in_p, 0.0).to(tl.float32)
    offset = 0  # places of the first chunk that a call before this one has filled
    if HAS_COMPUTED:
        offset = (tl.load(computed + sequence) % CHUNK).to(tl.int32)

    x += batch * x_batch + head * X_HEAD
    B += batch * B_batch + group * B_GROUP
    C += batch * C_batch + group * C_GROUP
    if HAS_Z:
        z += batch * z_batch + head * Z_HEAD
    place = tl.arange(0, BLOCK_Q)
    decays += (chunk * HEADS + head) * 2 * BLOCK_Q
    scales += (chunk * HEADS + head) * 2 * BLOCK_Q
    to_middle_at = scales + place
    totals += head * all_chunks + chunk
    score_rows = length  # of a group or head
    if not PACKED:
        score_rows *= sequences
    score_row = (batch * length + first).to(tl.int32)
    if TMA:
        # Made at the sequence's first token: the rows before and after the sequence are read as zeros and not written.
        rows = tl.maximum(tokens, 1)
        x_tiles = tl.make_tensor_descriptor(x + first * x_token, [rows, head_dim], [x_token, 1], [BLOCK_Q, BLOCK_P])
        B_tiles = tl.make_tensor_descriptor(B + first * B_token, [rows, N], [B_token, 1], [BLOCK_Q, BLOCK_N])
        C_tiles = tl.make_tensor_descriptor(C + first * C_token, [rows, N], [C_token, 1], [BLOCK_Q, BLOCK_N])
        # Tokens of other sequences are read here, too: what comes of them is of rows that are not written.
        score_tiles = tl.make_tensor_descriptor(
            scores, [tl.maximum(score_rows, 1) * (HEADS // RATIO + HEADS), BLOCK_Q], [BLOCK_Q, 1], [BLOCK_Q, BLOCK_Q]
        )
        out_tiles = tl.make_tensor_descriptor(
            out + first * OUT_TOKEN, [rows, head_dim], [OUT_TOKEN, 1], [BLOCK_Q, BLOCK_P]
        )

    lowest = 0.0
    for nth in range(0, tl.cdiv(tokens + offset, CHUNK), 128):
        ahead = nth + tl.arange(0, 128)
        there = ahead < tl.cdiv(tokens + offset, CHUNK)
        lowest = tl.minimum(lowest, tl.min(tl.load(totals + ahead, there, 0.0), 0))
    all_mild = is_mild(lowest, PRODUCT)
    pending = 1.0
    # Compiled twice: with no steep chunk, two products share a factor and a barrier.
    for ALL_MILD in tl.static_range(2):
        if all_mild == (ALL_MILD == 1):
            from_middle = tl.load(scales + (BLOCK_Q + place), (place < BLOCK_Q) & (tokens > -offset), 0.0)
            total = tl.load(totals, tokens > -offset, 0.0)
            from_before = tl.full((BLOCK_Q,), 1.0, tl.float32)
            if ALL_MILD == 0:
                from_before = tl.load(decays + place, (place < BLOCK_Q) & (is_mild(total, PRODUCT) == 0), 1.0)
            for begin in range(-offset, tokens, CHUNK):
                inside = begin + place < tokens
                if HAS_COMPUTED:
                    inside = inside & (begin + place >= 0)
                if CHUNK < BLOCK_Q:
                    inside = inside & (place < CHUNK)
                row = first + begin
                there = inside[:, None] & in_p[None, :]
                matrix = group
                if ALL_MILD == 0:
                    mild = is_mild(total, PRODUCT)
                    matrix = tl.where(mild, group, HEADS // RATIO + head)
                    to_middle = tl.load(to_middle_at)
                    to_end = tl.load(decays + (BLOCK_Q + place), (place < BLOCK_Q) & (mild == 0), 0.0)
                    to_end = tl.where(mild, to_middle, to_end)
                if TMA:
                    xs = x_tiles.load([begin, tl.program_id(0) * BLOCK_P])
                    Bs = B_tiles.load([begin, 0])
                    Cs = C_tiles.load([begin, 0])
                    pairs = score_tiles.load([matrix * score_rows + score_row + begin, 0])
                else:
                    shared = inside[:, None] & in_n[None, :]
                    xs = tl.load(x + row * x_token + (place[:, None] * x_token + channel[None, :] * X_DIM), there, 0.0)
                    Bs = tl.load(B + row * B_token + (place[:, None] * B_token + n[None, :] * B_N), shared, 0.0)
                    Cs = tl.load(C + row * C_token + (place[:, None] * C_token + n[None, :] * C_N), shared, 0.0)
                    score_at = scores + (matrix.to(tl.int64) * score_rows + score_row + begin) * BLOCK_Q
                    pairs = tl.load(score_at + (place[:, None] * BLOCK_Q + place[None, :]), inside[:, None], 0.0)
                if ALL_MILD == 1:  # after the tiles, with steep chunks before: 3% and 8% faster than the other way
                    to_middle = tl.load(to_middle_at)
                    to_end = to_middle
                y, state, pending = scan_chunk(
                    state, pending, xs, factor(Bs, PRODUCT, INTERPRETED), factor(Cs, PRODUCT, INTERPRETED), pairs,
                    to_middle, total, from_before, to_end, ALL_MILD == 1, PRODUCT, PRECISION, INTERPRETED, TURNED,
                    BLOCK_Q,
                )  # fmt: skip
                y *= from_middle[:, None]
                totals += 1
                decays += 2 * HEADS * BLOCK_Q
                scales += 2 * HEADS * BLOCK_Q
                to_middle_at += 2 * HEADS * BLOCK_Q
                if HAS_D:
                    # As one rounding, whatever the compiler does in this loop and in the other.
                    y = tl.fma(tl.broadcast_to(skip[None, :], y.shape), xs.to(tl.float32), y)
                if HAS_Z:
                    gates = z + row * z_token + (place[:, None] * z_token + channel[None, :] * Z_DIM)
                    y *= silu(tl.load(gates, there, 0.0).to(tl.float32))
                if TMA and not HAS_COMPUTED:  # else a chunk may begin before row 0, where a store by TMA traps (sm_90)
                    out_tiles.store([begin, tl.program_id(0) * BLOCK_P], y.to(out.dtype.element_ty))
                else:
                    written = out + row * OUT_TOKEN + (place[:, None] * OUT_TOKEN + channel[None, :])
                    tl.store(written, y.to(out.dtype.element_ty), there)
                # A chunk ahead, as the compiler's pipeline does not take loads that no product takes, and one number is
                # not worth its barrier; at the end, or reads of shared memory wait for them.
                from_middle = tl.load(scales + (BLOCK_Q + place), (place < BLOCK_Q) & (begin + CHUNK < tokens), 0.0)
                total = tl.load(totals, begin + CHUNK < tokens, 0.0)
                if ALL_MILD == 0:
                    from_before = tl.load(decays + place, (place < BLOCK_Q) & (is_mild(total, PRODUCT) == 0), 1.0)
    state *= pending

    if HAS_FINAL:
        inner = channel[None, :] * FINAL_DIM + n[:, None] * FINAL_N
        values = state.to(final.dtype.element_ty)
        tl.store(final + slot * final_slot + head * FINAL_HEAD + inner, values, tile)
        if PACKED and not POOL:
            last = (first + tokens == stop) & ((tokens > 0) | ((start == stop) & (sequence == 0)))
            tl.store(row_final + head * FINAL_HEAD + inner, values, tile & last)
