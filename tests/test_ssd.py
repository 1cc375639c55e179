"""What the cases do not say about the state space dual scans: bad input, that every way of cutting a text agrees, that
strong decays keep their digits, and that what one sequence holds never reaches another."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import torch_mamba_ops as tmo
from torch_mamba_ops.testing import check

H, P, N, G, Q, SLOTS = 4, 6, 5, 2, 8, 7
Arguments = dict[str, Any]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _tokens(*shape: int) -> Arguments:
    return {
        "x": torch.randn(*shape, H, P),
        "dt": torch.randn(*shape, H),
        "B": torch.randn(*shape, G, N),
        "C": torch.randn(*shape, G, N),
        "z": torch.randn(*shape, H, P),
    }


def _heads() -> Arguments:
    return {
        "A": -torch.rand(H) - 1,
        "D": torch.randn(H),
        "dt_bias": torch.rand(H) - 4,
        "dt_softplus": True,
        "chunk_size": Q,
    }


def _part(tokens: Arguments, *index: Any) -> Arguments:
    return {name: tensor[index] for name, tensor in tokens.items()}


def _scan(**arguments: Any) -> tuple[Tensor, Tensor]:
    out, states = tmo.mamba_chunk_scan_combined(**arguments, return_final_states=True)
    return out, states


# --- the same text, cut differently ---


@pytest.mark.parametrize("length", [1, 7, 8, 9, 21, 64])
def test_the_chunk_size_changes_nothing(length: int) -> None:
    tokens, heads, first = _tokens(2, length), _heads(), torch.randn(2, H, P, N)
    want = _scan(**tokens, **heads, initial_states=first)
    for chunk_size in (1, 2, 4, 16, 32, 256):
        got = _scan(**tokens, **heads | {"chunk_size": chunk_size}, initial_states=first)
        assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cuts", [(0, 1, 21), (0, 8, 21), (0, 13, 21), (0, 3, 3, 10, 20, 21)])
def test_a_text_in_pieces_with_the_state_carried_equals_the_whole(cuts: tuple[int, ...]) -> None:
    tokens, heads, state = _tokens(2, 21), _heads(), torch.randn(2, H, P, N)
    want, want_state = _scan(**tokens, **heads, initial_states=state)
    pieces = []
    for begin, end in pairwise(cuts):
        piece, state = _scan(**_part(tokens, slice(None), slice(begin, end)), **heads, initial_states=state)
        pieces.append(piece)
    assert_close((torch.cat(pieces, 1), state), (want, want_state), rtol=1e-4, atol=1e-5)


def test_sequences_in_a_row_equal_separate_ones() -> None:
    bounds, heads, first = (0, 5, 14, 21), _heads(), torch.randn(1, H, P, N)
    tokens = _tokens(1, 21)
    owner = _ints(*[3] * 5, *[4] * 9, *[7] * 7).unsqueeze(0)
    got, got_state = _scan(**tokens, **heads, seq_idx=owner, initial_states=first)
    want = [
        _scan(**_part(tokens, slice(None), slice(begin, end)), **heads, initial_states=first if begin == 0 else None)
        for begin, end in pairwise(bounds)
    ]
    assert_close(got, torch.cat([out for out, _ in want], 1), rtol=1e-4, atol=1e-5)
    assert_close(got_state, want[-1][1], rtol=1e-4, atol=1e-5)


def test_dense_with_sequences_equals_packed_equals_separate() -> None:
    starts, heads, tokens = (0, 5, 5, 16, 21), _heads(), _tokens(21)
    rows = _part(tokens, None)
    out, last, states = tmo.mamba_chunk_scan_combined(
        **rows, **heads, cu_seqlens=_ints(*starts), return_final_states=True, return_varlen_states=True
    )
    pool = torch.full((4, H, P, N), 7.0)
    packed = tmo.mamba_chunk_scan_combined_varlen(**tokens, **heads, cu_seqlens=_ints(*starts), states=pool)
    assert torch.equal(packed, out[0]) and torch.equal(last[0], states[3])
    assert pool[1].eq(7).all(), "an empty sequence leaves its slot alone"
    assert states[1].eq(0).all()
    for i, (begin, end) in enumerate(pairwise(starts)):
        if begin == end:
            continue
        want, want_state = _scan(**_part(rows, slice(None), slice(begin, end)), **heads)
        assert_close(packed[begin:end], want[0], rtol=1e-4, atol=1e-5)
        assert_close(pool[i], want_state[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(pool[i], states[i])


@pytest.mark.parametrize("cut", [1, 5, 8, 16])
def test_prompts_prefilled_in_two_steps_equal_one(cut: int) -> None:
    lengths, heads, slots = (20, 17), _heads(), _ints(4, 2)
    texts = [_tokens(length) for length in lengths]
    dirty = torch.randn(SLOTS, H, P, N)  # an earlier request's states must not leak into a new one

    def prefill(pool: Tensor, parts: list[Arguments], known: int) -> list[Tensor]:
        sizes = [part["x"].shape[0] for part in parts]
        out = tmo.mamba_chunk_scan_combined_varlen(
            **{name: torch.cat([part[name] for part in parts]) for name in parts[0]},
            **heads,
            cu_seqlens=_ints(0, sizes[0], sum(sizes)),
            states=pool,
            state_indices=slots,
            has_initial_state=torch.tensor([known > 0] * 2),
            num_computed_tokens=_ints(known, known),
        )
        return list(out.split(sizes))

    whole, pieces = dirty.clone(), dirty.clone()
    want = prefill(whole, texts, 0)
    one = prefill(pieces, [_part(text, slice(0, cut)) for text in texts], 0)
    two = prefill(pieces, [_part(text, slice(cut, None)) for text in texts], cut)
    for a, b, text in zip(one, two, want, strict=True):
        assert_close(torch.cat([a, b]), text, rtol=1e-4, atol=1e-5)
    assert_close(pieces, whole, rtol=1e-4, atol=1e-5)
    untouched = [slot for slot in range(SLOTS) if slot not in (4, 2)]
    assert torch.equal(pieces[untouched], dirty[untouched])


def test_one_token_at_a_time_equals_the_scan() -> None:
    tokens, heads = _tokens(2, 11), _heads()
    want, want_state = _scan(**tokens, **heads)
    state = torch.zeros(2, H, P, N)
    A, D, bias = (heads[n] for n in ("A", "D", "dt_bias"))
    for t in range(11):
        token = _part(tokens, slice(None), t)
        got = tmo.selective_state_update(
            state,
            token["x"],
            token["dt"][..., None].expand(2, H, P),
            A[:, None, None].expand(H, P, N),
            token["B"],
            token["C"],
            D[:, None].expand(H, P),
            token["z"],
            bias[:, None].expand(H, P),
            True,
        )
        assert_close(got, want[:, t], rtol=1e-4, atol=1e-5)
    assert_close(state, want_state, rtol=1e-4, atol=1e-5)


# --- options ---


def test_skip_by_head_equals_skip_by_channel_and_heads_of_a_group_share_projections() -> None:
    tokens, heads = _tokens(2, 13), _heads()
    want = _scan(**tokens, **heads)
    by_channel = heads | {"D": heads["D"][:, None].expand(H, P).clone()}
    assert_close(_scan(**tokens, **by_channel), want)
    repeated = {name: tokens[name].repeat_interleave(H // G, 2) for name in ("B", "C")}
    assert_close(_scan(**tokens | repeated, **heads), want, rtol=1e-4, atol=1e-5)


def test_the_limits_clamp_the_step_size_after_softplus() -> None:
    tokens, heads = _tokens(2, 13), _heads() | {"dt_bias": None}
    step = torch.nn.functional.softplus(tokens["dt"])
    for low, high in ((0.5, 0.7), (0.5, math.inf), (0.0, 0.6)):
        want = _scan(**tokens | {"dt": step.clamp(low, high)}, **heads | {"dt_softplus": False})
        assert_close(_scan(**tokens, **heads, dt_limit=(low, high)), want)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_the_results(dtype: torch.dtype | None) -> None:
    tokens = {name: tensor.bfloat16() for name, tensor in _tokens(1, 9).items()}
    options: Arguments = {"cu_seqlens": _ints(0, 4, 9), "return_final_states": True, "return_varlen_states": True}
    out, last, states = tmo.mamba_chunk_scan_combined(**tokens, **_heads(), **options, state_dtype=dtype)
    assert out.dtype == torch.bfloat16 and last.dtype == states.dtype == (dtype or torch.float32)


def test_what_is_asked_for_is_what_is_returned() -> None:
    tokens, heads = _tokens(1, 9), _heads()
    alone = tmo.mamba_chunk_scan_combined(**tokens, **heads)
    assert isinstance(alone, Tensor)
    packed: Arguments = {"cu_seqlens": _ints(0, 4, 9)}
    both = tmo.mamba_chunk_scan_combined(**tokens, **heads, **packed, return_varlen_states=True)
    assert [tuple(t.shape) for t in both] == [(1, 9, H, P), (2, H, P, N)]


def test_no_tokens_and_no_sequences() -> None:
    heads, first = _heads(), torch.randn(2, H, P, N)
    out, states = _scan(**_tokens(2, 0), **heads, initial_states=first)
    assert out.shape == (2, 0, H, P) and torch.equal(states, first)
    out, states = _scan(**_tokens(0, 5), **heads)
    assert out.shape == (0, 5, H, P) and states.shape == (0, H, P, N)
    pool = torch.randn(SLOTS, H, P, N)
    before = pool.clone()
    for starts, slots, count in ((_ints(0), _ints(), 0), (_ints(0), _ints(), 3), (_ints(0, 0, 0), _ints(1, 2), 0)):
        out = tmo.mamba_chunk_scan_combined_varlen(
            **_tokens(count), **heads, cu_seqlens=starts, states=pool, state_indices=slots
        )
        assert out.shape == (count, H, P) and out.eq(0).all() and torch.equal(pool, before)


# --- digits ---


def _strong_decay(length: int) -> Arguments:
    """Chunks that begin with steps a thousand times those they end with: sums of log decays much larger than the
    differences that count."""
    dt = torch.where(torch.arange(length) % 256 < 128, 1.0, 1e-3)[None, :, None].expand(1, length, H)
    return _tokens(1, length) | {"dt": dt, "A": torch.full((H,), -16.0), "chunk_size": 256, "return_final_states": True}


@pytest.mark.parametrize("packed", [False, True])
def test_strong_decays_keep_their_digits(packed: bool) -> None:
    arguments = _strong_decay(600)
    if packed:
        arguments |= {"cu_seqlens": _ints(0, 300, 600), "return_varlen_states": True}
    result = tmo.mamba_chunk_scan_combined(**arguments)
    check.assert_right(
        "mamba_chunk_scan_combined", arguments, result, check.truth("mamba_chunk_scan_combined", arguments)
    )


def test_gradients_of_strong_decays_are_finite_and_right() -> None:
    arguments = _strong_decay(300)

    def gradients(function: Any, dtype: torch.dtype) -> list[Tensor]:
        given = check.copied(arguments | {"dt": arguments["dt"].clone()}, dtype)
        leaves = [given[name].requires_grad_() for name in ("x", "dt", "A", "B", "C", "z")]
        out, states = function(**given)
        return list(torch.autograd.grad(out.double().square().sum() + states.double().sum(), leaves))

    got = gradients(tmo.mamba_chunk_scan_combined, torch.float32)
    for one, other in zip(got, gradients(check.oracle("mamba_chunk_scan_combined"), torch.float64), strict=True):
        assert float((one.double() - other).abs().max()) <= 1e-4 * float(other.abs().max())


def test_steps_so_large_that_the_masked_half_would_overflow() -> None:
    tokens = _tokens(1, 40)
    tokens["dt"] = torch.full((1, 40, H), 50.0).requires_grad_()
    out = tmo.mamba_chunk_scan_combined(**tokens, A=torch.full((H,), -16.0), chunk_size=64)
    (gradient,) = torch.autograd.grad(out.sum(), tokens["dt"])
    assert out.isfinite().all() and gradient.isfinite().all()


# --- one sequence's numbers stay its own ---


@pytest.mark.parametrize("name", ["x", "dt", "B", "C", "z"])
@pytest.mark.parametrize("where", ["no_sequence", "another_sequence", "padding"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_where_it_is(name: str, where: str, value: float) -> None:
    tokens, starts = _tokens(24), _ints(0, 5, 5, 16, 21)  # tokens 21 to 23 belong to no sequence
    heads = _heads() | {"dt_softplus": name != "dt"}  # softplus would be refused nothing; without it inf is a step size
    slots = _ints(0, 1, -1 if where == "padding" else 2, 3)
    spoiled = {"no_sequence": slice(21, 24), "another_sequence": slice(7, 9), "padding": slice(5, 16)}[where]
    own = range(5, 16) if where == "another_sequence" else range(0)
    first = torch.randn(4, H, P, N)

    def call(given: Arguments) -> tuple[Tensor, Tensor]:
        pool = first.clone()
        flags = torch.tensor([True, True, False, True])
        options: Arguments = {"cu_seqlens": starts, "states": pool, "state_indices": slots, "has_initial_state": flags}
        return tmo.mamba_chunk_scan_combined_varlen(**given, **heads, **options), pool

    want, want_pool = call(tokens)
    tokens[name] = tokens[name].clone()
    tokens[name][spoiled] = value
    got, pool = call(tokens)
    others = [t for t in range(24) if t not in own]
    assert torch.equal(got[others], want[others])
    assert torch.equal(pool[[0, 1, 3]], want_pool[[0, 1, 3]])
    if where != "another_sequence":
        assert torch.equal(pool[2], want_pool[2])
    elif name in ("x", "dt", "B") and math.isnan(value):
        assert pool[2].isnan().any() and got[9:16].isnan().any(), "a spoiled sequence must not look sound"


def test_a_new_sequence_does_not_see_what_its_slot_held() -> None:
    tokens, heads = _tokens(9), _heads()
    clean, dirty = torch.zeros(2, H, P, N), torch.full((2, H, P, N), math.nan)
    options: Arguments = {"cu_seqlens": _ints(0, 4, 9), "has_initial_state": torch.tensor([False, False])}
    want = tmo.mamba_chunk_scan_combined_varlen(**tokens, **heads, **options, states=clean)
    got = tmo.mamba_chunk_scan_combined_varlen(**tokens, **heads, **options, states=dirty)
    assert torch.equal(got, want) and torch.equal(dirty, clean)


# --- gradients ---


@pytest.mark.parametrize("outputs", ["out", "states", "both"])
def test_gradients_of_one_output_or_both(outputs: str) -> None:
    tokens, heads, first = _tokens(2, 11), _heads(), torch.randn(2, H, P, N)
    weights = torch.randn(2, 11, H, P), torch.randn(2, H, P, N)

    def gradients(function: Any) -> list[Tensor | None]:
        given = check.copied({**tokens, **heads, "initial_states": first})
        leaves = [t.requires_grad_() for t in given.values() if isinstance(t, Tensor)]
        out, states = function(**given, return_final_states=True)
        loss = torch.zeros(())
        if outputs != "states":
            loss = loss + (out * weights[0]).sum()
        if outputs != "out":
            loss = loss + (states * weights[1]).sum()
        return list(torch.autograd.grad(loss, leaves, allow_unused=True))

    want = gradients(check.oracle("mamba_chunk_scan_combined"))
    for got, expected in zip(gradients(tmo.mamba_chunk_scan_combined), want, strict=True):
        assert_close(
            torch.zeros(()) if got is None or not got.any() else got,
            torch.zeros(()) if expected is None or not expected.any() else expected,
            rtol=1e-3,
            atol=1e-4,
        )


@pytest.mark.parametrize("length", [1, 8, 11])
def test_gradients_of_a_tensor_passed_twice_and_of_one_expanded(length: int) -> None:
    shared, step = torch.randn(1, length, G, N), torch.rand(1, length, 1)
    x, A = torch.randn(1, length, H, P), -torch.rand(H) - 1

    def gradients(function: Any) -> tuple[Tensor, ...]:
        leaves = shared.clone().requires_grad_(), step.clone().requires_grad_()
        out = function(x, leaves[1].expand(1, length, H), A, leaves[0], leaves[0], Q)
        return torch.autograd.grad(out.square().sum(), leaves)

    want = gradients(check.oracle("mamba_chunk_scan_combined"))
    assert_close(gradients(tmo.mamba_chunk_scan_combined), want, rtol=1e-3, atol=1e-4)


# --- compiled ---


def test_two_graphs_over_all_batches_and_lengths_with_their_backward() -> None:
    counter = CompileCounterWithBackend("inductor")
    heads = _heads()

    def scan(tokens: Arguments, first: Tensor) -> tuple[Tensor, Tensor]:
        return _scan(**tokens, **heads, initial_states=first)

    torch._dynamo.reset()
    compiled = torch.compile(scan, backend=counter, fullgraph=True)
    for batch, length in ((2, 21), (3, 2), (2, 8), (4, 16), (5, 100), (2, 9), (2, 300), (7, 33)):
        tokens, first = _tokens(batch, length), torch.randn(batch, H, P, N)
        leaves = [tensor.requires_grad_() for tensor in (*tokens.values(), first)]
        weights = [torch.randn_like(result) for result in scan(tokens, first)]
        want = torch.autograd.grad(scan(tokens, first), leaves, weights)
        for tensor in leaves:
            torch._dynamo.mark_dynamic(tensor, 0)
            if tensor is not first:
                torch._dynamo.mark_dynamic(tensor, 1)
        assert_close(torch.autograd.grad(compiled(tokens, first), leaves, weights), want, rtol=1e-3, atol=1e-3)
    assert counter.frame_count <= 2


# --- bad input ---


def _dense_arguments() -> Arguments:
    return {**_tokens(2, 9), **_heads()}


def _packed_arguments() -> Arguments:
    given = {"cu_seqlens": _ints(0, 4, 9), "states": torch.randn(SLOTS, H, P, N), "state_indices": _ints(3, 5)}
    return {**_tokens(9), **_heads(), **given, "has_initial_state": torch.tensor([True, False])}


COMMON: list[tuple[Arguments, type[Exception], str]] = [
    ({"x": torch.zeros(9)}, ValueError, r"x: got shape \[9\]"),
    ({"x": None}, TypeError, "x: got NoneType, expected a tensor"),
    ({"dt": torch.zeros(9, H, P)}, ValueError, "dt: got shape"),
    ({"A": torch.zeros(H, N)}, ValueError, r"A: got shape \[4, 5\], expected \[heads\]"),
    ({"A": torch.zeros(H, dtype=torch.int64)}, TypeError, r"A: got dtype torch.int64"),
    ({"A": torch.zeros(H, device="meta")}, ValueError, "A: got device meta, expected cpu"),
    ({"B": torch.zeros(1)}, ValueError, "B: got shape"),
    ({"D": torch.zeros(H, P, 1)}, ValueError, r"D: got shape .* expected \[heads\] or \[heads, head_dim\]"),
    ({"D": torch.zeros(P)}, ValueError, "D: got shape"),
    ({"z": torch.zeros(9, H)}, ValueError, "z: got shape .* expected the shape of x"),
    ({"dt_bias": torch.zeros(H + 1)}, ValueError, "dt_bias: got shape"),
    ({"chunk_size": 12}, ValueError, "chunk_size: got 12, expected a power of two"),
    ({"chunk_size": 0}, ValueError, "chunk_size: got 0, expected a power of two"),
    ({"chunk_size": 8.0}, TypeError, "chunk_size: got float, expected an int"),
    ({"dt_limit": (1.0, 0.5)}, ValueError, r"dt_limit: got \(1.0, 0.5\)"),
    ({"dt_limit": (math.nan, 1.0)}, ValueError, "dt_limit: got"),
    ({"backend": "referense"}, tmo.BackendError, "reference"),
]
DENSE: list[tuple[Arguments, type[Exception], str]] = [
    ({"initial_states": torch.zeros(1, H, P, N)}, ValueError, "initial_states: got shape"),
    ({"seq_idx": torch.zeros(2, 9)}, TypeError, "seq_idx: got dtype torch.float32"),
    ({"seq_idx": _ints(0)}, ValueError, "seq_idx: got shape"),
    ({"cu_seqlens": _ints(0, 9)}, ValueError, "x: got a batch of 2, expected 1 with cu_seqlens"),
    ({"return_varlen_states": True}, ValueError, "cu_seqlens: got None"),
]
PACKED: list[tuple[Arguments, type[Exception], str]] = [
    ({"cu_seqlens": torch.zeros(3)}, TypeError, "cu_seqlens: got dtype"),
    ({"cu_seqlens": _ints(0, 9).view(1, 2)}, ValueError, "cu_seqlens: got shape"),
    ({"states": torch.zeros(SLOTS, H, N, P)}, ValueError, "states: got shape"),
    ({"states": torch.zeros(SLOTS, H, P, N, requires_grad=True)}, ValueError, "states: requires grad"),
    ({"state_indices": None}, ValueError, "states: got 7 slots, expected 2"),
    ({"state_indices": _ints(0, 7)}, ValueError, "state_indices: got slot 7, expected 0 to 6"),
    ({"state_indices": _ints(0, -2)}, ValueError, "state_indices: got slot -2"),
    ({"state_indices": torch.zeros(2)}, TypeError, "state_indices: got dtype"),
    ({"has_initial_state": _ints(1, 0)}, TypeError, "has_initial_state: got dtype"),
    ({"num_computed_tokens": _ints(1)}, ValueError, "num_computed_tokens: got shape"),
    ({"out": torch.zeros(9, H)}, ValueError, "out: got shape"),
    ({"out": torch.zeros(9, H, P).double()}, TypeError, "out: got dtype"),
]


@pytest.mark.parametrize(("change", "error", "message"), COMMON + DENSE)
def test_bad_input_to_the_dense_scan(change: Arguments, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tmo.mamba_chunk_scan_combined(**_dense_arguments() | change)


@pytest.mark.parametrize(("change", "error", "message"), COMMON + PACKED)
def test_bad_input_to_the_packed_scan_writes_nothing(change: Arguments, error: type[Exception], message: str) -> None:
    arguments = _packed_arguments()
    before = arguments["states"].clone()
    with pytest.raises(error, match=message):
        tmo.mamba_chunk_scan_combined_varlen(**arguments | change)
    assert torch.equal(arguments["states"], before)


def test_groups_that_do_not_divide_the_heads() -> None:
    three = {name: torch.randn(2, 9, 3, N) for name in ("B", "C")}
    with pytest.raises(ValueError, match="B: got 3 groups, expected a number that divides the 4 heads"):
        tmo.mamba_chunk_scan_combined(**_dense_arguments() | three)


@pytest.mark.parametrize("name", ["x", "z", "states"])
def test_out_is_written_and_returned_and_overlaps_nothing(name: str) -> None:
    arguments = _packed_arguments()
    want = tmo.mamba_chunk_scan_combined_varlen(**check.copied(arguments))
    out = torch.full((9, H, P), math.nan)
    assert tmo.mamba_chunk_scan_combined_varlen(**check.copied(arguments), out=out) is out
    assert torch.equal(out, want)
    before = arguments[name].clone()
    alias = arguments[name].flatten()[: out.numel()].view(out.shape)
    with pytest.raises(ValueError, match=f"out: shares memory with {name}"):
        tmo.mamba_chunk_scan_combined_varlen(**arguments, out=alias)
    assert torch.equal(arguments[name], before)
