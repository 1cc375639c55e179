"""What an eager kernel would be started with, worked out for tensors in Inductor's representation.

The templates' modules make it by the eager kernel's own plan, so that both run with the same config. A symbolic batch
gets the config that the tables have for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._inductor.utils import convert_to_symint
from torch._inductor.virtualized import V

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
