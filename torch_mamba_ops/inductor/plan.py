"""What the eager kernel would be started with, worked out for tensors in Inductor's representation."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._inductor.utils import convert_to_symint
from torch._inductor.virtualized import V

from torch_mamba_ops.dispatch import operation

from .template import CONSTANTS, FLAGS

_NAME = "selective_state_update"
_eager = importlib.import_module(f"torch_mamba_ops.ops.{_NAME}.triton")
STAGES = 3  # Triton's default; a step has no loop to pipeline


@dataclass(frozen=True)
class Plan:
    """A decode step for a template.

    Attributes:
        name: of the operator.
        state: that is updated, a fake tensor.
        arguments: the operator's by name, with fake tensors.
        sizes: of which the template makes its grid; the first is the sequences, symbolic where the batch is.
        constants: what the template is compiled for, but for its config.
        config: the eager kernel's: block sizes, ``num_warps``, ``num_stages``.
    """

    name: str
    state: Tensor
    arguments: Mapping[str, Any]
    sizes: tuple[Any, ...]
    constants: dict[str, Any]
    config: dict[str, Any]

    @property
    def sequences(self) -> int:
        """How many there are in the call that is being compiled."""
        return int(V.graph.sizevars.optimization_hint(self.sizes[0]))

    def __str__(self) -> str:
        state, x = self.state, self.arguments["x"]
        return f"{self.name}(state {state.dtype} {tuple(state.shape)}, x {x.dtype} {tuple(x.shape)})"


def plan(nodes: Mapping[str, Any], arguments: Mapping[str, Any]) -> Plan:
    """Works a launch out as in eager mode; a symbolic batch gets the config that the ladder has for it.

    Args:
        nodes: the operator's arguments by name, in Inductor's representation.
        arguments: likewise, with what `as_tensor` makes of the tensors.
    """
    tensors = [arguments[name] for name in operation(_NAME).tensors]
    options = [arguments[n] for n in ("dt_softplus", "pad_slot_id", "disable_state_update", "philox_rounds")]
    x, state = arguments["x"], arguments["state"]
    made = _eager.plan(*tensors, x.new_empty(x.shape), *options).options
    config = {name: made[name] for name in ("BLOCK_P", "BLOCK_N", "num_warps")}
    constants = {name: known(made[name]) for name in (*CONSTANTS, *FLAGS)}
    constants |= {"WRITES": made["WRITE"] != "none", "MAMBA1": state.dim() == 3}
    sizes = (nodes["x"].get_size()[0], constants["heads"], constants["head_dim"])
    config |= {"num_stages": made.get("num_stages", STAGES)}
    return Plan(_NAME, state, arguments, sizes, constants, config)


def as_tensor(node: Any) -> Tensor:
    """A fake tensor laid out like a node. But for the leading one, its sizes and strides become constants."""
    sizes, strides = ([values[0], *map(known, values[1:])] if values else [] for values in _layout(node))
    start = node.get_layout().offset
    extent = start + 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    with V.fake_mode, V.graph.sizevars.shape_env.suppress_guards():
        storage = torch.empty(convert_to_symint(extent), dtype=node.get_dtype(), device=node.get_device())
        shape, steps = ([convert_to_symint(value) for value in values] for values in (sizes, strides))
        return storage.as_strided(shape, steps, convert_to_symint(start))


def _layout(node: Any) -> tuple[list[Any], list[Any]]:
    return list(node.get_size()), list(node.get_stride())


def known(value: Any) -> Any:
    """A number that the graph is compiled for, guarded if it was symbolic."""
    if isinstance(value, bool):
        return value
    return V.graph.sizevars.guard_int(value.node.expr if isinstance(value, torch.SymInt) else value)
