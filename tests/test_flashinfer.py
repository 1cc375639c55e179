"""The backend flashinfer: why it cannot run a call, told from metadata; and on a GPU that it computes the equations."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_mamba_ops as tmo
from torch_mamba_ops.dispatch import OPS
from torch_mamba_ops.ops.case import Case
from torch_mamba_ops.ops.selective_state_update import flashinfer as backend
from torch_mamba_ops.ops.selective_state_update.cases import _Shape
from torch_mamba_ops.testing import build, copied
from torch_mamba_ops.testing.check import Arguments, assert_right, operator_arguments, poison_unused_rows, truth

SSU = "selective_state_update"
F16, BF16, F32, F64, I32, I64 = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64,
)  # fmt: skip
H, P, N, G, SLOTS, BATCH = 8, 64, 128, 2, 9, 3


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FlashInfer is there, and so is a GPU; tensors are fake."""
    monkeypatch.setattr(backend, "_INSTALLED", True)
    monkeypatch.setattr(backend, "_capability", lambda kind, index: (9, 0))
    with FakeTensorMode():
        yield


def _empty(*shape: int, dtype: torch.dtype = BF16, device: str = "cuda") -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _call(tokens: tuple[int, ...] = (BATCH,), device: str = "cuda", **changes: Any) -> Arguments:
    """A call that FlashInfer can run, with changes."""

    def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return _empty(*shape, dtype=dtype, device=device)

    return {
        "state": empty(SLOTS, H, P, N),
        "x": empty(*tokens, H, P),
        "dt": empty(*tokens, H, dtype=F32),
        "A": empty(H, dtype=F32),
        "B": empty(*tokens, G, N),
        "C": empty(*tokens, G, N),
        "D": empty(H, dtype=F32),
        "z": empty(*tokens, H, P),
        "dt_bias": empty(H, dtype=F32),
        "state_batch_indices": empty(BATCH, dtype=I32),
        **changes,
    }


def _reasons(arguments: Arguments) -> tuple[str, ...]:
    tensors, options = operator_arguments(SSU, arguments)
    return tuple(backend._why_not(**OPS[SSU].named(tensors, options)))


def _packed(**changes: Any) -> Arguments:
    return _call((7,), cu_seqlens=_empty(BATCH + 1, dtype=I32), max_seqlen=4, **changes)


def _drafts(length: int = 4, **changes: Any) -> Arguments:
    return _call((BATCH, length), **changes)


def _columns(count: int, dtype: torch.dtype = I32) -> Tensor:
    return _empty(BATCH, count, dtype=dtype)


def _buffer(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return _empty(*(shape or (BATCH, 4, H, P, N)), dtype=dtype)


def _page(gap: int, offset: int = 0) -> Tensor:
    size = H * P * N
    return _empty(SLOTS * (size + gap) + offset).as_strided((SLOTS, H, P, N), (size + gap, P * N, N, 1), offset)


# Calls that it can run, and how to make them: fake tensors exist only inside a test, and without CUDA in torch they
# cannot be indexed, so no slices and no expanded arguments.
SUPPORTED: dict[str, Callable[[], Arguments]] = {
    "plain": _call,
    "no_slots": lambda: _call(state=_empty(BATCH, H, P, N), state_batch_indices=None),
    "bare": lambda: _call(D=None, z=None, dt_bias=None, dt_softplus=True),
    "float32_state": lambda: _call(state=_empty(SLOTS, H, P, N, dtype=F32)),
    "float16_state": lambda: _call(state=_empty(SLOTS, H, P, N, dtype=F16)),
    "head_dim_128_state_256": lambda: _call(
        state=_empty(SLOTS, H, 128, 256),
        x=_empty(BATCH, H, 128),
        z=_empty(BATCH, H, 128),
        B=_empty(BATCH, G, 256),
        C=_empty(BATCH, G, 256),
    ),
    "three_heads_a_group_one_token": lambda: _heads(6),
    "padded_page": lambda: _call(state=_page(40)),
    "page_with_offset": lambda: _call(state=_page(40, 16)),
    "sliced_inputs": lambda: _call(
        x=_empty(BATCH, H * P + 2 * G * N).narrow(1, 0, H * P).unflatten(1, (H, P)),
        B=_empty(BATCH, H * P + 2 * G * N).narrow(1, H * P, G * N).unflatten(1, (G, N)),
    ),
    "one_sequence": lambda: _call(
        (1,), state_batch_indices=_empty(1, dtype=I32), x=_empty(1, H * P + 3).narrow(1, 0, H * P).view(1, H, P)
    ),
    "destinations": lambda: _call(dst_state_batch_indices=_empty(BATCH, dtype=I32)),
    "drafts": _drafts,
    "drafts_by_column": lambda: _drafts(state_batch_indices=_columns(4), num_accepted_tokens=_empty(BATCH, dtype=I64)),
    "drafts_kept_apart": lambda: _drafts(intermediate_states_buffer=_buffer(), disable_state_update=True),
    "packed": _packed,
    "verified_with_a_seed": lambda: _call(rand_seed=_empty(1, dtype=I64), disable_state_update=True),
}


def _heads(heads: int, tokens: tuple[int, ...] = (BATCH,)) -> Arguments:
    return _call(
        tokens,
        state=_empty(SLOTS, heads, P, N),
        x=_empty(*tokens, heads, P),
        z=_empty(*tokens, heads, P),
        **{name: _empty(heads, dtype=F32) for name in ("A", "D", "dt_bias")},
        dt=_empty(*tokens, heads, dtype=F32),
    )


def _untied() -> Arguments:
    return _call(A=_empty(H, P, N, dtype=F32), dt=_empty(BATCH, H, P, dtype=F32), dt_bias=_empty(H, P, dtype=F32))


def _mamba1() -> Arguments:
    return _call(
        state=_empty(SLOTS, H, N),
        x=_empty(BATCH, H),
        z=_empty(BATCH, H),
        A=_empty(H, N, dtype=F32),
        B=_empty(BATCH, N),
        C=_empty(BATCH, N),
    )


# Calls that it cannot run, and the reason, the only one.
REFUSED: dict[str, tuple[Callable[[], Arguments], str]] = {
    "mamba1": (_mamba1, "Mamba1"),
    "untied": (_untied, "one A and dt a head"),
    "D_by_channel": (lambda: _call(D=_empty(H, P, dtype=F32)), "one D a head"),
    "head_dim": (
        lambda: _call(state=_empty(SLOTS, H, 80, N), x=_empty(BATCH, H, 80), z=None),
        "head_dim is one of 64, 128, not 80",
    ),
    "state_size": (
        lambda: _call(state=_empty(SLOTS, H, P, 16), B=_empty(BATCH, G, 16), C=_empty(BATCH, G, 16)),
        "state size is one of 64, 96, 128, 256, not 16",
    ),
    "heads_a_group": (lambda: _heads(6, (BATCH, 4)), "heads a group are one of .* not 3"),
    "float64": (lambda: _call(state=_empty(SLOTS, H, P, N, dtype=F64)), "16 or 32 bits, and state is torch.float64"),
    "B_dtype": (lambda: _call(B=_empty(BATCH, G, N, dtype=F32)), "takes B in the dtype of x, torch.bfloat16"),
    "C_dtype": (lambda: _call(C=_empty(BATCH, G, N, dtype=F32)), "takes C in the dtype of x"),
    "z_dtype": (lambda: _call(z=_empty(BATCH, H, P, dtype=F16)), "takes z in the dtype of x"),
    "D_dtype": (lambda: _call(D=_empty(H)), "takes D in the dtype of dt, torch.float32"),
    "dt_bias_dtype": (lambda: _call(dt_bias=_empty(H)), "takes dt_bias in the dtype of dt"),
    "state_strides": (lambda: _call(state=_empty(SLOTS, H, N, P).transpose(2, 3)), "states that are contiguous"),
    "state_page": (lambda: _call(state=_page(4)), "slots start at multiples of 16 bytes"),
    "state_offset": (lambda: _call(state=_page(8, 4)), "slots start at multiples of 16 bytes"),
    "x_strides": (lambda: _call(x=_empty(BATCH, P, H).transpose(1, 2)), "x contiguous inside a token"),
    "z_strides": (lambda: _call(z=_empty(BATCH, H, 2 * P).narrow(2, 0, P)), "z contiguous inside a token"),
    "B_strides": (lambda: _call(B=_empty(BATCH, G, 2 * N).narrow(2, 0, N)), "B contiguous inside a token"),
    "C_offset": (
        lambda: _call(C=_empty(BATCH * G * N + 4).narrow(0, 4, BATCH * G * N).view(BATCH, G, N)),
        "C whose tokens start at multiples of 16 bytes",
    ),
    "x_token_stride": (
        lambda: _call(x=_empty(BATCH, H * P + 4).narrow(1, 0, H * P).unflatten(1, (H, P))),
        "x whose tokens start at multiples of 16 bytes",
    ),
    "few_slots": (lambda: _call(state=_empty(2, H, P, N)), "a slot for each of the 3 sequences, and the pool has 2"),
    "wide_pad_slot": (lambda: _call(pad_slot_id=2**40), "pad_slot_id in 32 bits"),
    "many_tokens": (lambda: _drafts(17), "up to 16 tokens a sequence, not 17"),
    "many_packed_tokens": (lambda: _packed() | {"max_seqlen": 17}, "up to 16 tokens a sequence, not 17"),
    "mixed_indices": (
        lambda: _call(dst_state_batch_indices=_empty(BATCH, dtype=I64)),
        "state_batch_indices and dst_state_batch_indices of one dtype",
    ),
    "few_columns": (lambda: _drafts(dst_state_batch_indices=_columns(2)), "after each of 4 tokens, and there are 2"),
    "few_columns_to_read": (
        lambda: _drafts(
            state_batch_indices=_columns(2),
            dst_state_batch_indices=_columns(4),
            num_accepted_tokens=_empty(BATCH, dtype=I64),
        ),
        "reads 4 columns of state_batch_indices, and there are 2",
    ),
    "buffer_and_state": (lambda: _drafts(intermediate_states_buffer=_buffer()), "wants both"),
    "buffer_rows": (
        lambda: _drafts(
            intermediate_states_buffer=_buffer(),
            intermediate_state_indices=_empty(BATCH, dtype=I32),
            disable_state_update=True,
        ),
        "out of bounds for padding",
    ),
    "buffer_dtype": (
        lambda: _drafts(intermediate_states_buffer=_buffer(dtype=F32), disable_state_update=True),
        "intermediate_states_buffer of the state's dtype",
    ),
    "buffer_strides": (
        lambda: _drafts(
            intermediate_states_buffer=_buffer(4, BATCH, H, P, N).transpose(0, 1), disable_state_update=True
        ),
        "contiguous intermediate_states_buffer",
    ),
    "bfloat16_seed": (lambda: _call(rand_seed=_empty(1, dtype=I64)), "rounds float16 states stochastically"),
    "float16_seed": (
        lambda: _call(rand_seed=_empty(1, dtype=I64), state=_empty(SLOTS, H, P, N, dtype=F16)),
        "flushes subnormal numbers to zero on this GPU",
    ),
}


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("name", SUPPORTED)
def test_nothing_speaks_against_a_supported_call(name: str) -> None:
    assert _reasons(SUPPORTED[name]()) == ()


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("name", REFUSED)
def test_a_call_that_it_cannot_run_gets_the_reason(name: str) -> None:
    make, expected = REFUSED[name]
    (reason,) = _reasons(make())
    assert re.search(expected, reason)


@pytest.mark.usefixtures("on_hopper")
def test_several_reasons_are_all_told() -> None:
    found = _reasons(_untied() | {"state": _page(4), "z": _empty(BATCH, H, P, dtype=F16)})
    assert len(found) == 3


@pytest.mark.usefixtures("on_hopper")
def test_it_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_INSTALLED", False)
    assert _reasons(_call()) == ("it needs flashinfer, which is not installed: pip install flashinfer-python",)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("capability", "make", "expected"),
    [
        ((7, 5), _call, "compute capability 8.0, not 7.5"),
        ((8, 0), _call, None),
        ((10, 0), lambda: _heads(6), "heads a group"),
        (None, lambda: _heads(6), None),
        ((10, 0), lambda: REFUSED["float16_seed"][0](), None),
        ((12, 0), lambda: REFUSED["float16_seed"][0](), "flushes subnormal"),
    ],
)
def test_the_gpu_counts(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int] | None,
    make: Callable[[], Arguments],
    expected: str | None,
) -> None:
    monkeypatch.setattr(backend, "_capability", lambda kind, index: capability)
    found = _reasons(make())
    assert len(found) == (expected is not None) and (expected is None or expected in found[0])


def test_it_runs_on_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_INSTALLED", True)
    arguments = _call(device="cpu", state_batch_indices=torch.arange(BATCH, dtype=I32))
    assert _reasons(arguments) == ("it runs on CUDA devices, and the tensors are on cpu",)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_compiler_traces_the_reasons(monkeypatch: pytest.MonkeyPatch, dynamic: bool) -> None:
    monkeypatch.setattr(backend, "_INSTALLED", True)
    counted: list[int] = []

    def count(x: Tensor, arguments: Arguments) -> Tensor:
        tensors, options = operator_arguments_of(arguments | {"x": x})
        return x.sum() * 0 + len(backend._why_not(**OPS[SSU].named(tensors, options)))

    def operator_arguments_of(arguments: Arguments) -> tuple[tuple[Any, ...], dict[str, Any]]:
        names = OPS[SSU].tensors
        options = {
            "dt_softplus": True, "pad_slot_id": -1, "max_seqlen": None, "disable_state_update": False,
            "philox_rounds": 10,
        }  # fmt: skip
        return tuple(arguments.get(name) for name in names), options

    compiled = torch.compile(count, fullgraph=True, dynamic=dynamic, backend="eager")
    for batch in (3, 4):
        arguments = _call((batch,), device="cpu", state_batch_indices=torch.arange(batch, dtype=I32))
        arguments["x"].zero_()
        counted.append(int(compiled(arguments.pop("x"), arguments)))
    assert counted == [1, 1]  # the device


# --- its results: emulated, and on a GPU ---

_BASE = _Shape(batch=3, heads=H, head_dim=P, state=N, groups=2, slots=SLOTS, skip="head", dtype=BF16, read=(7, 2, 5))
_F32 = replace(_BASE, state_dtype=F32)
CALLS: dict[str, _Shape] = {
    "no_slots": replace(_F32, read=None),
    "slots": _F32,
    "slots_with_padding": replace(_F32, read=(7, -1, 5)),
    "all_padding": replace(_F32, read=(-1, -1, -1)),
    "other_pad_slot": replace(_F32, read=(7, 0, 5), extra={"pad_slot_id": 0}),
    "one_group": replace(_F32, groups=1),
    "a_group_a_head": replace(_F32, groups=H),
    "expanded": replace(_F32, expanded=True, skip=None),
    "bare": replace(_F32, gate=False, skip=None, bias=False, softplus=False),
    "bfloat16_state": replace(_BASE, state_dtype=BF16),
    "float16_state": replace(_BASE, state_dtype=F16, read=(7, -1, 5)),
    "padded_page": replace(_F32, padded_page=True),
    "many_sequences": replace(_F32, batch=64, slots=70, read=tuple(range(69, 5, -1))),
    "many_sequences_bfloat16": replace(_BASE, batch=64, slots=70, read=tuple(range(69, 5, -1)), state_dtype=BF16),
    "many_sequences_in_padded_pages": replace(_F32, batch=64, slots=70, read=(-1, *range(69, 6, -1)), padded_page=True),
    "kept_state": replace(_F32, write=(1, 4, 3), disable=True),
    "destinations": replace(_F32, write=(1, -1, 3)),
    "one_token_with_length": replace(_F32, length=1),
    "several_tokens": replace(_F32, length=3, read=(7, -1, 5)),
    "several_tokens_no_slots": replace(_F32, length=3, read=None),
    "several_tokens_one_destination": replace(_F32, length=3, write=(1, -1, 3)),
    "slots_by_token": replace(
        _F32, length=3, read=((7, 1, 8), (2, -1, -1), (-1, 3, 3)), write=((0, 1, 6), (4, -1, 2), (3, 8, 8))
    ),
    "accepted_tokens": replace(_F32, length=3, read=((7, 1, 0), (2, 3, -1), (4, 5, 6)), accepted=(1, 2, 0)),
    "packed": replace(_F32, lengths=(2, 0, 3)),
    "packed_with_padding": replace(_F32, lengths=(2, 1, 3), read=(7, 2, -1)),
    "packed_no_slots": replace(_F32, lengths=(2, 0, 3), read=None, slots=3),
}


def _arguments(name: str, device: str) -> Arguments:
    arguments = build(Case(name, CALLS[name], frozenset()), device)
    for weight in ("dt", "D", "dt_bias"):  # of one dtype, as it wants them; A may differ
        if arguments.get(weight) is not None:
            arguments[weight] = arguments[weight].to(F32)
    if CALLS[name].expanded:  # the change of dtype made expanded tensors whole
        arguments["dt"] = arguments["dt"][..., 0].unsqueeze(-1).expand(arguments["dt"].shape)
    if arguments.get("num_accepted_tokens") is not None:  # spares a build
        arguments["num_accepted_tokens"] = arguments["num_accepted_tokens"].long()
    return arguments


def _drafts_kept(device: str) -> Arguments:
    arguments = _arguments("several_tokens", device)
    buffer = torch.randn(BATCH, 4, H, P, N, device=device)
    return arguments | {"disable_state_update": True, "intermediate_states_buffer": buffer}


def _emulated(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, out: Tensor, **given: Any
) -> None:
    """FlashInfer's function as its sources read: the strides it demands, whose output it writes, and which states."""
    channels = state.shape[1:3]
    assert A.shape == state.shape[1:] and A.stride() == (1, 0, 0) and D.shape == channels and D.stride() == (1, 0)
    assert dt.shape == x.shape == out.shape and dt.stride()[-2:] == (1, 0) and D.dtype == dt.dtype
    z, bias, packed = given["z"], given["dt_bias"], given["cu_seqlens"]
    read, write, buffer = (given[f"{n}"] for n in ("state_batch_indices", "dst_state_batch_indices", BUFFER))
    accepted, pad = given["num_accepted_tokens"], given["pad_slot_id"]
    one = x.dim() == 3 and packed is None
    assert (given["cache_steps"] >= 1) != one
    if one:
        assert write is None and accepted is None and buffer is None, "it ignores these, or writes out of bounds"
    for sequence in range(x.shape[0] if packed is None else packed.numel() - 1):
        if packed is not None:
            tokens = [(t,) for t in range(int(packed[sequence]), int(packed[sequence + 1]))]
            assert len(tokens) <= given["cache_steps"]
        else:
            tokens = [(sequence,)] if one else [(sequence, t) for t in range(x.shape[1])]
        column = 0 if accepted is None else max(int(accepted[sequence]) - 1, 0)
        slot = sequence if read is None else int(read[sequence] if read.dim() == 1 else read[sequence, column])
        h = torch.zeros(state.shape[1:]) if slot == pad else state[slot].float()
        for i, token in enumerate(tokens):
            step = dt[token].float() if bias is None else dt[token].float() + bias.float()
            step = torch.nn.functional.softplus(step) if given["dt_softplus"] else step
            b, c = (t[token].float().repeat_interleave(channels[0] // t.shape[-2], 0) for t in (B, C))
            h = h * torch.exp(step[..., None] * A) + (step * x[token].float())[..., None] * b[:, None]
            y = (h * c[:, None]).sum(-1) + D.float() * x[token].float()
            out[token] = y if z is None else y * torch.nn.functional.silu(z[token].float())
            if slot == pad:
                continue
            if write is not None:
                target = int(write[sequence] if write.dim() == 1 else write[sequence, i])
                if target != pad:
                    state[target] = h
            elif buffer is not None:
                rows = given["intermediate_state_indices"]
                buffer[slot if rows is None else int(rows[sequence]), i] = h
            elif i == len(tokens) - 1 and not given["disable_state_update"]:
                state[slot] = h


BUFFER = "intermediate_states_buffer"


@pytest.mark.parametrize("name", [*CALLS, "drafts_kept"])
def test_what_it_is_given_makes_it_compute_the_equations(
    monkeypatch: pytest.MonkeyPatch, name: str, poisoned_memory: None
) -> None:
    monkeypatch.setattr(backend, "_kernel", lambda: _emulated)
    if name.startswith("many"):
        pytest.skip("for the kernel that many sequences choose")
    arguments = _drafts_kept("cpu") if name == "drafts_kept" else _arguments(name, "cpu")
    expected = truth(SSU, arguments)
    given = copied(arguments)
    poison_unused_rows(given, expected, SSU)
    tensors, options = operator_arguments(SSU, given)
    assert_right(SSU, given, backend.selective_state_update(*tensors, **options), expected)


def test_a_sequence_with_the_number_of_padding_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_kernel", lambda: _emulated)
    arguments = _arguments("no_slots", "cpu") | {"pad_slot_id": 0}
    given, expected = copied(arguments), copied(arguments)
    tensors, options = operator_arguments(SSU, given)
    out = backend.selective_state_update(*tensors, **options)
    torch.testing.assert_close(out, tmo.selective_state_update(**expected, backend="reference"), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(given["state"], expected["state"])


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", CALLS)
def test_it_computes_the_equations(name: str, compiled: bool, poisoned_memory: None) -> None:
    pytest.importorskip("flashinfer")
    torch._dynamo.reset()
    arguments = _arguments(name, "cuda")
    expected = truth(SSU, arguments)
    given = copied(arguments)
    poison_unused_rows(given, expected, SSU)

    def step(given: Arguments) -> Tensor:
        return tmo.selective_state_update(**given, backend="flashinfer")

    run = torch.compile(step, fullgraph=True) if compiled else step
    assert_right(SSU, given, run(given), expected)


@pytest.mark.gpu
def test_it_keeps_the_states_of_drafts(poisoned_memory: None) -> None:
    pytest.importorskip("flashinfer")
    arguments = _drafts_kept("cuda")
    expected = truth(SSU, arguments)
    given = copied(arguments)
    out = tmo.selective_state_update(**given, backend="flashinfer")
    assert_right(SSU, given, out, expected)


@pytest.mark.gpu
def test_a_cuda_graph_replays_it() -> None:
    pytest.importorskip("flashinfer")
    arguments = _arguments("slots_with_padding", "cuda") | {"D": None}
    expected = copied(arguments)
    wanted = [tmo.selective_state_update(**expected, backend="reference") for _ in range(2)]
    given = copied(arguments)
    tmo.selective_state_update(**copied(arguments), backend="flashinfer")  # builds and loads it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tmo.selective_state_update(**given, backend="flashinfer")
    for want in wanted:
        graph.replay()
        torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(given["state"], expected["state"], rtol=1e-4, atol=1e-4)
