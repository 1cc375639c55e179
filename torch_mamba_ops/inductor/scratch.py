"""Inputs to benchmark a step on: states of their own, and slots that are there.

Inductor draws what it is not given at random, in full: a second pool, and slots outside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.testing import rand_strided
from torch._inductor.virtualized import V

Generator = Callable[[Any], Tensor]


def generators(names: Sequence[str], nodes: Sequence[Any], sequences: int) -> Mapping[int, Generator]:
    """By the position among the template's inputs.

    Args:
        names: of the inputs, as in ``state_template.TENSORS``.
        nodes: the inputs.
        sequences: of the batch. The pool holds one slot for each.
    """

    def pool(node: Any) -> Tensor:
        size, stride, offset = _numbers(node)
        # The template adds the offset, a kernel that is called does not: there is room for both.
        return rand_strided([sequences, *size[1:]], stride, node.get_dtype(), node.get_device(), extra_size=offset)

    def integers(node: Any) -> Tensor:
        """Each place holds a slot: inputs may be views of one buffer, of which any may be asked for."""
        size, stride, _ = _numbers(node)
        views = [_numbers(other) for other in nodes if other.get_name() == node.get_name()]
        most = max(offset + sum((n - 1) * s for n, s in zip(*shape, strict=True)) + 1 for *shape, offset in views)
        step = max([1, *stride])
        places = torch.arange(most, device=node.get_device()) // step % sequences
        return places.to(node.get_dtype()).as_strided(size, stride)

    found: dict[int, Generator] = {names.index("state"): pool}
    found |= {place: integers for place, node in enumerate(nodes) if not node.get_dtype().is_floating_point}
    return found


def _numbers(node: Any) -> tuple[list[int], list[int], int]:
    hint = V.graph.sizevars.optimization_hint
    size, stride = (list(map(hint, values)) for values in (node.get_size(), node.get_stride()))
    return size, stride, hint(node.get_layout().offset)
