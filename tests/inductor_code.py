"""Code that Inductor writes for a decode step, on a GPU that need not be there."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import aot_export_module
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from torch_mamba_ops.dispatch import OPS
from torch_mamba_ops.inductor import gate
from torch_mamba_ops.ops.case import Case
from torch_mamba_ops.testing import assert_right, build, copied, truth
from torch_mamba_ops.testing.check import operator_arguments, poison_unused_rows

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """A decode step and what stands around it, as a function of tensors.

    Attributes:
        inputs: what the function is called with.
        arrange: makes the public function's arguments of them.
        after: makes the result of the step's output and of the inputs.
        op: the operator.
    """

    inputs: tuple[Tensor, ...]
    arrange: Callable[..., Arguments]
    after: Callable[..., Tensor] = lambda y, *_: y
    op: str = "selective_state_update"

    def __call__(self, *inputs: Tensor) -> Tensor:
        arguments = {"backend": "triton"} | self.arrange(*inputs)
        return self.after(OPS[self.op].function(**arguments), *inputs)


def process(program: str, **environment: str) -> list[str]:
    """The lines that a Python process prints, in which this module can be imported."""
    path = os.pathsep.join([str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path} | environment
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def faked(step: Step) -> tuple[Tensor, ...]:
    """Its inputs, on a GPU that need not be there."""
    return tuple(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") for t in step.inputs)


class _PretendedDriver:
    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    from torch._inductor.runtime.hints import DeviceProperties

    properties = DeviceProperties("cuda", 0, 132, 90, 9, 65536, 2048, warp_size=32)
    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.object(triton.runtime.driver, "_active", _PretendedDriver()),
            mock.patch.object(DeviceProperties, "create", lambda *_: properties),
            mock.patch("torch.cuda.get_device_properties", lambda *_: properties),
            mock.patch("torch.cuda.get_device_capability", lambda *_: (9, 0)),
            mock.patch("torch._inductor.scheduler.has_triton", lambda *_: True),
        ):
            stack.enter_context(patch)
        yield


def code_of(step: Step) -> str:
    """The code that Inductor writes for a step on a GPU."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    with FakeTensorMode() as mode, pretended_gpu():
        inputs = faked(step)
        assert gate.ready()
        graph = GraphLowering(make_fx(step, select_decomp_table())(*inputs), shape_env=mode.shape_env)
        with V.set_graph_handler(graph), V.set_fake_mode(mode), DebugContext():
            graph.run(*inputs)
            code = graph.codegen()[0]
    return code if isinstance(code, str) else code.value


def launches(code: str) -> list[tuple[str, list[str]]]:
    """Each kernel that the code starts, with its arguments."""
    return [(name, given.split(", ")) for name, given in re.findall(r"(triton_\w+)\.run\((.*), stream=", code)]


def inputs_of(code: str) -> list[str]:
    found = re.search(r"^ +(.*) = args$", code, re.MULTILINE)
    assert found is not None
    return found[1].split(", ")


def made_by(code: str) -> list[str]:
    """The sizes of the tensors that the code makes."""
    return re.findall(r"= empty_strided_cuda\((\([\w, ]+\))", code)


def kernel_source(code: str, name: str) -> str:
    return code[code.index(f"async_compile.triton('{name}', '''") :].split("'''")[1]


def imported(source: str, path: Path) -> Any:
    """The module of a kernel, without Inductor's launcher around it."""
    path.write_text(re.sub(r"@triton_heuristics\.template\(.*?\n\)\n", "", source, count=1, flags=re.DOTALL))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_step(step: Step, **options: Any) -> tuple[Callable[..., Tensor], list[str]]:
    """The step compiled as one graph, and the code of its first call."""
    codes: list[str] = []
    function = torch.compile(lambda *inputs: step(*inputs), fullgraph=True, **options)

    def run(*inputs: Tensor) -> Tensor:
        if codes:
            return function(*inputs)
        result, found = run_and_get_code(function, *inputs)
        codes.extend(found)
        return result

    return run, codes


def arguments_of(op: str, case: Case, device: str) -> Arguments:
    """Its tensors as the operator gets them: what was expanded is one value a head."""
    arguments = build(case, device)
    tensors = dict(zip(OPS[op].tensors, operator_arguments(op, arguments)[0], strict=True))
    return arguments | {name: tensor for name, tensor in tensors.items() if tensor is not None}


def alone(op: str, case: Case, device: str = "cpu", **options: Any) -> Step:
    """A step, and nothing around it."""
    arguments = arguments_of(op, case, device) | options
    names = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    inputs = tuple(arguments[name] for name in names)
    return Step(inputs, lambda *given: arguments | dict(zip(names, given, strict=True)), op=op)


def followed(step: Step) -> Step:
    """A gate after it, of powers of two: torch 2.13 rounds the output before that, 2.11 does not."""
    x = step.arrange(*step.inputs)["x"]
    powers = torch.randint(-2, 3, x.shape, device=x.device, generator=torch.Generator(x.device).manual_seed(1))
    return replace(
        step,
        inputs=(*step.inputs, (-2.0 * 2.0**powers).to(x.dtype)),
        arrange=lambda *given: step.arrange(*given[:-1]),
        after=lambda y, *given: y * given[-1],
    )


def assert_step_right(step: Step, run: Callable[..., Tensor]) -> None:
    """Runs a step in some way and compares its result, and the state it leaves, with the equations."""
    inputs = tuple(copied(dict(enumerate(step.inputs))).values())
    given, exact = step.arrange(*inputs), tuple(tensor.double() for tensor in step.inputs)
    expected = truth(step.op, step.arrange(*step.inputs))
    expected = replace(expected, outputs=(step.after(expected.outputs[0], *exact),))
    state = OPS[step.op].tensors[OPS[step.op].mutated[0]]
    if any(given[state] is tensor for tensor in inputs):
        poison_unused_rows(given, expected, step.op)
    assert_right(step.op, given, run(*inputs), expected)


@contextlib.contextmanager
def inside_compile_fx(mode: FakeTensorMode, ahead_of_time: bool = False) -> Iterator[None]:
    from torch._inductor.virtualized import V

    with V.set_fake_mode(mode), V.set_aot_compilation(ahead_of_time):
        yield


def recorded(step: Step, inside: Callable[[FakeTensorMode], Any] = inside_compile_fx) -> str:
    """What AOTAutograd records of a step on a GPU: the operator, or the kernel."""

    class Call(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> tuple[Tensor]:
            return (step(*inputs),)

    with FakeTensorMode() as mode, inside(mode):
        graph, _ = aot_export_module(Call(), list(faked(step)), trace_joint=False)
    found = " ".join(str(part) for node in graph.graph.nodes for part in (node.target, *node.args))
    (kind,) = (kind for kind in (f"torch_mamba_ops.{step.op}", "triton_kernel_wrapper") if kind in found)
    return kind.partition(".")[0]


def assert_no_spills(code: str, folder: Path) -> None:
    """Compiles the code's only kernel for three architectures, of which none may put registers into memory."""
    ((kernel, _),) = launches(code)
    source = kernel_source(code, kernel)
    meta = eval(re.search(r"^triton_meta=(.*),$", source, re.MULTILINE)[1], {"DeviceProperties": dict})  # type: ignore[index]
    warps = int(re.search(r"^num_warps=(\d+)", source, re.MULTILINE)[1])  # type: ignore[index]
    function = getattr(imported(source, folder / "kernel.py"), kernel)
    for capability in (80, 90, 100):
        built = triton.compile(
            triton.compiler.ASTSource(function, meta["signature"], {}, meta["configs"][0]),
            target=triton.backends.compiler.GPUTarget("cuda", capability, 32),
            options={"num_warps": warps},
        )
        (folder / "kernel.cubin").write_bytes(built.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [str(tool), "-res-usage", str(folder / "kernel.cubin")]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        # falcon_h1_7b's state update: two numbers, for which one more program fits on a multiprocessor.
        assert re.search(r"STACK:[08] ", usage) and "LOCAL:0 " in usage, usage


def save_call(step: Step, path: Path) -> None:
    """Writes the code's only kernel and how it is called, for `saved_call`, which may run in the interpreter."""
    code = code_of(step)
    ((kernel, given),) = launches(code)
    names, x = inputs_of(code), step.arrange(*step.inputs)["x"]
    call = {
        "kernel": kernel,
        "source": kernel_source(code, kernel),
        "arguments": [names.index(each) if each in names else None for each in given[:-3]],
        "grid": [int(count) for count in given[-3:]],
        "shape": list(x.shape),
        "dtype": str(x.dtype).removeprefix("torch."),
    }
    path.write_text(json.dumps(call))


def saved_call(path: Path) -> Callable[..., Tensor]:
    """The step that `save_call` wrote."""
    call = json.loads(path.read_text())
    kernel = getattr(imported(call["source"], path.with_suffix(".py")), call["kernel"])

    def run(*inputs: Tensor) -> Tensor:
        result = torch.full(call["shape"], torch.nan, dtype=getattr(torch, call["dtype"]))
        kernel[tuple(call["grid"])](*(result if place is None else inputs[place] for place in call["arguments"]))
        return result

    return run


def assert_compiles_to_a_template(step: Step) -> None:
    """Its result is right, and one kernel's, which is the template's."""
    run, codes = compile_step(step)
    assert_step_right(step, run)
    ((kernel, _),) = launches(codes[0])
    assert kernel.startswith("triton_tem")


def assert_one_graph(make: Callable[[int], Step]) -> None:
    """Steps of several batches, marked as changing, are one graph."""
    counter, first = CompileCounterWithBackend("inductor"), make(5)
    function = torch.compile(lambda *inputs: first(*inputs), backend=counter, fullgraph=True)
    for batch in (5, 2, 33, 64):

        def run(*inputs: Tensor, batch: int = batch) -> Tensor:
            for tensor in inputs:
                if tensor.shape[0] == batch:
                    torch._dynamo.mark_dynamic(tensor, 0)
            return function(*inputs)

        assert_step_right(make(batch), run)
    assert counter.frame_count == 1
