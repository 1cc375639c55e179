"""Ten sizes above one make at most two graphs (the first is static, as long as only one size was seen)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import torch_mamba_ops as tmo

LENGTHS = (2, 3, 5, 8, 9, 16, 17, 40, 64, 77)
H, P, N, G, SLOTS = 4, 6, 5, 2, 80


def _slots(count: int) -> torch.Tensor:
    return torch.randperm(SLOTS, dtype=torch.int32)[:count]


def _starts(tokens: int) -> torch.Tensor:
    sequences = tokens + 1  # some are empty
    return torch.linspace(0, tokens, sequences + 1).int()


def _update(size: int) -> dict[str, Any]:
    return {
        "state": torch.randn(SLOTS, H, P, N),
        "x": torch.randn(size, H, P),
        "dt": torch.randn(size, H),
        "A": -torch.rand(H) - 1,
        "B": torch.randn(size, G, N),
        "C": torch.randn(size, G, N),
        "state_batch_indices": _slots(size),
    }


def _update_several(size: int) -> dict[str, Any]:
    several = {n: t.unsqueeze(1).expand(-1, 3, *t.shape[1:]).clone() for n, t in _update(size).items() if n in "xdtBC"}
    return {**_update(size), **several}


def _update_packed(size: int) -> dict[str, Any]:
    starts = _starts(size)
    return {**_update(size), "state_batch_indices": _slots(len(starts) - 1), "cu_seqlens": starts, "max_seqlen": 8}


def _scan(size: int) -> dict[str, Any]:
    return {
        "x": torch.randn(2, size, H, P),
        "dt": torch.rand(2, size, H),
        "A": -torch.rand(H) - 1,
        "B": torch.randn(2, size, G, N),
        "C": torch.randn(2, size, G, N),
        "chunk_size": 16,
        "initial_states": torch.randn(2, H, P, N),
        "return_final_states": True,
    }


def _scan_batch(size: int) -> dict[str, Any]:
    return {n: torch.cat([t[:1]] * size) if n in "xdtBC" or n == "initial_states" else t for n, t in _scan(21).items()}


def _scan_packed(size: int) -> dict[str, Any]:
    dense, starts = _scan(size), _starts(size)
    tokens = {n: t[0] if n in "xdtBC" else t for n, t in dense.items() if n in ("x", "dt", "A", "B", "C", "chunk_size")}
    given = {"states": torch.randn(SLOTS, H, P, N), "state_indices": _slots(len(starts) - 1), "cu_seqlens": starts}
    return {**tokens, **given, "has_initial_state": torch.ones(len(starts) - 1, dtype=torch.bool)}


def _selective(size: int) -> dict[str, Any]:
    u, projection = torch.randn(2, 7, size), torch.randn(2, N, size)
    return {
        "u": u,
        "delta": torch.rand(2, 7, size),
        "A": -torch.rand(7, N) - 1,
        "B": projection,
        "C": projection.flip(1),
    }


def _convolution(size: int) -> dict[str, Any]:
    x = torch.randn(2, size, 9).transpose(1, 2)
    return {"x": x, "weight": torch.randn(9, 4), "activation": "silu", "return_final_states": True}


def _convolution_step(size: int) -> dict[str, Any]:
    return {
        "x": torch.randn(size, 9),
        "conv_state": torch.randn(SLOTS, 9, 3),
        "weight": torch.randn(9, 4),
        "conv_state_indices": _slots(size),
    }


def _convolution_packed(size: int) -> dict[str, Any]:
    starts = _starts(size)
    return {
        "x": torch.randn(size, 9).t(),
        "weight": torch.randn(9, 4),
        "bias": None,
        "conv_states": torch.randn(SLOTS, 9, 3),
        "query_start_loc": starts,
        "cache_indices": _slots(len(starts) - 1),
    }


def _norm(size: int) -> dict[str, Any]:
    return {"x": torch.randn(size, 12), "weight": torch.randn(12), "z": torch.randn(size, 12), "group_size": 4}


def _copy(size: int) -> dict[str, Any]:
    return {
        "src_pool": torch.randn(SLOTS, 7),
        "dst_pool": torch.randn(SLOTS, 7),
        "src_indices": _slots(size),
        "dst_indices": _slots(size),
    }


CALLS: list[tuple[Callable[..., Any], Callable[[int], dict[str, Any]]]] = [
    (tmo.selective_state_update, _update),
    (tmo.selective_state_update, _update_several),
    (tmo.selective_state_update, _update_packed),
    (tmo.mamba_chunk_scan_combined, _scan),
    (tmo.mamba_chunk_scan_combined, _scan_batch),
    (tmo.mamba_chunk_scan_combined_varlen, _scan_packed),
    (tmo.selective_scan_fn, _selective),
    (tmo.causal_conv1d_fn, _convolution),
    (tmo.causal_conv1d_update, _convolution_step),
    (tmo.causal_conv1d_varlen_fn, _convolution_packed),
    (tmo.rms_norm_gated, _norm),
    (tmo.copy_states, _copy),
]


def _values(result: Any, arguments: dict[str, Any]) -> list[torch.Tensor]:
    outputs = () if result is None else result if isinstance(result, tuple) else (result,)
    return [*outputs, *(t for n, t in arguments.items() if "state" in n and isinstance(t, torch.Tensor))]


@pytest.mark.parametrize(("function", "build"), CALLS, ids=[build.__name__[1:] for _, build in CALLS])
def test_ten_sizes_make_at_most_two_graphs(
    function: Callable[..., Any], build: Callable[[int], dict[str, Any]]
) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(lambda arguments: function(**arguments), backend=counter, fullgraph=True)
    for size in LENGTHS:
        arguments = build(size)
        eager = {
            n: t.clone(memory_format=torch.preserve_format) if isinstance(t, torch.Tensor) else t
            for n, t in arguments.items()
        }
        got, want = compiled(arguments), function(**eager)
        for one, other in zip(_values(got, arguments), _values(want, eager), strict=True):
            torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4)
    assert counter.frame_count <= 2


def test_a_stack_of_scans_makes_at_most_two_graphs_over_ten_lengths() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(24, 24 + 2 * G * N + H)
            self.filter = torch.nn.Parameter(torch.randn(24, 4))
            self.norm = torch.nn.Parameter(torch.ones(24))
            self.A = torch.nn.Parameter(-torch.rand(H) - 1)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            x, B, C, dt = self.inner(hidden).split([24, G * N, G * N, H], -1)
            x = tmo.causal_conv1d_fn(x.transpose(1, 2), self.filter, activation="silu").transpose(1, 2)
            y = tmo.mamba_chunk_scan_combined(
                x.unflatten(-1, (H, P)),
                dt,
                self.A,
                B.unflatten(-1, (G, N)),
                C.unflatten(-1, (G, N)),
                16,
                dt_softplus=True,
            )
            return hidden + tmo.rms_norm_gated(y.flatten(-2), self.norm)

    torch.manual_seed(0)
    torch._dynamo.reset()
    stack = torch.nn.Sequential(*(Layer() for _ in range(3)))
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(stack, backend=counter, fullgraph=True)
    with torch.no_grad():
        for length in LENGTHS:
            hidden = torch.randn(2, length, 24)
            torch.testing.assert_close(compiled(hidden), stack(hidden), rtol=2e-4, atol=2e-4)
    assert counter.frame_count <= 2
