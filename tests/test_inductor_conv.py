"""The convolution's decode step as Inductor's template, and a whole layer's; see test_inductor.py for the state's."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from inductor_code import (
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
    kernel_source,
    launches,
    made_by,
    process,
    recorded,
    save_call,
    saved_call,
)
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_mamba_ops as tmo
from torch_mamba_ops.dispatch import OPS
from torch_mamba_ops.inductor import conv_template, state_template
from torch_mamba_ops.inductor.rule import RULES
from torch_mamba_ops.ops.case import Case
from torch_mamba_ops.ops.rms_norm_gated import reference
from torch_mamba_ops.testing import build, cases
from torch_mamba_ops.testing.check import GUARD

pytestmark = pytest.mark.usefixtures("nothing_compiled")
CONV = "causal_conv1d_update"
SMALL = {case.name: case for case in cases(CONV)}
COVERED = (
    *(f"vectors_{layout}_{columns}" for layout in ("sd", "ds") for columns in (3, 4)),
    "vectors_no_slots_width_2",
)
VECTORS: Any = SMALL["vectors_sd_3"].build
MODELS = {case.name: case for case in cases(CONV, "model")}


def _step(device: str = "cpu", **changed: Any) -> Step:
    return alone(CONV, Case("step", replace(VECTORS, **changed)), device)


def _followed(device: str = "cpu", **changed: Any) -> Step:
    return followed(_step(device, **changed))


def _place(step: Step, name: str) -> int:
    """Of an argument among the inputs."""
    return next(i for i, tensor in enumerate(step.inputs) if tensor is step.arrange(*step.inputs)[name])


def _part(device: str = "cpu", **changed: Any) -> Step:
    """x is a part of what a projection leaves, and the pool a layer of one of all layers."""
    arguments = arguments_of(CONV, Case("step", replace(VECTORS, **changed)), device)
    x, state = arguments["x"], arguments["conv_state"]
    joined = torch.cat([torch.ones_like(x), x, torch.ones_like(x[:, :16])], 1)
    pools = torch.full((3, *state.mT.shape), GUARD, dtype=state.dtype, device=device)
    pools[1] = state.mT
    names = [name for name, value in arguments.items() if isinstance(value, Tensor) and name not in ("x", "conv_state")]

    def arrange(joined: Tensor, pools: Tensor, *given: Tensor) -> dict[str, Any]:
        parts = joined.split([x.shape[1], x.shape[1], 16], 1)
        return arguments | dict(zip(names, given, strict=True)) | {"x": parts[1], "conv_state": pools.select(0, 1).mT}

    return Step((joined, pools, *(arguments[name] for name in names)), arrange, op=CONV)


def _projected(device: str = "cpu") -> Step:
    """The same, where the graph computes the projection. Inductor pads its rows, which are no multiple of 128 bytes."""
    step = _part(device, dim=2064)
    joined, *given = step.inputs

    def arrange(joined: Tensor, weight: Tensor, *given: Tensor) -> dict[str, Any]:
        return step.arrange(joined @ weight, *given)

    return replace(step, inputs=(joined, torch.eye(joined.shape[1]).to(joined), *given), arrange=arrange)


STEPS: dict[str, Callable[[str], Step]] = {
    **{name: functools.partial(alone, CONV, SMALL[name]) for name in COVERED},
    "padding": lambda device: _step(device, slots=(6, -1, 3)),
    "all padding": lambda device: _step(device, slots=(-1, -1, -1), layout="DS"),
    "float32": lambda device: _step(device, dtype=torch.float32, state_dtype=torch.float32),
    "float32 window": lambda device: _step(device, state_dtype=torch.float32, activation=None),
    "one sequence": lambda device: _step(device, batch=1, slots=(5,), dim=2064),
    "followed": lambda device: _followed(device, slots=(6, -1, 3)),
    "followed, columns innermost": lambda device: _followed(device, layout="DS"),
    "part": _part,
}


# --- which calls stay in the graph ---


@pytest.mark.parametrize("name", SMALL)
def test_one_token_in_vectors_stays_an_operator_for_inductor_and_the_rest_is_inlined(name: str) -> None:
    assert recorded(alone(CONV, SMALL[name])) == ("torch_mamba_ops" if name in COVERED else "triton_kernel_wrapper")


def test_every_reason_against_the_template_is_told() -> None:
    given = dict.fromkeys(OPS[CONV].arguments)
    told = RULES[CONV]("mine", given | build(SMALL["packed_accepted"]))
    for word in ("mine", "on cpu", "num_accepted_tokens", "query_start_loc"):
        assert sum(word in reason for reason in told) == 1, (word, told)
    assert len(told) == 4
    assert "x has a length" in RULES[CONV]("triton", given | build(SMALL["hugging_face"]))[-1]
    with FakeTensorMode():
        step, odd = _step(), _step(dim=520)
        explained = tmo.explain(CONV, **step.arrange(*faked(step)))
        told = RULES[CONV]("triton", given | odd.arrange(*faked(odd)))
    assert str(explained).endswith("under torch.compile: a template, which takes in what follows")
    assert len(told) == 1 and "vectors of 16 bytes" in told[0]


def test_what_the_template_does_not_take_is_not_guarded_for_it() -> None:
    class Model(torch.nn.Module):
        def forward(self, projected: Tensor, state: Tensor, weight: Tensor) -> Tensor:
            return tmo.causal_conv1d_update(projected[:, :32], state, weight, None, "silu")

    rest = (torch.randn(3, 32, 3), torch.randn(32, 4))
    wider = ({1: torch.export.Dim("width", min=33)}, None, None)
    program = torch.export.export(Model(), (torch.randn(3, 80), *rest), dynamic_shapes=wider).run_decompositions()
    assert program.module()(torch.randn(3, 65), *rest).shape == (3, 32), "a row of 65 is no multiple of 16 bytes"


# --- the code that they become ---


@pytest.mark.parametrize("layout", ["SD", "DS"])
def test_what_follows_is_in_the_kernel_and_the_state_stays_where_it_is(layout: str) -> None:
    code = code_of(_followed(layout=layout))
    ((name, given),) = launches(code)
    assert name.startswith("triton_tem_fused") and given[0] == inputs_of(code)[1], "the pool itself"
    assert made_by(code) == ["(3, 528)"], "and nothing but the result is made"


def test_parts_are_read_where_they_are() -> None:
    code = code_of(_part())
    ((_, given),) = launches(code)
    assert given[:2] == inputs_of(code)[1::-1] and made_by(code) == ["(3, 528)"]


def test_rows_that_inductor_pads_are_read_where_they_are() -> None:
    code = code_of(_projected())
    ((_, given),) = launches(code)
    padded = re.search(r"(\w+) = empty_strided_cuda\(\(3, 4144\), \(4160, 1\)", code)
    assert padded is not None and given[1] == padded[1]


def test_channels_that_inductor_computes_in_another_order_are_copied() -> None:
    step = _step()
    place = _place(step, "x")

    def arrange(*given: Tensor) -> dict[str, Any]:
        return step.arrange(*given[:place], (given[place].mT * 2).mT, *given[place + 1 :])

    names = [name for name, _ in launches(code_of(replace(step, arrange=arrange)))]
    assert names and names[-1].startswith("triton_tem")


def test_a_models_step_is_the_template() -> None:
    """transformers' models give x a length of one, and a part of the projection."""
    transformers = pytest.importorskip("torch_mamba_ops.integrations.transformers")

    class Call(Step):
        def __call__(self, hidden: Tensor, projection: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Any:
            gate, mixed, _ = (hidden @ projection).split([1040, 1296, 16], -1)
            with tmo.use_backend(causal_conv1d_update="triton"):
                y = transformers._causal_conv1d_update(mixed.mT, state, weight.squeeze(1), bias, "silu")
            return y.mT * gate.sum(-1, True)

    shapes = (3, 1, 64), (64, 2352), (3, 1296, 4), (1296, 1, 4), (1296,)
    code = code_of(Call(tuple(torch.empty(shape, dtype=torch.bfloat16) for shape in shapes), lambda *_: {}))
    assert sum(name.startswith("triton_tem") for name, _ in launches(code)) == 1
    assert "causal_conv1d_update.default(" not in code


@pytest.mark.parametrize("entry", [conv_template._ENTRY, state_template._ENTRY], ids=["convolution", "state"])
def test_strides_may_be_sums(entry: str) -> None:
    """That of a part of a row whose length is a symbol plus a number is written ``ks0 + 528``."""
    assert "({{stride(" in entry and not re.search(r"[^(]\{\{stride\(", entry)


@pytest.mark.parametrize("name", MODELS)
def test_models_kernels_compile_without_spilling(name: str, tmp_path: Path) -> None:
    assert_no_spills(code_of(alone(CONV, MODELS[name])), tmp_path)


# --- a layer ---


class _Layer(torch.nn.Module):
    """A Mamba2 layer's step between its projections, as in benchmarks/decode.py."""

    def __init__(self, device: str, groups: int = 4) -> None:
        super().__init__()
        heads, head_dim, state, slots, batch = 16, 64, 64, 8, 3
        self.sizes = heads, head_dim, groups, state
        self.inner, self.shared = heads * head_dim, groups * state
        dim = self.inner + 2 * self.shared
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(size, generator=generator).to(device, dtype)

        for name, tensor in {
            "conv_state": normal(slots, 3, dim).mT,
            "ssm_state": normal(slots, heads, head_dim, state),
            "weight": normal(dim, 4),
            "bias": normal(dim),
            "A": -normal(heads, dtype=torch.float32).exp(),
            "D": normal(heads, dtype=torch.float32),
            "norm_weight": normal(self.inner),
            "projected": normal(batch, self.inner + dim + heads),
            "slots": torch.tensor([6, 1, 3], dtype=torch.int32, device=device),
        }.items():
            self.register_buffer(name, tensor)

    def forward(self, norm: Callable[..., Tensor] = tmo.rms_norm_gated) -> Tensor:
        heads, head_dim, groups, state = self.sizes
        gate, mixed, dt = self.projected.split([self.inner, self.inner + 2 * self.shared, heads], -1)
        mixed = tmo.causal_conv1d_update(
            mixed, self.conv_state, self.weight, self.bias, "silu", None, self.slots, backend="triton"
        )
        x, B, C = mixed.split([self.inner, self.shared, self.shared], -1)
        y = tmo.selective_state_update(
            self.ssm_state, x.unflatten(-1, (heads, head_dim)), dt, self.A, B.unflatten(-1, (groups, state)),
            C.unflatten(-1, (groups, state)), self.D, None, None, True, self.slots, backend="triton",
        )  # fmt: skip
        group_size = self.inner // groups
        return norm(y.flatten(1), self.norm_weight, None, gate, eps=1e-5, group_size=group_size, norm_before_gate=False)


def _layer_step(groups: int) -> Step:
    layer = _Layer("cpu", groups)
    names = [name for name, _ in layer.named_buffers()]
    inlined = {"norm": reference.rms_norm_gated}  # as the operator is where it is compiled

    class Call(Step):
        def __call__(self, *given: Tensor) -> Tensor:
            return torch.func.functional_call(layer, dict(zip(names, given, strict=True)), (), inlined)

    return Call(tuple(layer.buffers()), lambda *_: {})


@pytest.mark.parametrize("groups", [1, 4])
def test_a_layers_step_is_three_kernels(groups: int) -> None:
    names = [name for name, _ in launches(code_of(_layer_step(groups)))]
    assert [name.partition("fused")[0] for name in names] == ["triton_tem_", "triton_tem_", "triton_per_"]


def _order(code: str, name: str) -> list[str]:
    """What a kernel reads, waits for and tells, in its order."""
    source = kernel_source(code, name)
    assert "'launch_pdl': True" in source
    entry = source[source.index(f"def {name}(") :].partition("@triton.jit")[0]
    return re.findall(r"tl\.load|read_(?:groups|page|head|token)\(|gdc_wait|gdc_launch_dependents", entry)


def test_kernels_overlap_where_inductor_is_asked_for_that() -> None:
    """Each waits before it reads anything, and lets the next one begin once it has read all."""
    step = _layer_step(4)
    assert "gdc_" not in code_of(step)
    with config.patch("triton.enable_pdl", True):
        code = code_of(step)
    for name, _ in launches(code):
        wait, *reads, tell = _order(code, name)
        assert (wait, tell) == ("gdc_wait", "gdc_launch_dependents")
        assert len(reads) > 2 and not any(read.startswith("gdc") for read in reads)


def test_no_kernel_begins_early_that_may_read_the_state() -> None:
    """Inductor would not have it wait."""
    step = _step()
    place = _place(step, "conv_state")
    with config.patch("triton.enable_pdl", True):
        code = code_of(replace(step, after=lambda y, *given: y.sum() + given[place].float().sum()))
    order = _order(code, launches(code)[0][0])
    assert order[0] == "gdc_wait" and "gdc_launch_dependents" not in order


# --- that they compute the same, in the interpreter ---


def _run_written(folder: str) -> None:
    """Runs what `test_the_interpreter...` left in a folder, in a process whose Triton interprets."""
    for path in sorted(Path(folder).glob("*.json")):
        assert_step_right(STEPS[path.stem]("cpu"), saved_call(path))
        print(path.stem)


def test_the_interpreter_agrees_with_the_equations(tmp_path: Path) -> None:
    for name, make in STEPS.items():
        save_call(make("cpu"), tmp_path / f"{name}.json")
    program = f"import test_inductor_conv; test_inductor_conv._run_written({str(tmp_path)!r})"
    assert sorted(process(program, TRITON_INTERPRET="1")) == sorted(STEPS)


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("name", STEPS)
def test_a_gpu_agrees_with_the_equations(name: str) -> None:
    assert_compiles_to_a_template(STEPS[name]("cuda"))


@pytest.mark.gpu
def test_a_gpu_reads_padded_rows() -> None:
    step = _projected("cuda")
    run, codes = compile_step(step)
    assert_step_right(step, run)
    assert "(4160, 1)" in codes[0] and launches(codes[0])[0][0].startswith("triton_tem")


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_a_gpu_agrees_with_the_equations_at_a_models_size(name: str) -> None:
    step = alone(CONV, MODELS[name], "cuda")
    assert_step_right(step, compile_step(step)[0])


@pytest.mark.gpu
def test_a_gpu_runs_every_batch_without_recompiling() -> None:
    assert_one_graph(lambda batch: _followed("cuda", batch=batch, slots=tuple(range(9, 9 + batch)), pool_size=100))


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True], ids=["in_turn", "overlapping"])
def test_a_gpu_replays_a_layers_step(overlap: bool) -> None:
    """One CUDA graph, whose kernels may begin before the one before them ends."""
    layer, other = _Layer("cuda"), _Layer("cuda")
    options = {"triton.cudagraphs": True, "triton.enable_pdl": overlap}
    run = torch.compile(layer, options=options, fullgraph=True)
    for number in range(20):
        given = torch.randn_like(layer.projected)
        slots = torch.randperm(8, device="cuda")[:3].int()
        for each in (layer, other):
            each.projected.copy_(given)
            each.slots.copy_(slots)
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(run().clone(), other(), msg=lambda text, n=number: f"call {n}: {text}")
        assert torch.equal(layer.conv_state, other.conv_state)
        torch.testing.assert_close(layer.ssm_state, other.ssm_state)
    assert not counters["inductor"]["cudagraph_skips"]
