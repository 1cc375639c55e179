"""Planned copies: speculative decoding and prefix caching over paged states, faults, compiled graphs, every layout."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_mamba_ops as tmo
from torch_mamba_ops.state import MambaStateSpec, StateCopyPlan, StatePlanError, StatePool, graph

LAYOUTS = ["SD", "DS"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HEADS, HEAD_DIM, STATE, GROUPS, WIDTH, DRAFTS, BLOCK = 4, 6, 8, 2, 4, 2, 4
TOKENS = 1 + DRAFTS


def _specs(layout: str = "SD", **changes: Any) -> list[MambaStateSpec]:
    """Two layers that differ in size."""
    options: dict[str, Any] = {"conv_layout": layout, "speculative_tokens": DRAFTS, "groups": GROUPS, **changes}
    return [MambaStateSpec.mamba2(h, HEAD_DIM, STATE, conv_width=WIDTH, **options) for h in (HEADS, 2 * HEADS)]


def _randomised(pool: StatePool, seed: int = 0) -> StatePool:
    generator = torch.Generator().manual_seed(seed)
    for layer in pool.values():
        for tensor in (layer.conv_state, layer.ssm_state):
            if tensor is not None:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return pool


def _states(pool: StatePool) -> list[Tensor]:
    return [t.clone() for layer in pool.values() for t in (layer.conv_state, layer.ssm_state) if t is not None]


def _index(values: Any, device: str | torch.device = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _assert_same(found: Tensor, wanted: Tensor) -> None:
    """Up to roundings of float32 through the layers. A state that is wrong shows as 0.1 and more."""
    apart = float((found - wanted).norm() / wanted.norm())
    assert apart < 1e-5, apart


# --- a small engine: the same tokens come out however they were batched, drafted, cached ---


class Model:
    """Mamba2 layers without projections but one: convolution, state update, a matrix; tokens are rows of a table."""

    def __init__(self, specs: list[MambaStateSpec], vocabulary: int, device: str) -> None:
        generator = torch.Generator().manual_seed(7)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        self.specs = specs
        self.table = normal(vocabulary, specs[0].conv_dim)
        self.layers = [
            {
                "weight": normal(spec.conv_dim, WIDTH),
                "bias": normal(spec.conv_dim),
                "A": -normal(spec.heads).abs(),
                "D": normal(spec.heads),
                "dt": 0.1 + normal(spec.heads).abs(),
                "out": 0.1 * normal(spec.heads * HEAD_DIM, specs[(i + 1) % len(specs)].conv_dim),
            }
            for i, spec in enumerate(specs)
        ]

    def _split(self, y: Tensor, spec: MambaStateSpec) -> tuple[Tensor, Tensor, Tensor]:
        x, B, C = y.split([spec.heads * HEAD_DIM, GROUPS * STATE, GROUPS * STATE], -1)
        B, C = (t.unflatten(-1, (GROUPS, STATE)) for t in (B, C))
        return x.unflatten(-1, (spec.heads, HEAD_DIM)), B, C

    def prefill(self, pool: StatePool, tokens: Tensor, starts: Tensor, slots: Tensor, going_on: Tensor) -> Tensor:
        h = self.table[tokens]
        for index, (spec, p) in enumerate(zip(self.specs, self.layers, strict=True)):
            states = pool[index]
            assert states.conv_state is not None
            y = tmo.causal_conv1d_varlen_fn(
                h.t(), p["weight"], p["bias"], states.conv_state[..., : WIDTH - 1], starts,
                cache_indices=slots, has_initial_state=going_on, activation="silu",
            ).t()  # fmt: skip
            x, B, C = self._split(y, spec)
            y = tmo.mamba_chunk_scan_combined_varlen(
                x, p["dt"].expand(len(tokens), -1), p["A"], B, C, 16, starts, D=p["D"], states=states.ssm_state,
                state_indices=slots, has_initial_state=going_on,
            )  # fmt: skip
            h = y.flatten(-2) @ p["out"]
        return h

    def decode(self, pool: StatePool, tokens: Tensor, slots: Tensor, steps: Any) -> Tensor:
        """``tokens`` ``[batch, length]``; the SSM states are not updated but kept in ``steps``."""
        h = self.table[tokens]
        accepted = torch.ones_like(slots)
        for index, (spec, p) in enumerate(zip(self.specs, self.layers, strict=True)):
            states = pool[index]
            assert states.conv_state is not None and states.ssm_state is not None
            y = tmo.causal_conv1d_update(
                h.transpose(1, 2), states.conv_state, p["weight"], p["bias"], "silu", conv_state_indices=slots,
                num_accepted_tokens=accepted,
            ).transpose(1, 2)  # fmt: skip
            x, B, C = self._split(y, spec)
            y = tmo.selective_state_update(
                states.ssm_state, x, p["dt"].expand(*tokens.shape, -1), p["A"], B, C, p["D"],
                state_batch_indices=slots, intermediate_states_buffer=steps[index].ssm_state,
                disable_state_update=True,
            )  # fmt: skip
            h = y.flatten(-2) @ p["out"]
        return h

    def whole(self, tokens: Tensor) -> Tensor:
        """All tokens of one sequence at once."""
        pool = StatePool(self.specs, 1, device=tokens.device)
        starts = _index([0, len(tokens)], tokens.device)
        going_on = torch.zeros(1, dtype=torch.bool, device=tokens.device)
        return self.prefill(pool, tokens, starts, _index([0], tokens.device), going_on)


def serve(layout: str, device: str = "cpu") -> list[Tensor]:
    """Speculative decoding with prefix caching: prefill that ends at blocks, drafts of which some are wrong, a second
    wave of sequences that go on from blocks of the first. All outputs are compared with the sequences run whole.

    Returns:
        The outputs, for comparing layouts.
    """
    vocabulary, length, prompt = 50, 23, 10
    specs = _specs(layout)
    model = Model(specs, vocabulary, device)
    pool = _randomised(StatePool(specs, 64, device=device))  # what is in unused slots must not matter
    steps = pool.intermediate(3, TOKENS)
    plan = StateCopyPlan(pool, intermediate=steps, block_size=BLOCK)
    generator = torch.Generator().manual_seed(3)
    first = torch.randint(vocabulary, (3, length), generator=generator)
    second = first.clone()
    shared = [2, 3, 1]  # blocks of the first wave with which the second begins: before and among the drafted tokens
    for row, blocks in enumerate(shared):
        second[row, blocks * BLOCK :] = torch.randint(vocabulary, (length - blocks * BLOCK,), generator=generator)

    outputs = []
    cached: list[list[int]] = []
    for truth in (first, second):
        tables = [pool.allocate(-(-(length + DRAFTS) // BLOCK)) for _ in range(3)]
        begin = [0] * 3
        if cached:
            begin = [blocks * BLOCK for blocks in shared]
            tables = [old[:n] + new[n:] for old, new, n in zip(cached, tables, shared, strict=True)]
        cached = tables
        table = _index(tables, device)
        found = torch.full((3, length, specs[0].conv_dim), torch.nan, device=device)

        computed = list(begin)
        while min(computed) < prompt:
            scheduled = [max(0, min(BLOCK, prompt - n)) for n in computed]
            slots = plan.preprocess(table, _index(computed, device), _index(scheduled, device))
            parts = [truth[row, n : n + m] for row, (n, m) in enumerate(zip(computed, scheduled, strict=True))]
            starts = _index([sum(scheduled[:row]) for row in range(4)], device)
            going_on = torch.tensor([n > 0 for n in computed], device=device)
            given = model.prefill(pool, torch.cat(parts).to(device), starts, slots, going_on)
            for row, part in enumerate(given.split(scheduled)):
                found[row, computed[row] : computed[row] + scheduled[row]] = part
            computed = [n + m for n, m in zip(computed, scheduled, strict=True)]

        padded = torch.nn.functional.pad(truth, (0, TOKENS))
        while min(computed) < length:
            tokens = torch.stack([padded[row, n : n + TOKENS] for row, n in enumerate(computed)])
            wrong = torch.rand(3, TOKENS, generator=generator) < 0.3
            wrong[:, 0] = False
            tokens = torch.where(wrong, (tokens + 1) % vocabulary, tokens)
            right = (~wrong).int().cumprod(1).sum(1).tolist()
            accepted = [min(r, length - n) for r, n in zip(right, computed, strict=True)]  # 0 where all is done
            counts = _index(computed, device), _index([TOKENS * (n < length) for n in computed], device)
            slots = plan.preprocess(table, *counts)
            given = model.decode(pool, tokens.to(device), slots, steps)
            plan.postprocess(table, *counts, _index(accepted, device))
            for row, count in enumerate(accepted):
                found[row, computed[row] : computed[row] + count] = given[row, :count]
            computed = [n + a for n, a in zip(computed, accepted, strict=True)]

        for row, start in enumerate(begin):
            whole = model.whole(truth[row].to(device))
            apart = (found[row, start:] - whole[start:]).norm() / whole.norm()
            assert apart < 8 * torch.finfo(torch.float32).eps, (
                row,
                apart,
            )  # a state that is wrong shows as 0.1 and more
            outputs.append(found[row, start:])
    return outputs


@pytest.mark.parametrize("device", DEVICES)
def test_both_layouts_serve_the_same_with_drafts_and_prefix_caching(device: str) -> None:
    by_layout = [serve(layout, device) for layout in LAYOUTS]
    for one, other in zip(*by_layout, strict=True):
        _assert_same(one, other)
        assert device != "cpu" or torch.equal(one, other)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_kernels_in_the_interpreter_serve_the_same(backend: str) -> None:
    """The whole engine above in Triton's interpreter, with every operation or with the copies alone by kernels."""
    chosen = "*=triton" if backend == "triton" else "*=reference,copy_states=triton,commit_states=triton"
    program = "import torch, test_state_copy as t; a, b = map(t.serve, t.LAYOUTS); assert all(map(torch.equal, a, b))"
    environment = os.environ | {"TRITON_INTERPRET": "1", "TORCH_MAMBA_OPS_BACKEND": chosen}
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr


# --- what a plan copies ---


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_is_of_all_layers_and_of_nothing_else(layout: str) -> None:
    pool = _randomised(StatePool(_specs(layout), 6))
    before = _states(pool)
    StateCopyPlan(pool).copy([1, 4, -1, 2], [4, 1, 3, -1])  # a swap and two that are left out
    for tensor, old in zip(_states(pool), before, strict=True):
        assert torch.equal(tensor, old[[0, 4, 2, 3, 1, 5]])


def test_a_copy_from_another_pool() -> None:
    pool, cache = _randomised(StatePool(_specs(), 4)), _randomised(StatePool(_specs(), 7), seed=1)
    plan = StateCopyPlan(pool, source=cache)
    before = _states(pool)
    plan.copy([6, 2], [0, 3])
    for tensor, old, source in zip(_states(pool), before, _states(cache), strict=True):
        assert torch.equal(tensor, torch.stack([source[6], old[1], old[2], source[2]]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_commit_moves_the_window_and_picks_the_state_for_every_layer(layout: str) -> None:
    pool = _randomised(StatePool(_specs(layout), 5))
    steps = pool.intermediate(3, TOKENS)
    for layer in steps.values():
        assert layer.ssm_state is not None
        layer.ssm_state.normal_()
    before = [(layer.conv_state.clone(), layer.ssm_state.clone()) for layer in pool.values()]
    StateCopyPlan(pool, intermediate=steps).commit([4, 0], [4, 1], _index([3, 2]), rows=[2, 0])
    for layer, kept, (windows, states) in zip(pool.values(), steps.values(), before, strict=True):
        windows[4, :, : WIDTH - 1], windows[1, :, : WIDTH - 1] = windows[4, :, 2:5].clone(), windows[0, :, 1:4].clone()
        assert torch.equal(layer.conv_state[..., : WIDTH - 1], windows[..., : WIDTH - 1])
        states[4], states[1] = kept.ssm_state[2, 2], kept.ssm_state[0, 1]
        assert torch.equal(layer.ssm_state, states)


def test_slots_for_each_token_need_no_buffer() -> None:
    pool = _randomised(StatePool(_specs(), 8))
    before = _states(pool)
    plan = StateCopyPlan(pool)
    plan.commit(_index([[1, 2, 3]]), [7], _index([3]))
    for tensor, old in zip(pool[1].ssm_state, before[3], strict=True):
        assert torch.equal(tensor, old) or torch.equal(tensor, before[3][3])
    assert torch.equal(pool[1].ssm_state[7], before[3][3])
    assert torch.equal(pool[1].conv_state[7, :, : WIDTH - 1], before[2][1, :, 2:])
    with pytest.raises(StatePlanError, match=r"src: got one slot a copy .* expected .*intermediate"):
        plan.commit([1], [7], _index([3]))


def test_a_window_of_a_tree_is_the_path_to_the_accepted_token() -> None:
    """Token 3 follows 1, which follows 0: the step's tokens are in columns 2, 3, 4, 5 of a filter of four taps."""
    pool = _randomised(StatePool(_specs(speculative_tokens=3), 3))
    steps = pool.intermediate(1, 4)
    before = pool[0].conv_state.clone()
    plan = StateCopyPlan(pool, intermediate=steps)
    plan.commit([1], [1], accepted_index=_index([3]), parents=_index([[-1, 0, 0, 1]]))
    assert torch.equal(pool[0].conv_state[1, :, : WIDTH - 1], before[1][:, [2, 3, 5]])
    plan.commit([2], [2], accepted_index=_index([2]), parents=_index([[-1, 0, 0, 1]]))
    assert torch.equal(pool[0].conv_state[2, :, : WIDTH - 1], before[2][:, [1, 2, 4]])


@pytest.mark.parametrize("parents", [None, [[-1, 0, 0, 1, 3]] * 3])
def test_blocks_that_end_among_accepted_tokens_keep_their_state(parents: Any) -> None:
    """Blocks of 4; 3 tokens before a step of 5; the path 0, 1, 3, 4 of the tree, or all but the last of a row."""
    pool = _randomised(StatePool(_specs(speculative_tokens=4), 9))
    steps = pool.intermediate(3, 5)
    for layer in steps.values():
        layer.ssm_state.normal_()
    plan = StateCopyPlan(pool, intermediate=steps, block_size=4)
    table = _index([[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    computed, scheduled = _index([3, 2, 3]), _index([5, 5, 0])
    before = _states(pool)
    if parents is None:
        running = plan.postprocess(table, computed, scheduled, _index([4, 2, 5]))
        nodes = {1: (0, 3), 0: (0, 0), 3: (1, 1)}  # slot -> row, token of its state
    else:
        running = plan.postprocess(
            table, computed, scheduled, accepted_index=_index([4, 1, 0]), parents=_index(parents)
        )
        nodes = {1: (0, 4), 0: (0, 0), 3: (1, 1)}
    assert running.tolist() == [1, 3, -1]  # 7 tokens are in the second block, 4 in the first
    for slot in range(9):
        if slot in nodes:
            assert torch.equal(pool[1].ssm_state[slot], steps[1].ssm_state[nodes[slot]])
        else:
            assert torch.equal(pool[1].ssm_state[slot], before[3][slot])


# --- faults ---


def _reshaped(pool: StatePool, memory: Tensor) -> None:
    pool.pages = pool.pages[:2]


def _elsewhere(pool: StatePool, memory: Tensor) -> None:
    pool.pages = pool.pages.clone()


def _other_type(pool: StatePool, memory: Tensor) -> None:
    pool.pages = pool.pages.view(torch.int8)


@pytest.mark.parametrize("change", [_reshaped, _elsewhere, _other_type])
def test_a_plan_refuses_a_pool_that_changed(change: Callable[[StatePool, Tensor], None]) -> None:
    pool = StatePool(_specs(), 4)
    plan = StateCopyPlan(pool)
    plan.copy([0], [1])
    change(pool, pool.pages)
    with pytest.raises(StatePlanError, match=r"the pool changed since the plan was made: got .* expected"):
        plan.copy([0], [1])
    with pytest.raises(StatePlanError, match="changed"):
        plan.commit(None, [1])


def test_a_plan_refuses_memory_that_was_given_back() -> None:
    specs = _specs()
    memory = torch.zeros(StatePool(specs, 1).page_bytes * 3 + 16, dtype=torch.uint8)
    pool = StatePool(specs, 3, memory=memory[-memory.data_ptr() % 16 :])
    plan = StateCopyPlan(pool)
    plan.copy([0], [1])
    memory.untyped_storage().resize_(0)  # as engines do that sleep
    with pytest.raises(StatePlanError, match="changed"):
        plan.copy([0], [1])


def test_a_plan_refuses_a_module_that_moved() -> None:
    pool = StatePool(_specs(), 4)
    layer = torch.nn.Module()
    pool.register({0: layer})
    plan = StateCopyPlan(pool)
    plan.copy([0], [1])
    layer.to(torch.float64)
    with pytest.raises(StatePlanError, match="conv_state: a module it is registered in has another tensor"):
        plan.copy([0], [1])


def test_plans_refuse_what_does_not_belong_together() -> None:
    pool = StatePool(_specs(), 4)
    with pytest.raises(StatePlanError, match=r"source: got .* expected the layout of"):
        StateCopyPlan(pool, source=StatePool(_specs("DS"), 4))
    with pytest.raises(StatePlanError, match="intermediate: is of a pool with other layers"):
        StateCopyPlan(pool, intermediate=StatePool(_specs()[:1], 4).intermediate(1, 1))
    memory = torch.zeros(5 * pool.page_bytes, dtype=torch.uint8)
    page = pool.page_bytes
    with pytest.raises(ValueError, match="pool: shares memory with source"):
        StateCopyPlan(
            StatePool(_specs(), 3, memory=memory[: 3 * page]), source=StatePool(_specs(), 3, memory=memory[2 * page :])
        )
    with pytest.raises(ValueError, match="block_size: got 0"):
        StateCopyPlan(pool, block_size=0)
    counts = _index([1])
    with pytest.raises(StatePlanError, match="block_size: got None when the plan was made"):
        StateCopyPlan(pool).preprocess(_index([[0]]), counts, counts)


@pytest.mark.parametrize(
    ("src", "dst", "message"),
    [
        ([0, 1], [2, 2], "dst: got slot 2 twice"),
        ([0], [4], "dst: got slot 4, expected 0 to 3"),
        ([-2], [1], "src: got slot -2, expected 0 to 3, or -1"),
        ([0, 1], [2], "src_indices|dst_indices"),
    ],
)
def test_wrong_slots_are_refused_before_anything_is_written(src: list[int], dst: list[int], message: str) -> None:
    pool = _randomised(StatePool(_specs(), 4))
    before = pool.pages.clone()
    for given in ((src, dst), (_index(src), _index(dst))):
        with pytest.raises(ValueError, match=message):
            StateCopyPlan(pool).copy(*given)
        with pytest.raises(ValueError, match=message):
            StateCopyPlan(pool).commit(*given)
    assert torch.equal(pool.pages, before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_accepted_tokens": [4]}, "num_accepted_tokens: got 4, expected 0 to 3"),
        ({"accepted_index": [3]}, "accepted_index: got 3, expected 0 to 2"),
        ({"num_accepted_tokens": [1], "accepted_index": [1]}, "accepted_index: given with num_accepted_tokens"),
        ({"parents": [[-1, 0, 1]]}, "parents: given without accepted_index"),
        ({"num_accepted_tokens": [1, 1]}, "num_accepted_tokens: got shape"),
        ({"num_accepted_tokens": [1], "rows": [2]}, "rows: got slot 2, expected 0 to 1"),
    ],
)
def test_wrong_counts_are_refused(given: dict[str, Any], message: str) -> None:
    pool = StatePool(_specs(), 4)
    plan = StateCopyPlan(pool, intermediate=pool.intermediate(2, TOKENS))
    with pytest.raises(ValueError, match=message):
        plan.commit([0], [0], **{name: _index(value) for name, value in given.items()})


# --- compiled ---


def _step(pool: StatePool, plan: StateCopyPlan, steps: Any, model: Model) -> Callable[..., Tensor]:
    def step(tokens: Tensor, table: Tensor, computed: Tensor, scheduled: Tensor, accepted: Tensor) -> Tensor:
        slots = plan.preprocess(table, computed, scheduled)
        out = model.decode(pool, tokens, slots, steps)
        plan.postprocess(table, computed, scheduled, accepted)
        return out

    return step


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_with_its_copies_compiles_to_one_graph(layout: str, device: str) -> None:
    """The copies must stay where they are between the layers: the compiler sees one memory under many names."""
    specs = _specs(layout)
    model = Model(specs, 20, device)
    found = []
    tokens = torch.randint(20, (2, TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    table = _index([[0, 1, 2], [3, 4, 5]], device)
    for compiled in (False, True):
        pool = _randomised(StatePool(specs, 6, device=device))
        steps = pool.intermediate(2, TOKENS)
        step = _step(pool, StateCopyPlan(pool, intermediate=steps, block_size=BLOCK), steps, model)
        torch._dynamo.reset()
        run = torch.compile(step, fullgraph=True) if compiled else step
        outputs = []
        with torch.no_grad():
            for computed, accepted in (([4, 2], [1, 3]), ([5, 5], [3, 2]), ([8, 7], [2, 2])):
                counts = _index(computed, device), _index([TOKENS, TOKENS], device), _index(accepted, device)
                outputs.append(run(tokens, table, *counts))
        found.append((outputs, _states(pool)))
    (outputs, states), (compiled_outputs, compiled_states) = found
    for one, other in zip(compiled_outputs + compiled_states, outputs + states, strict=True):
        _assert_same(one, other)


@pytest.mark.parametrize("device", DEVICES)
def test_copies_alone_compile_and_are_one_launch_each(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, cache = (_randomised(StatePool(_specs(), 6, device=device), seed) for seed in (0, 1))
    plans = StateCopyPlan(pool), StateCopyPlan(pool, source=cache)

    def copy(src: Tensor, dst: Tensor) -> None:
        for plan in plans:
            plan.copy(src, dst)
            src, dst = src.flip(0), dst - 1
        plans[0].commit(torch.stack([src, dst], 1), src, torch.ones_like(src))

    launches = []
    for name in ("copy_states", "commit_states"):
        function = getattr(graph, name)
        monkeypatch.setattr(graph, name, lambda *a, f=function, **more: launches.append(f.__name__) or f(*a, **more))
    compiled = torch.compile(copy, fullgraph=True)
    for slots in ([1, 2], [2, 5], [3, 0]):
        start = pool.pages.clone()
        copy(_index(slots, device), _index([4, 2], device))
        want = pool.pages.clone()
        pool.pages.copy_(start)
        compiled(_index(slots, device), _index([4, 2], device))
        assert torch.equal(pool.pages, want)
        assert launches == ["copy_states", "copy_states", "commit_states"]
        launches.clear()


# --- on a GPU ---


@pytest.mark.gpu
def test_a_copy_is_one_launch_that_waits_for_nothing_and_can_be_captured() -> None:
    pool = _randomised(StatePool(_specs(), 8, device="cuda"))
    steps = pool.intermediate(2, TOKENS)
    plan = StateCopyPlan(pool, intermediate=steps, block_size=BLOCK)
    src, dst, accepted = _index([1, 2], "cuda"), _index([2, 5], "cuda"), _index([2, 3], "cuda")
    calls = (lambda: plan.copy(src, dst), lambda: plan.commit(src, dst, accepted))
    for call in calls:
        call()  # compiles
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            torch.cuda.set_sync_debug_mode("error")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
        assert sum(event.count for event in seen.key_averages() if event.self_device_time_total) == 1
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        src.copy_(_index([0, 7], "cuda"))
        start = pool.pages.clone()
        call()
        want = pool.pages.clone()
        pool.pages.copy_(start)
        graph.replay()
        assert torch.equal(pool.pages, want)


@pytest.mark.gpu
def test_a_step_with_its_copies_runs_in_cuda_graphs_of_the_compiler() -> None:
    specs = _specs()
    pool, other = (_randomised(StatePool(specs, 6, device="cuda")) for _ in range(2))
    model = Model(specs, 20, "cuda")
    both = []
    for each in (pool, other):
        steps = each.intermediate(2, TOKENS)
        both.append(_step(each, StateCopyPlan(each, intermediate=steps, block_size=BLOCK), steps, model))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = torch.compile(both[0], fullgraph=True, mode="reduce-overhead")
    tokens, table = torch.randint(20, (2, TOKENS), device="cuda"), _index([[0, 1, 2], [3, 4, 5]], "cuda")
    with torch.no_grad():
        for computed, accepted in (([2, 1], [1, 3]), ([3, 4], [3, 2]), ([6, 6], [1, 2]), ([7, 8], [1, 1])) * 2:
            counts = _index(computed, "cuda"), _index([TOKENS, TOKENS], "cuda"), _index(accepted, "cuda")
            torch.compiler.cudagraph_mark_step_begin()
            _assert_same(run(tokens, table, *counts).clone(), both[1](tokens, table, *counts))
            for one, two in zip(_states(pool), _states(other), strict=True):
                _assert_same(one, two)
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@pytest.mark.gpu
def test_slots_on_a_gpu_are_checked_on_request() -> None:
    pool = StatePool(_specs(), 4, device="cuda")
    with pytest.raises(ValueError, match="dst: got slot 2 twice"):
        StateCopyPlan(pool, check=True).copy(_index([0, 1], "cuda"), _index([2, 2], "cuda"))
    StateCopyPlan(pool).copy([0, 1], [2, 3])  # lists go there by themselves
