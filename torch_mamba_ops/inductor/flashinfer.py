"""FlashInfer as one more choice of ``max_autotune``: benchmarked beside the templates, called if it wins."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch._inductor import ir
from torch._inductor.select_algorithm import ExternKernelChoice

from torch_mamba_ops.dispatch import operation

from .plan import Plan

_OP = operation("selective_state_update")


def append_choice(choices: list[Any], made: Plan, names: Sequence[str], nodes: Sequence[Any], layout: Any) -> None:
    """Appends it to the choices if it can run the call.

    Args:
        choices: of Inductor's kind.
        made: the call.
        names: of the operator's tensors that are given.
        nodes: these tensors in Inductor's representation.
        layout: of the output.
    """
    backend = _OP.backends.get("flashinfer")
    tensors = [made.arguments[name] for name in _OP.tensors]
    options = {name: made.arguments[name] for name in _OP.options}
    if backend is not None and backend.why_not is not None and not backend.why_not(*tensors, **options):
        options |= {"backend": backend.key, "names": tuple(names)}
        _choice().maybe_append_choice(choices, input_nodes=nodes, layout=layout, **options)


@functools.cache
def _choice() -> Any:
    name = "torch_mamba_ops_selective_state_update_flashinfer"
    return ExternKernelChoice(_run, name=name, has_out_variant=False, kernel_creator=_node)


def _run(*tensors: Tensor, names: Sequence[str], **options: Any) -> Tensor:
    try:
        return _OP.overload(*map(dict(zip(names, tensors, strict=True)).get, _OP.tensors), **options)
    except Exception as error:
        # The one kind by which Inductor leaves a choice out, e.g. where FlashInfer finds no compiler for its kernels.
        raise RuntimeError(f"FlashInfer cannot run {_OP.name}: {error}") from error


def _node(*nodes: Any, names: Sequence[str], **options: Any) -> Any:
    """The call in the graph: the operator itself, which every process that loads the graph knows."""
    return ir.FallbackKernel.create(
        _OP.overload, *map(dict(zip(names, nodes, strict=True)).get, _OP.tensors), **options
    )
