"""How an operator's inputs lie in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import constrain_to_fake_tensors
from torch._inductor.virtualized import V

from torch_mamba_ops.dispatch.op import Op

_WORTHWHILE = 4  # of so many equal parts of a tensor that is not computed yet, one makes it worth to compute all


def constrain(op: Op, node: torch.fx.Node, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operator's layout constraint: strides as they were traced, for the states and for other backends' calls.

    The Triton kernels take any strides. Inductor pads rows, of matrix products above all: slices of one, copied to the
    traced strides, would be a kernel each.
    """
    if "eager_input_vals" not in node.meta:  # as torch's own: a pass made the call, or operators are told to take any
        return args, kwargs
    names = (*op.tensors, *op.options, "backend")
    positional, named = node.meta["eager_input_vals"]
    wanted: Mapping[str, Any] = dict(zip(names, positional, strict=False)) | named
    if op.resolve(kwargs["backend"]).name == "triton":
        wanted = {name: wanted[name] for name in mutated(op)}
    places = [wanted.get(name) for name in names[: len(args)]]
    made: tuple[tuple[Any, ...], dict[str, Any]] = constrain_to_fake_tensors(
        args, kwargs, places, {name: wanted.get(name) for name in kwargs}
    )
    return made


def mutated(op: Op) -> list[str]:
    """The tensors that the operator updates."""
    return [op.tensors[place] for place in op.mutated]


def realized(value: Any, in_place: bool) -> Any:
    """The buffer or view that a kernel is given, laid out for good. A view of what is still to be computed has it
    computed and stays a view; a small part of it is computed by itself, unless it is updated ``in_place``."""
    if not in_place and _is_small_part(value.data):
        return contiguous(value)
    node = ir.ExternKernel.realize_input(value)
    node.freeze_layout()
    return node


def contiguous(value: Any) -> Any:
    """A copy whose last dimension lies side by side."""
    node = ir.ExternKernel.copy_input(value)
    node.freeze_layout()
    return node


def _is_small_part(view: Any) -> bool:
    if not isinstance(view, ir.BaseView) or ir.is_storage_and_layout(whole := view.unwrap_view()):
        return False
    part = _WORTHWHILE * view.get_numel()
    return not V.graph.sizevars.statically_known_leq(whole.get_numel(), part)
