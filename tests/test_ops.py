"""Every operation x backend x case: the equations, opcheck, compile, export. The cases stand in ops/*/cases.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from torch_mamba_ops.dispatch import OPS
from torch_mamba_ops.ops.case import Case
from torch_mamba_ops.testing import check

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _every(tag: str) -> list[Any]:
    return [
        pytest.param(op.name, backend, case, id=f"{op.name}-{backend}-{case.name}")
        for op in OPS.values()
        for backend in op.backends
        for case in check.cases(op.name, tag)
    ]


def _arguments(op: str, backend: str, case: Case, device: str) -> dict[str, Any]:
    arguments = check.build(case, device)
    if reasons := check.why_not(OPS[op], backend, arguments):
        pytest.skip("; ".join(reasons))
    return arguments


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "backend", "case"), _every("small"))
def test_agrees_with_the_equations(op: str, backend: str, case: Case, device: str, poisoned_memory: None) -> None:
    arguments = _arguments(op, backend, case, device)
    expected = check.truth(op, arguments, backend)
    given = check.copied(arguments)
    check.poison_unused_rows(given, expected, op)
    check.assert_right(op, given, OPS[op].function(**given, backend=backend), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "backend", "case"), _every("opcheck"))
def test_passes_opcheck(op: str, backend: str, case: Case, device: str) -> None:
    tensors, options = check.operator_arguments(op, _arguments(op, backend, case, device))
    key = OPS[op].backends[backend].key
    torch.library.opcheck(OPS[op].overload, tensors, {**options, "backend": key})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "backend", "case"), _every("opcheck"))
def test_compiles_in_one_graph(op: str, backend: str, case: Case, device: str) -> None:
    arguments = _arguments(op, backend, case, device)
    given = check.copied(arguments)
    torch._dynamo.reset()
    compiled = torch.compile(lambda kwargs: OPS[op].function(**kwargs, backend=backend), fullgraph=True)
    check.assert_right(op, given, compiled(given), check.truth(op, arguments, backend))


@pytest.mark.parametrize(("op", "backend", "case"), _every("opcheck"))
def test_exports_as_one_node_that_decomposes(op: str, backend: str, case: Case) -> None:
    arguments = _arguments(op, backend, case, "cpu")
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    options = {name: value for name, value in arguments.items() if name not in tensors}
    # torch.export takes no tensor twice: a pool that is source and destination is one input.
    first = {name: next(n for n in tensors if tensors[n] is value) for name, value in tensors.items()}
    tensors = {name: tensors[name] for name in set(first.values())}

    class Call(torch.nn.Module):
        def forward(self, **tensors: Tensor) -> Any:
            every = {name: tensors[source] for name, source in first.items()}
            return OPS[op].function(**every, **options, backend=backend)

    program = torch.export.export(Call(), (), check.copied(tensors))
    ours = [node for node in program.graph.nodes if node.target is OPS[op].overload]
    assert [node.kwargs["backend"] for node in ours] == [OPS[op].backends[backend].key]
    given = check.copied(tensors)
    result = program.module()(**given)
    check.assert_right(op, {n: given[s] for n, s in first.items()}, result, check.truth(op, arguments, backend))
    if OPS[op].backends[backend].trace == "inline":
        decomposed = program.run_decompositions()
        assert not [node for node in decomposed.graph.nodes if "torch_mamba_ops" in str(node.target)]
        given = check.copied(tensors)
        result = decomposed.module()(**given)
        check.assert_right(op, {n: given[s] for n, s in first.items()}, result, check.truth(op, arguments, backend))


@pytest.mark.parametrize(("op", "backend", "case"), _every("grad"))
def test_gradients_agree_with_the_equations(op: str, backend: str, case: Case) -> None:
    arguments = _arguments(op, backend, case, "cpu")

    def gradients(function: Any, dtype: torch.dtype, **more: str) -> list[Tensor]:
        given = check.copied(arguments, dtype)
        leaves = [t.requires_grad_() for t in given.values() if isinstance(t, Tensor) and t.is_floating_point()]
        outputs = function(**given, **more)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = torch.Generator().manual_seed(1)
        loss = sum((o.double() * torch.randn(o.shape, generator=weights).double()).sum() for o in outputs)
        return list(torch.autograd.grad(loss, leaves))

    exact = gradients(check.oracle(op), torch.float64)
    rough = gradients(check.oracle(op), torch.float32)
    actual = gradients(OPS[op].function, torch.float32, backend=backend)
    for position, (got, want, low) in enumerate(zip(actual, exact, rough, strict=True)):
        allowed = check.ERROR_BUDGET * max(
            float((low.double() - want).abs().max()), torch.finfo(torch.float32).eps * float(want.abs().max())
        )
        assert float((got.double() - want).abs().max()) <= allowed, f"{op}: gradient {position}"
