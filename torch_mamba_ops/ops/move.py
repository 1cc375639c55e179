"""Rows moved to other places, each to one at most, with a gradient that moves them back.

The gradient of indexing is a scatter that accumulates, since an index may repeat. With several threads Inductor's C++
for that can write out of bounds (PyTorch issue 191837; not fixed in torch 2.13), and on a GPU it takes atomics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Move:
    """Moves ``[batch, rows, ...]`` to ``[batch, places, ...]``, with zero in the places that no row goes to.

    Attributes:
        source: int64 ``[places]``, the row that comes to each place; any valid one where none does.
        filled: bool ``[places]``, whether a row comes; None: to all.
        target: int64 ``[rows]``, the place where each row goes; any valid one where it goes nowhere.
        kept: bool ``[rows]``, whether the row goes anywhere; None: all do.
    """

    source: Tensor
    filled: Tensor | None
    target: Tensor
    kept: Tensor | None

    def __call__(self, tensor: Tensor) -> Tensor:
        """Moves; differentiable."""
        moved: Tensor = _Gather.apply(tensor, self.source, self.filled, self.target, self.kept)  # type: ignore[no-untyped-call]
        return moved

    def back(self) -> Move:
        """The opposite move."""
        return Move(self.target, self.kept, self.source, self.filled)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(tensor: Tensor, source: Tensor, filled: Tensor | None, target: Tensor, kept: Tensor | None) -> Tensor:
        moved = tensor[:, source]
        if filled is None:
            return moved
        return torch.where(filled.view(-1, *([1] * (tensor.dim() - 2))), moved, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        source, filled, target, kept = ctx.saved_tensors
        moved: Tensor = _Gather.apply(gradient, target, kept, source, filled)  # type: ignore[no-untyped-call]
        return moved, None, None, None, None
