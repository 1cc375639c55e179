"""The pool of slots: memory, slots taken and given back, buffers of modules, layouts; and the specs it is made from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_mamba_ops as tmo
from torch_mamba_ops import settings
from torch_mamba_ops.state import MambaStateSpec, PoolExhaustedError, StatePool

HALF = {"conv_dtype": torch.bfloat16, "ssm_dtype": torch.float16}


def _specs(**options: Any) -> dict[int, MambaStateSpec]:
    """Layers of every kind, some of odd sizes."""
    return {
        1: MambaStateSpec.mamba2(4, 6, 5, groups=2, **options),
        3: MambaStateSpec.mamba1(7, 3, **options),
        4: MambaStateSpec.short_conv(5, conv_width=4, **options),
        9: MambaStateSpec.mamba2(2, 8, 16, **options),
    }


def _every(pool: StatePool) -> list[Tensor]:
    return [t for layer in pool.values() for t in (layer.conv_state, layer.ssm_state) if t is not None]


# --- memory ---


@pytest.mark.parametrize("layout", ["SD", "DS"])
@pytest.mark.parametrize("options", [{}, HALF, {"conv_dtype": torch.float64, "speculative_tokens": 3}], ids=str)
def test_layers_have_their_shapes_and_share_no_byte(layout: str, options: dict[str, Any]) -> None:
    pool = StatePool(_specs(**options), 3, conv_layout=layout)
    for number, tensor in enumerate(_every(pool)):
        tensor.fill_(number + 1)
    for number, tensor in enumerate(_every(pool)):
        assert bool((tensor == number + 1).all())
    for index, spec in pool.specs.items():
        window, state = pool[index].conv_state, pool[index].ssm_state
        assert window is not None and window.shape == (3, *spec.conv_shape) and window.dtype == spec.conv_dtype
        assert window.stride(1 if layout == "SD" else 2) == 1
        if spec.ssm_shape is None:
            assert state is None
        else:
            assert state is not None and state.shape == (3, *spec.ssm_shape) and state.dtype == spec.ssm_dtype
            assert state[0].is_contiguous() and state.data_ptr() % 256 == pool.pages.data_ptr() % 256


def test_a_slot_is_one_page_of_one_allocation() -> None:
    pool = StatePool(_specs(), 4, page_bytes=4096)
    assert pool.pages.is_contiguous() and pool.page_bytes % 4096 == 0
    before = pool.pages.clone()
    for tensor in _every(pool):
        tensor[2] = 1
    assert torch.equal(pool.pages[[0, 1, 3]], before[[0, 1, 3]]) and not torch.equal(pool.pages[2], before[2])
    for tensor in _every(pool):
        assert tensor.stride(0) * tensor.element_size() == pool.page_bytes
        assert 0 <= tensor.data_ptr() - pool.pages.data_ptr() < pool.page_bytes


def test_given_memory_is_used_as_it_is() -> None:
    needed = 3 * StatePool(_specs(), 1).page_bytes
    memory = torch.ones(needed + 16, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % 16 :]
    pool = StatePool(_specs(), 3, memory=memory)
    assert pool.pages.data_ptr() == memory.data_ptr() and bool((pool.pages == 1).all())
    with pytest.raises(ValueError, match=rf"memory: got {needed - 1} bytes, expected {needed}"):
        StatePool(_specs(), 3, memory=memory[: needed - 1])
    with pytest.raises(ValueError, match=r"memory: got torch.float32"):
        StatePool(_specs(), 3, memory=memory[:needed].view(torch.float32))
    with pytest.raises(ValueError, match="memory: begins between multiples of 16"):
        StatePool(_specs(), 3, memory=torch.ones(needed + 32, dtype=torch.uint8)[-memory.data_ptr() % 16 + 1 :])


def test_states_outlive_the_pool() -> None:
    states = StatePool(_specs(), 2)[1]
    other = [torch.full((1 << 16,), 3.0) for _ in range(16)]
    assert states.ssm_state is not None and float(states.ssm_state.abs().sum()) == 0 and other


# --- slots ---


def test_slots_are_taken_given_back_and_taken_again() -> None:
    pool = StatePool(_specs(), 4)
    assert pool.allocate(3) == [0, 1, 2] and pool.free_slots == 1
    pool.free([1, 0])
    assert sorted(pool.allocate(2)) == [0, 1]
    assert pool.allocate() == [3] and pool.free_slots == 0
    assert repr(pool).startswith("StatePool(4 layers, 4 of 4 slots taken")


def test_an_exhausted_pool_takes_nothing() -> None:
    pool = StatePool(_specs(), 3)
    pool.allocate(2)
    with pytest.raises(PoolExhaustedError, match="has 1 of 3 slots free, 2 were asked for"):
        pool.allocate(2)
    assert pool.free_slots == 1
    (last,) = pool.allocate()
    with pytest.raises(PoolExhaustedError, match="has 0 of 3"):
        pool.fork(last)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (2, "got slot 2, which is free already"),
        ([0, 0], r"got \[0, 0\], expected each slot once"),
        ([0, 4], "got slot 4, expected 0 to 3"),
        (-1, "got slot -1, expected 0 to 3"),
    ],
)
def test_slots_that_are_not_taken_are_not_given_back(slots: Any, message: str) -> None:
    pool = StatePool(_specs(), 4)
    pool.allocate(2)
    with pytest.raises(ValueError, match=message):
        pool.free(slots)
    assert pool.free_slots == 2


def test_a_slot_is_not_freed_twice() -> None:
    pool = StatePool(_specs(), 4)
    (slot,) = pool.allocate()
    pool.free(slot)
    with pytest.raises(ValueError, match="freed twice"):
        pool.free(slot)


def test_a_fork_has_the_same_states_and_its_own_slot() -> None:
    pool = StatePool(_specs(), 4)
    (slot,) = pool.allocate()
    for tensor in _every(pool):
        tensor[slot].normal_()
    forks = pool.fork(slot, 2)
    assert len({slot, *forks}) == 3
    for tensor in _every(pool):
        assert torch.equal(tensor[forks[0]], tensor[slot]) and torch.equal(tensor[forks[1]], tensor[slot])
        assert bool(tensor[slot].any())
    with pytest.raises(ValueError, match="which is free already"):
        pool.fork(3)


def test_reset_zeroes_the_slots_it_is_given() -> None:
    pool = StatePool(_specs(), 4)
    for slots, zeroed in ((2, [2]), ([0, 1], [0, 1]), (torch.tensor([3, 1]), [1, 3]), (None, [0, 1, 2, 3])):
        for tensor in _every(pool):
            tensor.fill_(1)
        pool.reset(slots)
        for tensor in _every(pool):
            assert [slot for slot in range(4) if not tensor[slot].any()] == zeroed
    with pytest.raises(ValueError, match="got slot 4"):
        pool.reset([4])


# --- layouts, buffers ---


def test_the_layout_is_the_settings_the_specs_or_the_arguments() -> None:
    with settings.use(conv_state_layout="DS"):
        specs = _specs()
    assert {spec.conv_layout for spec in StatePool(specs, 1).specs.values()} == {"DS"}
    assert {spec.conv_layout for spec in StatePool(specs, 1, conv_layout="sd").specs.values()} == {"SD"}
    assert {spec.conv_layout for spec in StatePool(_specs(), 1).specs.values()} == {"SD"}
    for given in ("DSD", None):
        with pytest.raises(ValueError, match=r"conv_layout: got .*, expected one of 'SD', 'DS'"):
            if given is None:
                MambaStateSpec.short_conv(4, conv_layout="dim first")
            else:
                StatePool(specs, 1, conv_layout=given)


def test_layers_whose_windows_differ_need_a_pool_each() -> None:
    specs = [MambaStateSpec.short_conv(4), MambaStateSpec.short_conv(4, conv_width=4)]
    with pytest.raises(
        ValueError, match=r"got windows of 3 taps, 2 columns .*; 4 taps, 3 .*expected the same for all layers"
    ):
        StatePool(specs, 1)
    with pytest.raises(ValueError, match="specs: got none"):
        StatePool({}, 1)
    with pytest.raises(ValueError, match="slots: got 0"):
        StatePool(specs[:1], 0)
    with pytest.raises(ValueError, match="page_bytes: got 100, expected a multiple of 256"):
        StatePool(specs[:1], 1, page_bytes=100)


class Layer(torch.nn.Module):
    """A convolution over a buffer."""

    conv_state: Tensor
    ssm_state: Tensor

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        weight = torch.ones(x.shape[1], 4)
        return tmo.causal_conv1d_update(x, self.conv_state, weight, conv_state_indices=slots)


def test_buffers_of_modules_are_the_pools_memory_and_not_in_state_dicts() -> None:
    pool = StatePool(_specs(), 3)
    layers = {index: Layer() for index in pool}
    pool.register(layers)
    assert layers[1].conv_state is pool[1].conv_state and layers[9].ssm_state is pool[9].ssm_state
    assert not hasattr(layers[4], "ssm_state") and not layers[1].state_dict()
    with pytest.raises(KeyError, match="layer 2 has no states here; those that have: 1, 3, 4, 9"):
        pool.register({2: Layer()})
    assert pool.moved_buffers() == []
    layers[1].double()
    assert pool.moved_buffers() == ["conv_state", "ssm_state"]


@pytest.mark.parametrize("layout", ["SD", "DS"])
def test_layers_that_share_a_page_compile_to_one_graph_that_writes_them(layout: str) -> None:
    """As buffers and as inputs, of dtypes that differ: views of one tensor could not be."""
    specs = [
        MambaStateSpec.mamba2(2, 4, 8, conv_layout=layout, ssm_dtype=dtype) for dtype in (torch.float32, torch.float64)
    ]
    pool, other = StatePool(specs, 3), StatePool(specs, 3)
    slots = torch.tensor([2, 0], dtype=torch.int32)
    x, dt, A, B = torch.randn(2, 2, 4), torch.rand(2, 2), -torch.rand(2), torch.randn(2, 1, 8)
    inputs = torch.randn(2, specs[0].conv_dim)

    def step(layers: list[Layer], states: list[Tensor]) -> list[Tensor]:
        convolved = [layer(inputs, slots) for layer in layers]
        return convolved + [tmo.selective_state_update(s, x, dt, A, B, B, state_batch_indices=slots) for s in states]

    found = []
    torch._dynamo.reset()
    for each, run in ((pool, step), (other, torch.compile(step, fullgraph=True))):
        layers = {index: Layer() for index in each}
        each.register(layers)
        states = [each[index].ssm_state for index in each]
        with torch.no_grad():
            found.append([run(list(layers.values()), states) for _ in range(3)])
    torch.testing.assert_close(found[1], found[0])
    for one, two in zip(_every(pool), _every(other), strict=True):
        torch.testing.assert_close(one.float(), two.float())
        assert not one[1].any() and one[0].any()


def test_addresses_are_static_for_the_compiler() -> None:
    pool = StatePool(_specs(), 2)
    steps = [layer.ssm_state for layer in pool.intermediate(1, 2).values()]
    assert all(hasattr(tensor, "_dynamo_static_input_type") for tensor in (*_every(pool), *steps))


def test_a_buffer_of_states_after_each_token_has_every_layers() -> None:
    pool = StatePool(_specs(**HALF), 2)
    steps = pool.intermediate(3, 5)
    assert list(steps) == [1, 3, 9]
    for index, layer in steps.items():
        assert layer.ssm_state is not None and layer.conv_state is None
        assert layer.ssm_state.shape == (3, 5, *(pool.specs[index].ssm_shape or ()))
        assert layer.ssm_state.dtype == torch.float16 and layer.ssm_state[0, 0].is_contiguous()
        layer.ssm_state.fill_(index)
    assert all(bool((steps[index].ssm_state == index).all()) for index in steps)
    with pytest.raises(ValueError, match="pool: got one without SSM states"):
        StatePool([MambaStateSpec.short_conv(4)], 1).intermediate(1, 1)
    with pytest.raises(ValueError, match="rows, tokens: got 0, 1"):
        pool.intermediate(0, 1)


CONVOLUTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "one token": lambda x, w, pool: tmo.causal_conv1d_update(x[:3], pool, w, conv_state_indices=SLOTS),
    "several": lambda x, w, pool: tmo.causal_conv1d_update(
        x[:6].view(3, -1, 2), pool, w, None, "silu", conv_state_indices=SLOTS
    ),
    "accepted": lambda x, w, pool: tmo.causal_conv1d_update(
        x[:9].view(3, -1, 3), pool, w, conv_state_indices=SLOTS, num_accepted_tokens=torch.tensor([1, 3, 2])
    ),
    "packed": lambda x, w, pool: tmo.causal_conv1d_update(
        x, pool, w, conv_state_indices=SLOTS, query_start_loc=STARTS, max_query_len=6
    ),
    "ring": lambda x, w, pool: tmo.causal_conv1d_update(
        x[:3], pool, w, None, None, torch.tensor([3, 0, 11]), SLOTS
    ),
    "prefill": lambda x, w, pool: tmo.causal_conv1d_varlen_fn(
        x.t(), w, None, pool[..., :3], STARTS, cache_indices=SLOTS, has_initial_state=torch.tensor([True, False, True])
    ),
}  # fmt: skip
SLOTS, STARTS = torch.tensor([4, 0, 2]), torch.tensor([0, 6, 6, 10])


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_both_layouts_give_equal_results_in_every_operation(kind: str, compiled: bool) -> None:
    spec = MambaStateSpec.mamba2(2, 8, 4, speculative_tokens=2)
    generator = torch.Generator().manual_seed(0)
    x, weight, start = (torch.randn(shape, generator=generator) for shape in ((12, 24), (24, 4), (5, *spec.conv_shape)))
    found = []
    for layout in ("SD", "DS"):
        pool = StatePool([spec, spec], 5, conv_layout=layout)
        window = pool[1].conv_state
        assert window is not None
        window.copy_(start)
        torch._dynamo.reset()
        run = torch.compile(CONVOLUTIONS[kind], fullgraph=True) if compiled else CONVOLUTIONS[kind]
        found.append((run(x, weight, window), window))
    (one, one_window), (other, other_window) = found
    torch.testing.assert_close(one, other)
    assert torch.equal(one_window, other_window) and not torch.equal(one_window, start)
    assert torch.equal(one_window[[1, 3]], start[[1, 3]])
