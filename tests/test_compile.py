"""Compiled code of stateful layers: one graph, few graphs over many sizes, the state updated where it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.testing import FileCheck

import torch_mamba_ops as tmo

HEADS, DIM, STATE, GROUPS, SLOTS = 4, 8, 16, 2, 37
SIZE = HEADS * DIM * STATE
SIZES = (2, 3, 5, 8, 9, 16, 17, 24, 31, 33)


class Layer(torch.nn.Module):
    """A Mamba2 decode step between two projections."""

    def __init__(self, pool: Tensor) -> None:
        super().__init__()
        self.width = HEADS * DIM
        self.inner = torch.nn.Linear(self.width, 2 * self.width + 2 * GROUPS * STATE + HEADS)
        self.outer = torch.nn.Linear(self.width, self.width)
        self.A = torch.nn.Parameter(-torch.rand(HEADS) - 1, requires_grad=False)
        self.register_buffer("pool", pool)

    def forward(self, hidden: Tensor, slots: Tensor | None) -> Tensor:
        x, z, bc, dt = self.inner(hidden).split([self.width, self.width, 2 * GROUPS * STATE, HEADS], -1)
        B, C = bc.unflatten(-1, (2, GROUPS, STATE)).unbind(1)
        tokens = (hidden.shape[0], HEADS, DIM)
        y = tmo.selective_state_update(
            self.pool,
            x.view(tokens),
            dt[..., None].expand(tokens),
            self.A[:, None, None].expand(HEADS, DIM, STATE),
            B,
            C,
            z=z.reshape(tokens),
            dt_softplus=True,
            state_batch_indices=slots,
        )
        return hidden + self.outer(y.flatten(1))


def _stack(layers: int = 3) -> torch.nn.Module:
    torch.manual_seed(0)
    # One padded allocation a layer: layers that share one are given a common base by AOTAutograd, and an inlined
    # update then copies that layer's states (the values stay right).
    pools = [torch.randn(SLOTS, SIZE + 16)[:, :SIZE].view(SLOTS, HEADS, DIM, STATE) for _ in range(layers)]

    class Stack(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(Layer(pool) for pool in pools)

        def forward(self, hidden: Tensor, slots: Tensor | None) -> Tensor:
            for layer in self.layers:
                hidden = layer(hidden, slots)
            return hidden

    return Stack().requires_grad_(False)


def test_a_stack_of_layers_makes_at_most_two_graphs_over_ten_batches() -> None:
    counter = CompileCounterWithBackend("inductor")
    eager, stack = _stack(), _stack()
    torch._dynamo.reset()
    compiled = torch.compile(stack, backend=counter, fullgraph=True)
    for batch in SIZES:
        hidden, slots = torch.randn(batch, HEADS * DIM), torch.randperm(SLOTS, dtype=torch.int32)[:batch]
        torch.testing.assert_close(compiled(hidden, slots), eager(hidden, slots))
    assert counter.frame_count <= 2
    for layer, like in zip(stack.layers, eager.layers, strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(layer.pool, like.pool)


@pytest.mark.parametrize("with_slots", [True, False])
def test_the_state_is_updated_in_place_and_never_cloned(with_slots: bool) -> None:
    stack, eager = _stack(), _stack()
    batch = 5 if with_slots else SLOTS
    slots = torch.randperm(SLOTS, dtype=torch.int32)[:batch] if with_slots else None
    hidden = torch.randn(batch, HEADS * DIM)
    addresses = [layer.pool.data_ptr() for layer in stack.layers]
    torch._dynamo.reset()
    result, (code,) = run_and_get_code(torch.compile(stack, fullgraph=True), hidden, slots)
    torch.testing.assert_close(result, eager(hidden, slots))
    assert [layer.pool.data_ptr() for layer in stack.layers] == addresses
    for layer, like in zip(stack.layers, eager.layers, strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(layer.pool, like.pool)
    wrapper = code[code.index("def call(") :]
    FileCheck().check_not("torch_mamba_ops").check_not("aten.clone").check_not(".copy_(").run(wrapper)
    made = [line for line in wrapper.splitlines() if "= empty_strided_cpu(" in line]
    assert made and not [line for line in made if f"(({SLOTS}, {HEADS}, {DIM}, {STATE})" in line]


def _step(state: Tensor, arguments: dict[str, Tensor]) -> Tensor:
    return tmo.selective_state_update(state, **arguments, dt_softplus=True)


def _arguments(batch: int = 3) -> dict[str, Tensor]:
    return {
        "x": torch.randn(batch, HEADS, DIM),
        "dt": torch.randn(batch, HEADS),
        "A": -torch.rand(HEADS) - 1,
        "B": torch.randn(batch, GROUPS, STATE),
        "C": torch.randn(batch, GROUPS, STATE),
    }


def _opaque() -> str:
    """The reference behind an opaque boundary: what a third-party kernel looks like to the compiler."""
    from torch_mamba_ops.dispatch import OPS
    from torch_mamba_ops.ops.selective_state_update.reference import selective_state_update

    if "boxed" not in OPS["selective_state_update"].backends:
        tmo.register_backend("selective_state_update", "boxed", version="1")(selective_state_update)
    return "boxed"


@pytest.mark.parametrize("backend", ["reference", "boxed"])
def test_the_same_pool_updated_twice(backend: str) -> None:
    _opaque()

    def twice(state: Tensor, first: dict[str, Tensor], second: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return _step(state, first), _step(state, second)

    first, second, state = _arguments(), _arguments(), torch.randn(3, HEADS, DIM, STATE)
    other = state.clone()
    want = twice(state, first, second)
    torch._dynamo.reset()
    with tmo.use_backend(selective_state_update=backend):
        got = torch.compile(twice, fullgraph=True)(other, first, second)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(other, state)


def _snapshot(state: Tensor, arguments: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    before = state.clone()
    return before, _step(state, arguments)


def test_a_clone_before_the_update_keeps_the_old_state() -> None:
    """PyTorch issue 198031: a clone that only a mutating op's own argument competes with is removed."""
    state, arguments = torch.randn(3, HEADS, DIM, STATE), _arguments()
    old = state.clone()
    torch._dynamo.reset()
    before, _ = torch.compile(_snapshot, fullgraph=True)(state, arguments)
    assert torch.equal(before, old) and not torch.equal(state, old)


def test_a_clone_of_the_state_as_another_argument_of_the_update() -> None:
    """The silent half of PyTorch issue 198031: the op reads a clone of what it mutates."""

    def roll_back(state: Tensor, pool: Tensor, slots: Tensor) -> None:
        saved = state.clone()
        tmo.copy_states(saved, state, slots, slots.flip(0))

    state, slots = torch.randn(4, 6), torch.tensor([0, 1, 2, 3])
    want = state.flip(0)
    torch._dynamo.reset()
    torch.compile(roll_back, fullgraph=True)(state, state, slots)
    assert torch.equal(state, want)


def test_a_state_that_is_a_view_of_a_padded_page() -> None:
    page = torch.full((5, SIZE + 24), 9.0)

    def step(page: Tensor, slots: Tensor, arguments: dict[str, Tensor]) -> Tensor:
        state = page[:, 8 : 8 + SIZE].view(5, HEADS, DIM, STATE)
        return tmo.selective_state_update(state, **arguments, state_batch_indices=slots)

    arguments, slots = _arguments(), torch.tensor([4, -1, 1])
    page[:, 8:-16] = torch.randn(5, SIZE)
    other = page.clone()
    want = step(page, slots, arguments)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(other, slots, arguments), want)
    torch.testing.assert_close(other, page)
    assert other[:, :8].eq(9).all() and other[:, -16:].eq(9).all()


def test_inference_mode_and_no_grad() -> None:
    state, arguments = torch.randn(3, HEADS, DIM, STATE), _arguments()
    want = _step(state.clone(), arguments)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            torch.testing.assert_close(_step(state.clone(), arguments), want)
            torch._dynamo.reset()
            compiled: Any = torch.compile(_step, fullgraph=True)
            torch.testing.assert_close(compiled(state.clone(), arguments), want)
