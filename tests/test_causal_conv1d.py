"""What the cases do not say about the causal convolutions: bad input, layouts, every way of cutting a text agrees."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.testing import FileCheck, assert_close

import torch_mamba_ops as tmo

DIM, WIDTH, SLOTS = 6, 4, 7
GUARD = 113.0
Arguments = dict[str, Any]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _filter(width: int = WIDTH) -> tuple[Tensor, Tensor]:
    return torch.randn(DIM, width), torch.randn(DIM)


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    out = tmo.causal_conv1d_fn(x, weight, bias, activation="silu", **options)
    assert isinstance(out, Tensor)
    return out


# --- the same text, cut differently ---


@pytest.mark.parametrize("columns", [WIDTH - 1, WIDTH, WIDTH + 3])
@pytest.mark.parametrize("prompt", [1, 2, 5])
@pytest.mark.parametrize("rank", [2, 3])
def test_prefill_then_steps_equal_a_longer_prefill(columns: int, prompt: int, rank: int) -> None:
    weight, bias = _filter()
    x = torch.randn(2, DIM, prompt + 5)
    want = _dense(x, weight, bias)
    padded = torch.nn.functional.pad(x[..., :prompt], (columns, 0))
    state = padded[..., -columns:].clone()  # what Hugging Face caches after its prefill
    for t in range(prompt, x.shape[2]):
        token = x[..., t] if rank == 2 else x[..., t : t + 1]
        got = tmo.causal_conv1d_update(token, state, weight, bias, "silu")
        assert got.shape == token.shape
        assert_close(got.reshape(2, DIM), want[..., t])
    assert torch.equal(state, torch.nn.functional.pad(x, (columns, 0))[..., -columns:])


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("cut", [1, 2, 4, 9])
def test_a_dense_prefill_in_two_chunks_equals_one(width: int, cut: int) -> None:
    weight, bias = _filter(width)
    x, first = torch.randn(2, DIM, 10), torch.randn(2, DIM, width - 1)
    options: Arguments = {"activation": "silu", "return_final_states": True}
    want, want_states = tmo.causal_conv1d_fn(x, weight, bias, initial_states=first, **options)
    one, states = tmo.causal_conv1d_fn(x[..., :cut], weight, bias, initial_states=first, **options)
    two, states = tmo.causal_conv1d_fn(x[..., cut:], weight, bias, initial_states=states, **options)
    assert_close(torch.cat([one, two], -1), want)
    assert torch.equal(states, want_states)


@pytest.mark.parametrize("columns", [WIDTH - 1, WIDTH, WIDTH + 3])
def test_packed_equals_dense_for_each_sequence_in_one_chunk_and_in_two(columns: int) -> None:
    weight, bias = _filter()
    texts = [torch.randn(DIM, length) for length in (1, 9, 2, 6)]
    slots = _ints(5, 0, 2, 3)

    def run(cuts: list[tuple[int, int]], pool: Tensor, known: bool) -> list[Tensor]:
        parts = [text[:, begin:end] for text, (begin, end) in zip(texts, cuts, strict=True)]
        starts = _ints(*[sum(p.shape[1] for p in parts[:i]) for i in range(len(parts) + 1)])
        flags = torch.tensor([known and begin > 0 for begin, _ in cuts])
        options: Arguments = {"cache_indices": slots, "has_initial_state": flags, "activation": "silu"}
        out = tmo.causal_conv1d_varlen_fn(torch.cat(parts, 1), weight, bias, pool, starts, **options)
        return [out[:, begin:end] for begin, end in itertools.pairwise(starts.tolist())]

    dirty = torch.randn(SLOTS, DIM, columns)  # an earlier request's states: they must not leak into new sequences
    whole, chunked = dirty.clone(), dirty.clone()
    outs = run([(0, text.shape[1]) for text in texts], whole, False)
    cuts = [1, 4, 2, 1]
    first = run([(0, cut) for cut in cuts], chunked, True)
    second = run([(cut, text.shape[1]) for cut, text in zip(cuts, texts, strict=True)], chunked, True)
    for out, one, two, text in zip(outs, first, second, texts, strict=True):
        assert_close(out, _dense(text[None], weight, bias)[0])
        assert_close(torch.cat([one, two], 1), out)
    assert torch.equal(whole, chunked)
    for slot, text in zip(slots.tolist(), texts, strict=True):
        assert torch.equal(whole[slot], torch.nn.functional.pad(text, (columns, 0))[:, -columns:])
    untouched = [slot for slot in range(SLOTS) if slot not in slots.tolist()]
    assert torch.equal(whole[untouched], dirty[untouched])


@pytest.mark.parametrize("columns", [WIDTH - 1, WIDTH + 2])
def test_several_tokens_packed_or_not_equal_one_after_the_other(columns: int) -> None:
    weight, bias = _filter()
    lengths, slots = (3, 3), _ints(4, 1)
    x, pool = torch.randn(2, DIM, 3), torch.randn(SLOTS, DIM, columns)
    one, several, packed = pool.clone(), pool.clone(), pool.clone()
    want = torch.stack(
        [tmo.causal_conv1d_update(x[..., t], one, weight, bias, "silu", None, slots) for t in range(3)], -1
    )
    assert_close(tmo.causal_conv1d_update(x, several, weight, bias, "silu", None, slots), want)
    flat = x.transpose(1, 2).reshape(-1, DIM)
    options: Arguments = {"query_start_loc": _ints(0, 3, sum(lengths)), "max_query_len": 5}
    got = tmo.causal_conv1d_update(flat, packed, weight, bias, "silu", None, slots, **options)
    assert_close(got.view(2, 3, DIM).transpose(1, 2), want)
    assert torch.equal(several, one) and torch.equal(packed, one)


def test_a_ring_equals_a_window_that_shifts() -> None:
    weight, bias = _filter()
    x, columns = torch.randn(2, DIM, 13), 5
    want = _dense(x, weight, bias)
    ring, seen = torch.zeros(2, DIM, columns), _ints(0, 0)
    for length in (1, 3, 1, 5, 2, 1):
        begin = int(seen[0])
        got = tmo.causal_conv1d_update(x[..., begin : begin + length], ring, weight, bias, "silu", seen)
        assert_close(got, want[..., begin : begin + length])
        seen = seen + length
    assert torch.equal(ring, torch.stack([x[..., 10], x[..., 11], x[..., 12], x[..., 8], x[..., 9]], -1))


@pytest.mark.parametrize("width", [2, 3, 4, 6])
@pytest.mark.parametrize("packed", [False, True])
def test_speculation_whose_accepted_tokens_are_kept_equals_decoding_them_one_by_one(width: int, packed: bool) -> None:
    weight, bias = _filter(width)
    drafts, rounds, batch = 3, 5, 2
    columns = width - 2 + drafts + 1  # one more than is needed
    slots = _ints(4, 1)
    pool = torch.full((SLOTS, DIM, columns), GUARD)
    plain = torch.zeros(batch, DIM, width - 1)
    pool[slots.long(), :, : width - 1] = plain  # as a prefill into conv_states[..., : width - 1] leaves it
    accepted = _ints(1, 1)
    for step in range(rounds):
        x = torch.randn(batch, DIM, drafts)
        options: Arguments = {"num_accepted_tokens": accepted}
        given = x
        if packed:
            given = x.transpose(1, 2).reshape(-1, DIM)
            options |= {"query_start_loc": _ints(0, drafts, 2 * drafts), "max_query_len": drafts}
        out = tmo.causal_conv1d_update(given, pool, weight, bias, "silu", None, slots, **options)
        out = out.view(batch, drafts, DIM).transpose(1, 2) if packed else out
        accepted = _ints(1 + step % drafts, drafts - step % drafts)
        for row, count in enumerate(accepted.tolist()):
            for t in range(count):
                want = tmo.causal_conv1d_update(x[row, :, t][None], plain[row][None], weight, bias, "silu")
                assert_close(out[row, :, t], want[0])
    assert pool[slots.long(), :, -1].eq(GUARD).all(), "columns beyond the window are not touched"
    assert pool[[0, 2, 3, 5, 6]].eq(GUARD).all()


def test_packed_speculation_uses_the_window_of_each_sequences_own_length() -> None:
    weight, bias = _filter()
    lengths, accepted = (3, 1, 0, 2), _ints(1, 3, 2, 2)
    slots, columns = _ints(4, 1, 0, 6), WIDTH - 2 + 3
    pool = torch.randn(SLOTS, DIM, columns)
    before = pool.clone()
    starts = _ints(*[sum(lengths[:i]) for i in range(5)])
    x = torch.randn(sum(lengths), DIM)
    options: Arguments = {"query_start_loc": starts, "max_query_len": 3}
    out = tmo.causal_conv1d_update(x, pool, weight, bias, "silu", None, slots, num_accepted_tokens=accepted, **options)
    for n, length in enumerate(lengths):
        if length == 0:
            assert torch.equal(pool[slots[n]], before[slots[n]])
            continue
        alone, own = before[slots[n]][None].clone(), x[starts[n] : starts[n + 1]].t()[None]
        want = tmo.causal_conv1d_update(own, alone, weight, bias, "silu", num_accepted_tokens=accepted[n : n + 1])
        assert_close(out[starts[n] : starts[n + 1]], want[0].t())
        assert torch.equal(pool[slots[n]], alone[0])


def test_no_accepted_token_counts_as_one() -> None:
    weight, bias = _filter()
    x, pool = torch.randn(2, DIM, 3), torch.randn(2, DIM, WIDTH + 1)
    zero, one = pool.clone(), pool.clone()
    got = tmo.causal_conv1d_update(x, zero, weight, bias, num_accepted_tokens=_ints(0, 2))
    want = tmo.causal_conv1d_update(x, one, weight, bias, num_accepted_tokens=_ints(1, 2))
    assert torch.equal(got, want) and torch.equal(zero, one)


# --- layouts ---


def _layouts(values: Tensor) -> dict[str, Tensor]:
    """Pools [slots, dim, columns] that hold the same in different places, with guards in what is not theirs."""
    slots, dim, columns = values.shape
    page = torch.full((slots, dim * columns + 9), GUARD)
    wide = torch.full((slots, 2, dim, columns + 2), GUARD)
    pools = {
        "columns innermost": torch.empty(slots, dim, columns),
        "dim innermost": torch.empty(slots, columns, dim).transpose(1, 2),
        "page, columns innermost": page.clone()[:, 5:-4].view(slots, dim, columns),
        "page, dim innermost": page.clone()[:, 5:-4].view(slots, columns, dim).transpose(1, 2),
        "first columns of a longer window": wide[:, 1, :, :columns],
    }
    return {name: pool.copy_(values) for name, pool in pools.items()}


def _guards_hold(pool: Tensor) -> bool:
    whole = torch.empty(0).set_(pool.untyped_storage())
    own = torch.zeros_like(whole, dtype=torch.bool)
    own.as_strided(pool.shape, pool.stride(), pool.storage_offset()).fill_(True)
    return bool(whole[~own].eq(GUARD).all())


def _step(pool: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return tmo.causal_conv1d_update(x[:, :3].t(), pool, weight, weight[:, 0], "silu", None, _ints(5, -1, 2))


def _speculate(pool: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    drafts = x[:, :6].reshape(2, DIM, 3)
    return tmo.causal_conv1d_update(
        drafts, pool, weight, conv_state_indices=_ints(5, 2), num_accepted_tokens=_ints(2, 1)
    )


def _pack(pool: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    known = torch.tensor([True, False])
    return tmo.causal_conv1d_varlen_fn(
        x, weight, None, pool, _ints(0, 2, 7), cache_indices=_ints(5, 2), has_initial_state=known
    )


@pytest.mark.parametrize("call", [_step, _speculate, _pack])
@pytest.mark.parametrize("compiled", [False, True])
def test_every_layout_of_the_pool_gives_the_same_and_only_the_pool_is_written(
    call: Callable[..., Tensor], compiled: bool
) -> None:
    values, x, weight = torch.randn(SLOTS, DIM, WIDTH - 2 + 3), torch.randn(DIM, 8), torch.randn(DIM, WIDTH)
    want_pool = values.clone()
    want = call(want_pool, x, weight)
    assert not torch.equal(want_pool, values)
    for name, pool in _layouts(values).items():
        torch._dynamo.reset()
        address = pool.data_ptr()
        got = (torch.compile(call, fullgraph=True) if compiled else call)(pool, x, weight)
        assert_close(got, want, msg=name)
        assert torch.equal(pool, want_pool) and pool.data_ptr() == address, name
        assert _guards_hold(pool), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_keeps_the_memory_layout_of_x(dtype: torch.dtype) -> None:
    weight = torch.randn(DIM, WIDTH, dtype=dtype)
    wide = torch.randn(2, 9, DIM + 5, dtype=dtype)
    for x in (
        wide[..., :DIM].transpose(1, 2),
        wide[..., :DIM].transpose(1, 2).contiguous(),
        wide[:1, :1, :DIM].expand(2, 9, -1).mT,
    ):
        out = tmo.causal_conv1d_fn(x, weight)
        assert isinstance(out, Tensor) and out.dtype == dtype
        assert out.stride() == torch.empty_like(x).stride()
        assert_close(out, _contiguous_result(x, weight))
        step = tmo.causal_conv1d_update(x, torch.zeros(2, DIM, WIDTH, dtype=dtype), weight)
        assert step.stride() == torch.empty_like(x).stride()
        assert_close(step, out)
    packed = wide[0, :, :DIM].t()
    pool, starts = torch.zeros(1, DIM, WIDTH - 1, dtype=dtype), _ints(0, 9)
    varlen = tmo.causal_conv1d_varlen_fn(packed, weight, None, pool, starts)
    assert varlen.stride() == torch.empty_like(packed).stride()


def _contiguous_result(x: Tensor, weight: Tensor) -> Tensor:
    out = tmo.causal_conv1d_fn(x.contiguous(), weight)
    assert isinstance(out, Tensor)
    return out


# --- the dense convolution's options ---


@pytest.mark.parametrize("length", [1, 2, 3, 7])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("initial", [False, True])
def test_final_states_are_the_last_inputs_of_texts_long_and_short(length: int, width: int, initial: bool) -> None:
    x = torch.randn(2, DIM, length, requires_grad=True)
    first = torch.randn(2, DIM, width - 1, requires_grad=True) if initial else None
    before = torch.zeros(2, DIM, width - 1) if first is None else first
    options: Arguments = {"initial_states": first, "return_final_states": True}
    _, states = tmo.causal_conv1d_fn(x, torch.randn(DIM, width), **options)
    want = torch.cat([before, x], -1)[..., length:]
    assert torch.equal(states, want)
    seed = torch.randn_like(states)
    leaves = [x] if first is None else [x, first]
    for got, expected in zip(*(torch.autograd.grad(s, leaves, seed) for s in (states, want)), strict=True):
        assert torch.equal(got, expected)
    with torch.no_grad():
        target = torch.full((2, width - 1, DIM), GUARD).transpose(1, 2)
        _, states = tmo.causal_conv1d_fn(x, torch.randn(DIM, width), final_states_out=target, **options)
    assert states is target and torch.equal(target, want)


def test_final_states_do_not_keep_the_text_alive() -> None:
    x = torch.randn(1, DIM, 4096)
    _, states = tmo.causal_conv1d_fn(x, torch.randn(DIM, WIDTH), return_final_states=True)
    assert states.untyped_storage().nbytes() < x.untyped_storage().nbytes() // 100


def test_texts_in_one_row_do_not_see_each_other() -> None:
    weight, bias = _filter()
    lengths = (1, 4, 2, 6)
    texts = [torch.randn(1, DIM, length) for length in lengths]
    seq_idx = _ints(*[i for i, length in enumerate(lengths) for _ in range(length)])[None]
    got = _dense(torch.cat(texts, -1), weight, bias, seq_idx=seq_idx)
    assert_close(got, torch.cat([_dense(text, weight, bias) for text in texts], -1))


@pytest.mark.parametrize("function", ["causal_conv1d_fn", "causal_conv1d_update", "causal_conv1d_varlen_fn"])
def test_spellings_of_the_activation(function: str) -> None:
    def call(activation: Any) -> Tensor:
        arguments = {**GOOD[function](), "activation": activation}
        return getattr(tmo, function)(**arguments)  # type: ignore[no-any-return]

    results = []
    for activation in (None, False, "silu", "swish", True):
        torch.manual_seed(1)
        results.append(call(activation))
    none, false, silu, swish, true = results
    assert torch.equal(none, false) and torch.equal(silu, swish) and torch.equal(silu, true)
    assert_close(silu, torch.nn.functional.silu(none))
    for wrong in ("relu", "SiLU", 2):
        with pytest.raises(ValueError, match=r"activation: got .*'silu' or 'swish'"):
            call(wrong)


@pytest.mark.parametrize("given", ["x", "weight", "bias", "initial_states"])
def test_gradients_of_an_argument_alone_and_twice(given: str) -> None:
    arguments: Arguments = {
        "x": torch.randn(2, 3, 4, dtype=torch.float32).double(),
        "weight": torch.randn(3, 3).double(),
        "bias": torch.randn(3).double(),
        "initial_states": torch.randn(2, 3, 2).double(),
    }
    leaf = arguments[given].float().requires_grad_()
    single = {name: value.float() for name, value in arguments.items()}

    def run(leaf: Tensor) -> Tensor:
        return _dense(**{**single, given: leaf})

    (gradient,) = torch.autograd.grad(run(leaf).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), leaf)
    step = 1e-2
    direction = torch.randn_like(leaf)
    with torch.no_grad():
        slope = (run(leaf + step * direction).sum() - run(leaf - step * direction).sum()) / (2 * step)
    assert_close((gradient * direction).sum(), slope, rtol=1e-2, atol=1e-2)
    assert second.shape == leaf.shape and bool(second.isfinite().all())


# --- nothing to do ---


def test_no_tokens_and_no_sequences() -> None:
    weight, bias = _filter()
    for shape in ((0, DIM, 5), (2, DIM, 0)):
        x = torch.zeros(shape, requires_grad=True)
        out, states = tmo.causal_conv1d_fn(x, weight, bias, return_final_states=True)
        assert out.shape == x.shape and states.shape == (shape[0], DIM, WIDTH - 1)
    pool = torch.randn(SLOTS, DIM, WIDTH)
    before = pool.clone()
    none = torch.zeros(0, dtype=torch.int32)
    assert tmo.causal_conv1d_update(torch.zeros(0, DIM), pool, weight, conv_state_indices=none).shape == (0, DIM)
    out = tmo.causal_conv1d_update(torch.zeros(2, DIM, 0), pool, weight, conv_state_indices=_ints(0, 1))
    assert out.shape == (2, DIM, 0)
    packed: Arguments = {"query_start_loc": _ints(0), "max_query_len": 1, "conv_state_indices": none}
    assert tmo.causal_conv1d_update(torch.zeros(0, DIM), pool, weight, **packed).shape == (0, DIM)
    for starts, slots, tokens in (
        (_ints(0), none, 0),
        (_ints(0), none, 3),
        (_ints(0, 0, 0), _ints(1, 2), 0),
        (_ints(0, 0), _ints(1), 3),
    ):
        x = torch.full((DIM, tokens), torch.nan)
        out = tmo.causal_conv1d_varlen_fn(x, weight, bias, pool, starts, cache_indices=slots)
        assert torch.equal(out, torch.zeros(DIM, tokens))
    assert torch.equal(pool, before)


def test_padding_reads_and_writes_nothing_and_gives_zero() -> None:
    weight, bias = _filter()
    pool = torch.full((SLOTS, DIM, WIDTH), torch.nan)
    pool[3] = torch.randn(DIM, WIDTH)
    x = torch.randn(3, DIM)
    x[0] = torch.nan
    for pad in (-1, 0):
        given = pool.clone()
        out = tmo.causal_conv1d_update(x, given, weight, bias, "silu", None, _ints(pad, 3, pad), pad_slot_id=pad)
        assert out[[0, 2]].eq(0).all() and out[1].isfinite().all()
        rest = [slot for slot in range(SLOTS) if slot != 3]
        assert given[rest].isnan().all() and torch.equal(given[3, :, :-1], pool[3, :, 1:])
        given = pool.clone()
        options: Arguments = {"cache_indices": _ints(pad, 3, pad), "has_initial_state": torch.ones(3, dtype=torch.bool)}
        packed = tmo.causal_conv1d_varlen_fn(
            x.t(), weight, bias, given, _ints(0, 1, 2, 3), pad_slot_id=pad, activation=True, **options
        )
        assert_close(packed.t(), out)
        assert given[rest].isnan().all()


@pytest.mark.parametrize("pad", [-1, 0, 1])
def test_without_slots_nothing_is_padding(pad: int) -> None:
    weight, bias = _filter()
    x, pool = torch.randn(DIM, 5), torch.zeros(2, DIM, WIDTH - 1)
    tmo.causal_conv1d_varlen_fn(x, weight, bias, pool, _ints(0, 2, 5), pad_slot_id=pad)
    assert torch.equal(pool[0, :, 1:], x[:, :2]) and torch.equal(pool[1], x[:, 2:])
    tmo.causal_conv1d_update(x[:, :2].t(), pool, weight, bias, pad_slot_id=pad)
    assert torch.equal(pool[..., -1], x[:, :2].t())


def test_the_state_may_have_another_dtype_and_is_only_rounded_when_stored() -> None:
    weight, bias = _filter()
    x = torch.randn(2, DIM, 3)
    state = torch.zeros(2, DIM, WIDTH, dtype=torch.bfloat16)
    out = tmo.causal_conv1d_update(x, state, weight, bias, "silu")
    assert_close(out, _dense(x, weight, bias))
    assert torch.equal(state[..., 1:], x.bfloat16())


def test_out_is_written_and_returned() -> None:
    arguments = GOOD["causal_conv1d_update"]()
    want = tmo.causal_conv1d_update(**{**arguments, "conv_state": arguments["conv_state"].clone()})
    out = torch.full((2, 3, DIM), GUARD)[:, 1]  # with a stride of its own
    assert tmo.causal_conv1d_update(**arguments, out=out) is out
    assert torch.equal(out, want)


# --- compiled ---


def _shapes(batch: int, length: int) -> dict[str, tuple[Callable[..., Any], Arguments]]:
    """Calls whose batch and length vary."""
    weight, bias = torch.ones(DIM, WIDTH), torch.ones(DIM)
    slots = torch.arange(batch, dtype=torch.int32)
    tokens = batch * length
    common: Arguments = {"weight": weight, "bias": bias, "activation": "silu"}
    dense: Arguments = {"x": torch.randn(batch, length, DIM).transpose(1, 2), **common}
    several: Arguments = {**dense, "conv_state": torch.randn(50, DIM, WIDTH - 2 + 21), "conv_state_indices": slots}
    packed: Arguments = {
        **several,
        "x": torch.randn(tokens + 1, DIM),
        "query_start_loc": torch.arange(0, tokens + 1, length, dtype=torch.int32),
        "max_query_len": length,
    }
    return {
        "dense": (tmo.causal_conv1d_fn, dense),
        "dense with states": (
            tmo.causal_conv1d_fn,
            {**dense, "initial_states": torch.randn(batch, DIM, WIDTH - 1), "return_final_states": True},
        ),
        "dense with seq_idx": (
            tmo.causal_conv1d_fn,
            {**dense, "seq_idx": torch.arange(length, dtype=torch.int32).div(3).int().expand(batch, -1).contiguous()},
        ),
        "one token": (
            tmo.causal_conv1d_update,
            {**common, "x": torch.randn(batch, DIM), "conv_state": torch.randn(batch, DIM, WIDTH)},
        ),
        "several tokens": (tmo.causal_conv1d_update, several),
        "accepted tokens": (tmo.causal_conv1d_update, {**several, "num_accepted_tokens": slots % 3 + 1}),
        "ring": (tmo.causal_conv1d_update, {**several, "cache_seqlens": slots * 7}),
        "packed step": (tmo.causal_conv1d_update, packed),
        "packed accepted": (tmo.causal_conv1d_update, {**packed, "num_accepted_tokens": slots % 3 + 1}),
        "packed": (
            tmo.causal_conv1d_varlen_fn,
            {
                **common,
                "x": torch.randn(tokens + 1, DIM).t(),
                "conv_states": torch.randn(50, DIM, WIDTH),
                "query_start_loc": packed["query_start_loc"],
                "cache_indices": slots,
                "has_initial_state": slots % 2 == 0,
            },
        ),
    }


def _mark(name: str, arguments: Arguments) -> None:
    """Batch and tokens are dynamic from the first call."""
    for per_sequence in ("cache_seqlens", "conv_state_indices", "cache_indices", "has_initial_state"):
        if per_sequence in arguments:
            torch._dynamo.mark_dynamic(arguments[per_sequence], 0)
    dims = {"packed": (1,), "one token": (0,), "packed step": (0,), "packed accepted": (0,)}.get(name, (0, 2))
    for dim in dims:
        torch._dynamo.mark_dynamic(arguments["x"], dim)


@pytest.mark.parametrize("name", list(_shapes(2, 2)))
def test_one_dynamic_graph_serves_every_batch_and_length_above_one(name: str) -> None:
    counter = CompileCounterWithBackend("aot_eager_decomp_partition")
    torch._dynamo.reset()

    def call(arguments: Arguments) -> Any:
        return _shapes_function(name)(**arguments)

    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    for batch, length in ((9, 11), (2, 3), (3, 2), (4, 4), (7, 2), (6, 21)):  # no two sizes alike in the first call
        torch.manual_seed(batch)
        arguments = _shapes(batch, length)[name][1]
        eager = {n: t.clone() if isinstance(t, Tensor) else t for n, t in arguments.items()}
        _mark(name, arguments)
        assert_close(compiled(arguments), call(eager))
        for state in ("conv_state", "conv_states"):
            if state in arguments:
                assert torch.equal(arguments[state], eager[state])
    assert counter.frame_count == 1


def _shapes_function(name: str) -> Callable[..., Any]:
    if name.startswith("dense"):
        return tmo.causal_conv1d_fn
    return tmo.causal_conv1d_varlen_fn if name == "packed" else tmo.causal_conv1d_update


@pytest.mark.parametrize("name", ["one token", "several tokens", "accepted tokens", "ring", "packed step", "packed"])
def test_the_pool_is_updated_in_place_and_never_cloned(name: str) -> None:
    function, arguments = _shapes(3, 2)[name]
    if name == "one token":
        arguments["conv_state_indices"], arguments["conv_state"] = _ints(41, 3, 7), torch.randn(50, DIM, WIDTH)
    torch._dynamo.reset()
    _, (code,) = run_and_get_code(torch.compile(lambda a: function(**a), fullgraph=True), arguments)
    wrapper = code[code.index("def call(") :]
    FileCheck().check_not("torch_mamba_ops").check_not("aten.clone").check_not(".copy_(").run(wrapper)
    pool = arguments["conv_states" if name == "packed" else "conv_state"]
    shape = f"(({', '.join(map(str, pool.shape))})"
    assert not [line for line in wrapper.splitlines() if "= empty_strided_cpu(" in line and shape in line]


# --- bad input ---

GOOD: dict[str, Callable[[], Arguments]] = {
    "causal_conv1d_fn": lambda: {
        "x": torch.randn(2, DIM, 5),
        "weight": torch.randn(DIM, WIDTH),
        "bias": torch.randn(DIM),
    },
    "causal_conv1d_update": lambda: {
        "x": torch.randn(2, DIM),
        "conv_state": torch.randn(SLOTS, DIM, 5),
        "weight": torch.randn(DIM, WIDTH),
        "bias": torch.randn(DIM),
        "conv_state_indices": _ints(4, 1),
    },
    "causal_conv1d_varlen_fn": lambda: {
        "x": torch.randn(DIM, 6),
        "weight": torch.randn(DIM, WIDTH),
        "bias": torch.randn(DIM),
        "conv_states": torch.randn(SLOTS, DIM, 5),
        "query_start_loc": _ints(0, 2, 6),
        "cache_indices": _ints(4, 1),
        "has_initial_state": torch.tensor([True, False]),
    },
}
PACKED: Arguments = {"query_start_loc": _ints(0, 1, 2), "max_query_len": 1}
HALF, META = torch.float16, torch.device("meta")

BAD: list[tuple[str, Arguments, type[Exception], tuple[str, ...]]] = [
    ("causal_conv1d_fn", {"x": torch.randn(DIM, 5)}, ValueError, ("x", "[6, 5]", "[batch, dim, length]")),
    ("causal_conv1d_fn", {"x": [1.0]}, TypeError, ("x", "list", "[batch, dim, length]")),
    ("causal_conv1d_fn", {"x": torch.ones(2, DIM, 5).int()}, TypeError, ("x", "int32", "float32")),
    ("causal_conv1d_fn", {"weight": torch.randn(DIM, 1, WIDTH)}, ValueError, ("weight", "[6, 1, 4]", "[dim, width]")),
    ("causal_conv1d_fn", {"weight": torch.randn(5, WIDTH)}, ValueError, ("weight", "[5, 4]", "[6, 4]")),
    ("causal_conv1d_fn", {"weight": torch.randn(DIM, 5)}, ValueError, ("weight", "width 5", "2 to 4")),
    ("causal_conv1d_fn", {"weight": torch.randn(DIM, 1)}, ValueError, ("weight", "width 1", "2 to 4")),
    ("causal_conv1d_fn", {"weight": torch.ones(DIM, WIDTH).long()}, TypeError, ("weight", "int64", "float32")),
    ("causal_conv1d_fn", {"weight": torch.ones(DIM, WIDTH, device=META)}, ValueError, ("weight", "meta", "cpu")),
    ("causal_conv1d_fn", {"bias": torch.randn(DIM, 1)}, ValueError, ("bias", "[6, 1]", "[dim]")),
    ("causal_conv1d_fn", {"bias": 1.0}, TypeError, ("bias", "float", "[dim]")),
    ("causal_conv1d_fn", {"seq_idx": _ints(0, 0, 0, 0, 1)}, ValueError, ("seq_idx", "[5]", "[batch, length]")),
    ("causal_conv1d_fn", {"seq_idx": torch.zeros(2, 5)}, TypeError, ("seq_idx", "float32", "int32")),
    (
        "causal_conv1d_fn",
        {"initial_states": torch.randn(2, DIM, 4)},
        ValueError,
        ("initial_states", "[2, 6, 4]", "width - 1"),
    ),
    (
        "causal_conv1d_fn",
        {"final_states_out": torch.randn(2, DIM, 3)},
        ValueError,
        ("final_states_out", "return_final_states"),
    ),
    (
        "causal_conv1d_fn",
        {"final_states_out": torch.randn(2, DIM, 4), "return_final_states": True},
        ValueError,
        ("final_states_out", "[2, 6, 4]", "[2, 6, 3]"),
    ),
    (
        "causal_conv1d_fn",
        {"final_states_out": torch.randn(2, DIM, 3).to(HALF), "return_final_states": True},
        TypeError,
        ("final_states_out", "float16", "float32"),
    ),
    ("causal_conv1d_fn", {"activation": "gelu"}, ValueError, ("activation", "gelu", "silu")),
    ("causal_conv1d_fn", {"backend": "referense"}, tmo.BackendError, ("referense", "did you mean 'reference'")),
    ("causal_conv1d_update", {"x": torch.randn(DIM)}, ValueError, ("x", "[6]", "[batch, dim]")),
    ("causal_conv1d_update", {"x": torch.randn(2, 5)}, ValueError, ("weight", "[6, 4]", "[5, 4]")),
    ("causal_conv1d_update", {"x": torch.randn(3, DIM)}, ValueError, ("conv_state_indices", "[2]", "[3]")),
    ("causal_conv1d_update", {"conv_state": torch.randn(SLOTS, DIM)}, ValueError, ("conv_state", "[7, 6]", "columns")),
    (
        "causal_conv1d_update",
        {"conv_state": torch.randn(SLOTS, 5, 5)},
        ValueError,
        ("conv_state", "[7, 5, 5]", "[7, 6, 5]"),
    ),
    ("causal_conv1d_update", {"conv_state": torch.randn(SLOTS, DIM, 2)}, ValueError, ("conv_state", "2 columns", "3")),
    (
        "causal_conv1d_update",
        {"conv_state": torch.ones(SLOTS, DIM, 5).int()},
        TypeError,
        ("conv_state", "int32", "float32"),
    ),
    (
        "causal_conv1d_update",
        {"conv_state": torch.randn(SLOTS, DIM, 5, requires_grad=True)},
        ValueError,
        ("conv_state", "requires grad", "in place"),
    ),
    (
        "causal_conv1d_update",
        {"conv_state_indices": None},
        ValueError,
        ("conv_state", "7 slots", "2", "conv_state_indices"),
    ),
    ("causal_conv1d_update", {"conv_state_indices": _ints(4, 7)}, ValueError, ("conv_state_indices", "7", "0 to 6")),
    (
        "causal_conv1d_update",
        {"conv_state_indices": _ints(-2, 1)},
        ValueError,
        ("conv_state_indices", "-2", "-1 for padding"),
    ),
    (
        "causal_conv1d_update",
        {"conv_state_indices": torch.ones(2)},
        TypeError,
        ("conv_state_indices", "float32", "int32"),
    ),
    ("causal_conv1d_update", {"weight": torch.randn(DIM, 7)}, ValueError, ("weight", "width 7", "2 to 6")),
    ("causal_conv1d_update", {"cache_seqlens": _ints(1)}, ValueError, ("cache_seqlens", "[1]", "[2]")),
    (
        "causal_conv1d_update",
        {"cache_seqlens": _ints(1, 1), "num_accepted_tokens": _ints(1, 1)},
        ValueError,
        ("cache_seqlens", "num_accepted_tokens"),
    ),
    ("causal_conv1d_update", {"x": torch.randn(2, DIM, 6), "cache_seqlens": _ints(1, 1)}, ValueError, ("x", "6", "5")),
    (
        "causal_conv1d_update",
        {"num_accepted_tokens": torch.ones(2)},
        TypeError,
        ("num_accepted_tokens", "float32", "int32"),
    ),
    (
        "causal_conv1d_update",
        {"x": torch.randn(2, DIM, 4), "num_accepted_tokens": _ints(1, 1)},
        ValueError,
        ("conv_state", "5 columns", "6"),
    ),
    (
        "causal_conv1d_update",
        {"query_start_loc": _ints(0, 1, 2)},
        ValueError,
        ("max_query_len", "None", "query_start_loc"),
    ),
    ("causal_conv1d_update", {"max_query_len": 2}, ValueError, ("max_query_len", "2", "query_start_loc")),
    (
        "causal_conv1d_update",
        {**PACKED, "x": torch.randn(2, DIM, 1)},
        ValueError,
        ("x", "[2, 6, 1]", "[total_tokens, dim]"),
    ),
    (
        "causal_conv1d_update",
        {**PACKED, "query_start_loc": torch.ones(3)},
        TypeError,
        ("query_start_loc", "float32", "int32"),
    ),
    (
        "causal_conv1d_update",
        {**PACKED, "query_start_loc": _ints(0, 1, 2, 2)},
        ValueError,
        ("conv_state_indices", "[2]", "[3]"),
    ),
    ("causal_conv1d_update", {"out": torch.randn(2, DIM, 1)}, ValueError, ("out", "[2, 6, 1]", "[2, 6]")),
    ("causal_conv1d_update", {"out": torch.randn(2, DIM).to(HALF)}, TypeError, ("out", "float16", "float32")),
    ("causal_conv1d_update", {"activation": "relu"}, ValueError, ("activation", "relu", "silu")),
    ("causal_conv1d_update", {"backend": "nowhere"}, tmo.BackendError, ("nowhere", "reference")),
    ("causal_conv1d_varlen_fn", {"x": torch.randn(1, DIM, 6)}, ValueError, ("x", "[1, 6, 6]", "[dim, total_tokens]")),
    ("causal_conv1d_varlen_fn", {"weight": torch.randn(DIM, 5)}, ValueError, ("weight", "width 5", "2 to 4")),
    (
        "causal_conv1d_varlen_fn",
        {"conv_states": torch.randn(SLOTS, DIM, 2)},
        ValueError,
        ("conv_states", "2 columns", "3"),
    ),
    (
        "causal_conv1d_varlen_fn",
        {"conv_states": torch.randn(SLOTS, DIM, 5, requires_grad=True)},
        ValueError,
        ("conv_states", "requires grad"),
    ),
    (
        "causal_conv1d_varlen_fn",
        {"query_start_loc": torch.zeros(1, 3).int()},
        ValueError,
        ("query_start_loc", "[1, 3]", "[sequences + 1]"),
    ),
    (
        "causal_conv1d_varlen_fn",
        {"query_start_loc": None},
        TypeError,
        ("query_start_loc", "NoneType", "[sequences + 1]"),
    ),
    ("causal_conv1d_varlen_fn", {"cache_indices": None}, ValueError, ("conv_states", "7 slots", "2", "cache_indices")),
    ("causal_conv1d_varlen_fn", {"cache_indices": _ints(4)}, ValueError, ("cache_indices", "[1]", "[2]")),
    ("causal_conv1d_varlen_fn", {"cache_indices": _ints(4, 99)}, ValueError, ("cache_indices", "99", "0 to 6")),
    ("causal_conv1d_varlen_fn", {"has_initial_state": _ints(1, 0)}, TypeError, ("has_initial_state", "int32", "bool")),
    (
        "causal_conv1d_varlen_fn",
        {"has_initial_state": torch.tensor([True])},
        ValueError,
        ("has_initial_state", "[1]", "[2]"),
    ),
    ("causal_conv1d_varlen_fn", {"activation": "relu"}, ValueError, ("activation", "relu", "silu")),
]


@pytest.mark.parametrize(
    ("function", "wrong", "error", "told"), BAD, ids=[f"{i}-{'-'.join((f, *w))}" for i, (f, w, _, _) in enumerate(BAD)]
)
def test_bad_input_is_named_with_what_is_expected_and_nothing_is_written(
    function: str, wrong: Arguments, error: type[Exception], told: tuple[str, ...]
) -> None:
    arguments = {**GOOD[function](), **wrong}
    written = [
        n for n in ("conv_state", "conv_states", "final_states_out", "out") if isinstance(arguments.get(n), Tensor)
    ]
    before = {name: arguments[name].detach().clone() for name in written}
    with pytest.raises(error) as raised:
        getattr(tmo, function)(**arguments)
    for part in told:
        assert part in str(raised.value)
    for name, value in before.items():
        assert torch.equal(arguments[name], value)


@pytest.mark.parametrize("name", ["x", "conv_state", "weight", "bias"])
def test_out_must_not_share_memory_with_an_input(name: str) -> None:
    arguments = GOOD["causal_conv1d_update"]()
    memory = torch.randn(SLOTS * DIM * 5)
    arguments[name] = memory[: arguments[name].numel()].view(arguments[name].shape)
    before = memory.clone()
    with pytest.raises(ValueError, match=f"out: shares memory with {name}"):
        tmo.causal_conv1d_update(**arguments, out=memory[: 2 * DIM].view(2, DIM))
    assert torch.equal(memory, before)
