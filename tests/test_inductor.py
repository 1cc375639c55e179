"""The decode step as Inductor's template: which calls it takes, the code they become, and that it computes the same.

Without a GPU the code is written for a pretended one, and its kernels run in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from inductor_code import (
    Arguments,
    Step,
    alone,
    arguments_of,
    assert_compiles_to_a_template,
    assert_no_spills,
    assert_one_graph,
    assert_step_right,
    code_of,
    compile_step,
    faked,
    followed,
    inputs_of,
    inside_compile_fx,
    launches,
    made_by,
    process,
    recorded,
    save_call,
    saved_call,
)
from torch import Tensor
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_mamba_ops as tmo
import torch_mamba_ops.inductor
from torch_mamba_ops.dispatch import OPS, Backend
from torch_mamba_ops.inductor import gate, rule
from torch_mamba_ops.ops.case import Case
from torch_mamba_ops.ops.selective_state_update.cases import _Shape
from torch_mamba_ops.testing import build, cases, copied
from torch_mamba_ops.testing.check import GUARD

pytestmark = pytest.mark.usefixtures("nothing_compiled")
SSU = "selective_state_update"
SMALL = {case.name: case for case in cases(SSU)}
COVERED = (
    *("mamba2", "mamba2_expanded", "mamba2_untied", "mamba1", "mamba1_slots", "bare", "skip_by_head_one_group"),
    *("slots_with_padding", "all_padding", "other_pad_slot", "destination_slots", "padded_page", "bfloat16"),
    "float16_state",
)
SHAPE = _Shape(
    batch=5, heads=8, head_dim=64, state=128, slots=40, dtype=torch.bfloat16, read=(7, 2, 5, 39, -1), gate=False
)
MODEL = Case("model", SHAPE)
LOGGER = "torch_mamba_ops.inductor"


def _alone(case: Case, device: str = "cpu", **options: Any) -> Step:
    return alone(SSU, case, device, **options)


def _followed(case: Case, device: str = "cpu") -> Step:
    return followed(_alone(case, device))


def _views(case: Case, device: str = "cpu") -> Step:
    """One layer of a pool of all layers; x, B and C are parts of one tensor, as a convolution leaves them."""
    arguments = arguments_of(SSU, case, device)
    state, *parts = (arguments[name] for name in ("state", "x", "B", "C"))
    shapes = [part.shape for part in parts]
    pool = torch.full((3, *state.shape), GUARD, dtype=state.dtype, device=device)
    pool[1] = state
    joined = torch.cat([part.flatten(1) for part in parts], 1)
    names = [n for n, v in arguments.items() if isinstance(v, Tensor) and n not in ("state", "x", "B", "C")]

    def arrange(pool: Tensor, joined: Tensor, *given: Tensor) -> Arguments:
        split = joined.split([shape[1:].numel() for shape in shapes], 1)
        views = {name: part.view(shape) for name, part, shape in zip(("x", "B", "C"), split, shapes, strict=True)}
        return arguments | dict(zip(names, given, strict=True)) | views | {"state": pool.select(0, 1)}

    return Step((pool, joined, *(arguments[name] for name in names)), arrange)


def _computed_views(case: Case, device: str = "cpu") -> Step:
    """The same parts, of a tensor that the graph computes."""
    step = _views(case, device)
    pool, joined, *given = step.inputs

    def arrange(pool: Tensor, doubled: Tensor, *given: Tensor) -> Arguments:
        return step.arrange(pool, doubled / 2, *given)

    return replace(step, inputs=(pool, joined * 2, *given), arrange=arrange)


STEPS: dict[str, Callable[[str], Step]] = {
    **{name: functools.partial(_alone, SMALL[name]) for name in COVERED},
    **{
        f"{name}, followed": functools.partial(_followed, SMALL[name])
        for name in ("mamba1_slots", "mamba2_untied", "slots_with_padding", "padded_page", "bfloat16")
    },
    "views": functools.partial(_views, SMALL["slots_with_padding"]),
    "state left alone": functools.partial(_alone, SMALL["padded_page"], disable_state_update=True),
}


def _seeded(device: str) -> Step:
    return _alone(SMALL["float16_state"], device, rand_seed=torch.tensor([-12345678901234], device=device))


def _same_bits(step: Step, run: Callable[..., Tensor], device: str) -> None:
    """Likewise, with the kernel that eager mode starts, for states that are rounded stochastically."""
    inputs, others = (tuple(copied(dict(enumerate(step.inputs))).values()) for _ in range(2))
    torch.testing.assert_close(run(*inputs), step(*others))
    state, other = step.arrange(*inputs)["state"], step.arrange(*others)["state"]
    assert not torch.equal(state, step.arrange(*step.inputs)["state"])
    # On a GPU a difference in the last of float32's 24 bits shows where it carries over.
    assert float((state != other).float().mean()) <= (1e-3 if device == "cuda" else 0)


# --- which calls stay in the graph ---


def test_importing_it_loads_no_compiler() -> None:
    program = (
        "import sys, torch_mamba_ops.inductor; print([m for m in ('torch._inductor', 'triton') if m in sys.modules])"
    )
    assert process(program) == ["[]"]


OPERATOR, KERNEL = "torch_mamba_ops", "triton_kernel_wrapper"


@pytest.mark.parametrize("name", SMALL)
def test_one_token_stays_an_operator_for_inductor_and_the_rest_is_inlined(name: str) -> None:
    assert recorded(_alone(SMALL[name])) == (OPERATOR if name in COVERED else KERNEL)


def test_other_compilers_and_packages_get_the_kernel() -> None:
    assert recorded(_alone(SMALL["mamba2"]), lambda mode: contextlib.nullcontext()) == KERNEL
    assert recorded(_alone(SMALL["mamba2"]), lambda mode: inside_compile_fx(mode, ahead_of_time=True)) == KERNEL


def test_every_reason_against_the_template_is_told() -> None:
    given = dict.fromkeys(OPS[SSU].arguments) | build(SMALL["packed_accepted"])
    told = rule.RULES[SSU]("mine", given)
    for word in ("mine", "on cpu", "cu_seqlens", "num_accepted_tokens", "dst_state_batch_indices has columns"):
        assert sum(word in reason for reason in told) == 1, (word, told)
    assert len(told) == 6


def test_explain_tells_what_becomes_of_a_call() -> None:
    step = _alone(SMALL["mamba2"])
    with FakeTensorMode():
        told = str(tmo.explain(SSU, **step.arrange(*faked(step))))
    assert told.endswith("under torch.compile: a template, which takes in what follows")
    compiled = tmo.explain(SSU, **build(SMALL["packed"])).compiled
    assert compiled is not None and "without cu_seqlens" in compiled and "reference" in compiled


@pytest.mark.parametrize("installed", [True, False])
def test_graphs_that_may_call_flashinfer_are_other_graphs(installed: bool) -> None:
    program = (
        "import importlib.util; find = importlib.util.find_spec\n"
        f"there = {installed} or None\n"
        "importlib.util.find_spec = lambda name, *more: there if name == 'flashinfer' else find(name, *more)\n"
        f"import torch_mamba_ops as tmo, torch_mamba_ops.inductor; print(tmo.backends({SSU!r})['triton'].key)"
    )
    (key,) = process(program)
    assert key.startswith("triton@") and ("flashinfer" in key) == installed


@pytest.fixture
def not_ready_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "ready", functools.cache(gate.ready.__wrapped__))


@pytest.mark.usefixtures("not_ready_yet")
def test_on_another_torch_the_kernel_is_inlined_and_the_reason_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gate, "_TESTED", ((2, 3), (2, 4)))
    assert recorded(_alone(SMALL["mamba2"])) == recorded(_alone(SMALL["mamba1"])) == KERNEL
    (told,) = (record.getMessage() for record in caplog.records if record.name == LOGGER)
    assert "tested with torch 2.3 to 2.4" in told and torch.__version__ in told


@pytest.mark.usefixtures("not_ready_yet")
def test_where_inductor_lacks_a_name_the_kernel_is_inlined(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch_mamba_ops.inductor.lowering", None)  # importing it fails
    assert recorded(_alone(SMALL["mamba2"])) == KERNEL
    assert "lacks what they are made of" in caplog.text


# --- the code that they become ---


def _gated(step: Step, shape: Callable[[Tensor], Tensor] = lambda y: y) -> Step:
    """A gate with an activation, a cast and a residual."""
    x = step.arrange(*step.inputs)["x"]
    more = (shape(torch.ones_like(x)), shape(torch.ones_like(x)).float())
    after = lambda y, *given: (shape(y) * torch.nn.functional.silu(given[-2])).float() + given[-1]  # noqa: E731
    return Step((*step.inputs, *more), lambda *given: step.arrange(*given[: len(step.inputs)]), after)


def test_what_follows_is_in_the_kernel_and_the_state_stays_where_it_is() -> None:
    step = _gated(_alone(MODEL))
    code = code_of(step)
    ((name, given),) = launches(code)
    assert name.startswith("triton_tem_fused") and set(inputs_of(code)) <= set(given)
    assert given[0] == inputs_of(code)[0], "the pool itself"
    assert made_by(code) == ["(5, 8, 64)"], "and nothing but the result is made"


@pytest.mark.skipif(
    torch.__version__.startswith("2.11"), reason="Inductor of torch 2.11 does not fuse through a view of the output"
)
def test_what_follows_a_view_of_the_output_is_in_the_kernel() -> None:
    code = code_of(_gated(_alone(MODEL), lambda y: y.flatten(1)))
    assert len(launches(code)) == 1 and made_by(code) == ["(5, 512)"]


def test_views_are_read_and_written_where_they_are() -> None:
    code = code_of(_views(MODEL))
    ((_, given),) = launches(code)
    assert given[:2] == inputs_of(code)[:2] and made_by(code) == ["(5, 8, 64)"]


def test_parts_of_what_is_computed_are_views_of_it() -> None:
    (_, computes), (kernel, reads) = launches(code_of(_computed_views(SMALL["slots_with_padding"])))
    assert "tem_fused" in kernel
    assert computes[1] in reads


class _OfAComputedPool(Step):
    """Some slots of a pool that the graph computes and uses again."""

    def __call__(self, pool: Tensor, *given: Tensor) -> Any:
        pool = pool * 2
        slots = pool.narrow(0, 3, 5)
        return tmo.selective_state_update(slots, *given, backend="triton"), pool.sum(-1)


@pytest.mark.parametrize("constraint", ["needs_fixed_stride_order", "flexible_layout"])
def test_a_state_that_the_graph_computes_is_updated_where_it_is(constraint: str) -> None:
    shapes = (100, 8, 64, 128), (5, 8, 64), (5, 8), (8,), (5, 1, 128), (5, 1, 128)
    step = _OfAComputedPool(tuple(map(torch.empty, shapes)), lambda *_: {})
    with functorch_config.patch(custom_op_default_layout_constraint=constraint):
        (_, computes), (update, updates), (_, sums) = launches(code_of(step))
    assert "tem_fused" in update and computes[1] == updates[0] == sums[0]


class _OfAPoolInAnotherOrder(Step):
    """A view in eager mode, and none of what Inductor computes, which lies in the order of its dimensions."""

    def __call__(self, pool: Tensor, *given: Tensor) -> Any:
        pool = pool.mT * 2
        state = pool.mT.view(5, 8, 64, 128)
        return tmo.selective_state_update(state, *given, backend="triton"), pool.sum(-1)


def test_a_state_that_has_to_be_copied_is_copied_back() -> None:
    shapes = (5, 8, 32, 256), (5, 8, 64), (5, 8), (8,), (5, 1, 128), (5, 1, 128)
    step = _OfAPoolInAnotherOrder(tuple(map(torch.empty, shapes)), lambda *_: {})
    kernels = launches(code_of(step))
    update = next(i for i, (name, _) in enumerate(kernels) if "tem_fused" in name)
    (*_, (_, (copied_back, *_))) = kernels
    assert any(copied_back in given for _, given in kernels[update + 1 : -1]), kernels


def test_a_small_part_is_computed_without_the_rest() -> None:
    step = _views(SMALL["slots_with_padding"])
    pool, joined, *given = step.inputs
    batch, width = joined.shape

    def arrange(pool: Tensor, rows: Tensor, *given: Tensor) -> Arguments:
        return step.arrange(pool, (rows * 2).narrow(0, 0, batch), *given)

    made = made_by(code_of(replace(step, inputs=(pool, joined.repeat(8, 1), *given), arrange=arrange)))
    assert made and f"({8 * batch}, {width})" not in made


@pytest.mark.parametrize("name", [case.name for case in cases(SSU, "model")])
def test_models_kernels_compile_without_spilling(name: str, tmp_path: Path) -> None:
    (case,) = (case for case in cases(SSU, "model") if case.name == name)
    assert_no_spills(code_of(_followed(case)), tmp_path)


# --- the choice ---


def test_without_autotuning_there_is_one_config_and_it_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    refuse = mock.patch("torch_mamba_ops.inductor.lowering.autotune_select_algorithm", side_effect=AssertionError)
    with caplog.at_level(logging.INFO, LOGGER), refuse:
        code_of(_alone(MODEL))
    (told,) = (record.getMessage() for record in caplog.records if record.name == LOGGER)
    assert "state torch.float32 (40, 8, 64, 128)" in told and "BLOCK_P=32" in told and "num_warps=4" in told


@contextlib.contextmanager
def _autotuning(choose: Callable[..., Any]) -> Iterator[None]:
    from torch._inductor import config

    chooser = mock.patch("torch_mamba_ops.inductor.lowering.autotune_select_algorithm", choose)
    with config.patch(max_autotune=True), chooser:
        yield


def _flashinfer(run: Callable[..., Any]) -> Any:
    """FlashInfer, as if it were there and could run everything."""
    backends = OPS[SSU].backends | {
        "flashinfer": Backend("flashinfer", "flashinfer@1", run, lambda *_, **__: [], "opaque")
    }
    return mock.patch.object(OPS[SSU], "backends", backends)


def test_flashinfer_is_a_choice_of_max_autotune_and_called_as_the_operator() -> None:
    offered: list[Any] = []

    def last(name: str, choices: list[Any], *_: Any, **__: Any) -> Any:
        offered.extend(choices)
        return choices[-1].output_node()

    step = _alone(MODEL)
    with _autotuning(last), _flashinfer(lambda *_, **__: None):
        code = code_of(replace(step, after=lambda y, *_: y * 2))
    assert len({choice.description for choice in offered}) == len(offered) > 4, "each config once"
    called = re.findall(
        r"= torch\.ops\.torch_mamba_ops\.selective_state_update\.default\((\w+), .*backend='(.*?)'", code
    )
    assert called == [(inputs_of(code)[0], "flashinfer@1")]
    ((name, _),) = launches(code)
    assert name.startswith("triton_poi"), "what follows it, no template and no copies"


@dataclass
class _Node:
    """A tensor in Inductor's representation."""

    name: str
    tensor: Tensor

    def __post_init__(self) -> None:
        self.get_name, self.get_dtype, self.get_device = lambda: self.name, lambda: self.tensor.dtype, lambda: "cpu"
        self.get_size, self.get_stride = lambda: self.tensor.shape, self.tensor.stride
        self.get_layout = lambda: mock.Mock(offset=self.tensor.storage_offset())


def test_scratch_states_are_as_many_as_sequences_and_slots_are_among_them() -> None:
    from torch._inductor.virtualized import V

    from torch_mamba_ops.inductor.scratch import generators

    pool = _Node("pool", torch.empty(3, 40, 8, 6, 5)[1])
    columns = torch.empty(5, 2, dtype=torch.int32)
    read, write = _Node("slots", columns[:, 0]), _Node("slots", columns[:, 1])
    nodes = [pool, _Node("x", torch.empty(5, 8, 6)), read, write]
    with V.set_graph_handler(mock.Mock(sizevars=mock.Mock(optimization_hint=int))):
        draw = generators(["state", "x", "read_slots", "write_slots"], nodes, sequences=5)
        state, *slots = (draw[place](nodes[place]) for place in sorted(draw))
    assert sorted(draw) == [0, 2, 3], "the rest is drawn at random"
    assert state.shape == (5, 8, 6, 5) and state.stride() == pool.tensor.stride()
    room = state.untyped_storage().nbytes() // state.element_size() - state.numel()
    assert room == pool.tensor.storage_offset(), "which the kernel adds itself"
    for each in slots:
        whole = each.as_strided((5, 2), (2, 1))  # either may be asked for the other
        assert whole[:, 0].tolist() == whole[:, 1].tolist() == [0, 1, 2, 3, 4]


def test_without_memory_to_tune_on_the_step_is_compiled_untuned(caplog: pytest.LogCaptureFixture) -> None:
    with _autotuning(mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))):
        code = code_of(_alone(MODEL))
    assert "triton_tem" in code and "not tuned, no memory" in caplog.text


def test_other_backends_are_called_as_ever() -> None:
    """The operator's lowering is asked about each backend that the compiler does not see into."""
    step = _alone(MODEL, backend="flashinfer")
    with _flashinfer(lambda *_, **__: None):
        code = code_of(replace(step, after=lambda y, *_: y * 2))
    assert "selective_state_update.default(" in code and "backend='flashinfer@1'" in code
    assert len(launches(code)) == 1 and "selective_state_update" not in launches(code)[0][0]


@dataclass(frozen=True)
class _ByKeyword(Step):
    """B and C are parts of a product, whose rows Inductor pads; a call of the operator itself, that names them."""

    backend: str = "triton"

    def __call__(self, state: Tensor, x: Tensor, dt: Tensor, A: Tensor, left: Tensor, right: Tensor) -> Tensor:
        _, B, C = (left @ right).split([1800, 128, 128], -1)
        op = OPS[SSU]
        options = dict.fromkeys(op.options) | {"dt_softplus": True, "pad_slot_id": -1, "disable_state_update": False}
        given = {"A": A, "B": B.unsqueeze(1), "C": C.unsqueeze(1), "dt": dt}
        rest = dict.fromkeys(op.tensors[6:])
        backend = op.backends[self.backend].key
        return op.overload(state, x, **given, **rest, **options | {"philox_rounds": 0, "backend": backend})


@pytest.mark.parametrize("backend", ["triton", "flashinfer"])
def test_other_backends_get_the_strides_that_they_were_asked_about(backend: str) -> None:
    shapes = (5, 8, 64, 128), (5, 8, 64), (5, 8), (8,), (5, 64), (64, 2056)
    step = _ByKeyword(tuple(map(torch.empty, shapes)), lambda *_: {}, backend=backend)
    with _flashinfer(lambda *_, **__: None):
        code = code_of(step)
    assert "(5, 2056), (2080, 1)" in code, "padded"
    assert len(launches(code)) == (1 if backend == "triton" else 2), [name for name, _ in launches(code)]


# --- that they compute the same, in the interpreter ---


def _run_written(folder: str) -> None:
    """Runs what `test_the_interpreter...` left in a folder, in a process whose Triton interprets."""
    for path in sorted(Path(folder).glob("*.json")):
        if path.stem == "seeded":
            _same_bits(_seeded("cpu"), saved_call(path), "cpu")
        else:
            assert_step_right(STEPS[path.stem]("cpu"), saved_call(path))
        print(path.stem)


def test_the_interpreter_agrees_with_the_equations(tmp_path: Path) -> None:
    steps = STEPS | {"seeded": _seeded}
    for name, make in steps.items():
        save_call(make("cpu"), tmp_path / f"{name}.json")
    program = f"import test_inductor; test_inductor._run_written({str(tmp_path)!r})"
    assert sorted(process(program, TRITON_INTERPRET="1")) == sorted(steps)


# --- on a GPU ---


def _model(state: torch.dtype = torch.float32, **changed: Any) -> Case:
    shape = replace(SHAPE, state_dtype=state, **changed)
    slots = torch.randperm(shape.slots, generator=torch.Generator().manual_seed(0))[: shape.batch - 1]
    return Case("model", replace(shape, read=(*slots.tolist(), -1)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", STEPS)
def test_a_gpu_agrees_with_the_equations(name: str) -> None:
    assert_compiles_to_a_template(STEPS[name]("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("around", [_alone, _followed, _views, _computed_views], ids=lambda around: around.__name__[1:])
def test_a_gpu_agrees_with_the_equations_at_a_models_size(state: torch.dtype, around: Callable[..., Step]) -> None:
    step = around(_model(state), "cuda")
    assert_step_right(step, compile_step(step)[0])


@pytest.mark.gpu
def test_a_gpu_rounds_to_the_same_bits_as_in_eager_mode() -> None:
    step = _seeded("cuda")
    _same_bits(step, compile_step(step)[0], "cuda")


@pytest.mark.gpu
def test_a_gpu_runs_one_kernel_on_the_state_itself() -> None:
    step = _gated(_alone(_model(slots=1000), "cuda"))
    state = step.inputs[0]
    run, codes = compile_step(step)
    address, bytes_of_state = state.data_ptr(), state.numel() * state.element_size()
    run(*step.inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(*step.inputs)
    assert torch.cuda.max_memory_allocated() - before < bytes_of_state / 100, "no second state, not even for a moment"
    assert state.data_ptr() == address
    code = codes[0].partition("def call(")[2]
    assert len(launches(code)) == 1 and made_by(code) == ["(5, 8, 64)"]
    assert "extern_kernels." not in code and "torch.ops." not in code


@pytest.mark.gpu
def test_a_gpu_keeps_the_old_state_for_who_wants_it() -> None:
    step = _alone(_model(), "cuda")

    def both(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        old = inputs[0].clone()  # pytorch issue 198031: a clone before a mutation must not be optimised away
        return old, step(*inputs)

    before = step.inputs[0].clone()
    old, _ = torch.compile(both, fullgraph=True)(*step.inputs)
    assert torch.equal(old, before) and not torch.equal(step.inputs[0], before)


@pytest.mark.gpu
def test_a_gpu_runs_every_batch_without_recompiling() -> None:
    assert_one_graph(lambda batch: _followed(_model(batch=batch, slots=100), "cuda"))


class _Layer(torch.nn.Module):
    """A step whose pool is a buffer."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step
        self.register_buffer("pool", step.inputs[0].clone())

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.step(self.pool, *inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("owner", ["buffer", "input"])
def test_a_gpu_replays_cuda_graphs_on_the_state(owner: str) -> None:
    step = _alone(_model(), "cuda")
    state, x, *others = step.inputs
    layer, other = _Layer(step), state.clone()
    call = layer if owner == "buffer" else lambda *inputs: step(*inputs)
    function = torch.compile(call, mode="reduce-overhead", fullgraph=True)
    for number in range(5):
        inputs = [torch.randn_like(x), *others]
        torch.compiler.cudagraph_mark_step_begin()
        result = function(*inputs) if owner == "buffer" else function(layer.pool, *inputs)
        torch.testing.assert_close(result.clone(), step(other, *inputs))
        torch.testing.assert_close(layer.pool, other, msg=lambda text, n=number: f"call {n}: {text}")
    if owner == "buffer":
        assert not counters["inductor"]["cudagraph_skips"], "a buffer stays where it is"


@pytest.mark.gpu
def test_a_gpu_tunes_on_scratch_states(caplog: pytest.LogCaptureFixture) -> None:
    from torch_mamba_ops.inductor import lowering

    asked: list[int] = []

    def asking(name: str, choices: list[Any], *more: Any, **options: Any) -> Any:
        asked.append(len(choices))
        return choose(name, choices, *more, **options)

    choose = lowering.autotune_select_algorithm
    step = _followed(_model(torch.bfloat16), "cuda")
    spied = mock.patch.object(lowering, "autotune_select_algorithm", asking)
    with spied, caplog.at_level(logging.INFO, LOGGER):
        assert_step_right(
            step, compile_step(step, options={"max_autotune": True})[0]
        )  # one step, however many were timed
    (told,) = (record.getMessage() for record in caplog.records if record.name == LOGGER)
    assert len(asked) == 1 and asked[0] > 4 and f"the fastest of {asked[0]}" in told
    assert counters["inductor"]["select_algorithm_autotune"] == 1, "they were timed"


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="flashinfer is not installed")
def test_a_gpu_runs_flashinfer_where_it_wins() -> None:
    from torch_mamba_ops.inductor import lowering

    offered: list[Any] = []

    def two(name: str, choices: list[Any], *more: Any, **options: Any) -> Any:
        offered.extend(choice for choice in choices if "flashinfer" in choice.name)
        return choose(name, [choices[0], *offered], *more, **options)

    def timed(self: Any, name: str, *more: Any, **options: Any) -> dict[Any, float]:
        return {choice: 1.0 if choice in offered else 2.0 for choice in tune(self, name, *more, **options)}

    choose, tune = lowering.autotune_select_algorithm, lowering.AlgorithmSelectorCache.do_autotuning
    step = _alone(_model(torch.bfloat16, skip="head", bias=False), "cuda")
    step = replace(step, after=lambda y, *_: y * 2)
    run, codes = compile_step(step, options={"max_autotune": True})
    with (
        mock.patch.object(lowering, "autotune_select_algorithm", two),
        mock.patch.object(lowering.AlgorithmSelectorCache, "do_autotuning", timed),
    ):
        assert_step_right(step, run)
    assert len(offered) == 1 and "backend='flashinfer@" in codes[0]


CACHED = """
import json, torch, test_inductor
from torch._dynamo.utils import counters
step = test_inductor._followed(test_inductor._model(), "cuda")
with torch.no_grad():
    test_inductor.assert_step_right(step, torch.compile(lambda *inputs: step(*inputs), fullgraph=True))
print(json.dumps({**counters["inductor"], **counters["aot_autograd"]}))
"""


@pytest.mark.gpu
def test_another_process_loads_the_compiled_step(tmp_path: Path) -> None:
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    told = [json.loads(process(CACHED, **environment)[-1]) for _ in range(2)]
    hits = [counted.get("autograd_cache_hit", 0) + counted.get("fxgraph_cache_hit", 0) for counted in told]
    assert hits[0] == 0 < hits[1] and not told[1].get("fxgraph_cache_miss", 0)
