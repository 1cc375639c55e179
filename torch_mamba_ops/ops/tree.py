"""Drafts that are a tree: every token of a step names the one it follows, its parent, by its number in the step.

-1 stands for the state, or the inputs, before the step; its token is a root. Parents come before their children, so
that a step computes its tokens in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from torch_mamba_ops.dispatch.repeat import each_time
from torch_mamba_ops.ops.checks import INTEGER, check_tensor, has_values
from torch_mamba_ops.ops.tokens import RaggedTokens

_ROUNDS = 16  # where the number of tokens is symbolic: paths of up to 2 ** 16


def check_parents(parents: Any, tokens: Sequence[int], bounds: Tensor | None, device: torch.device) -> None:
    """Checks the argument ``parents``, and its values where they can be.

    Args:
        parents: what was given.
        tokens: its shape, ``[batch, length]`` or, with bounds, ``[total_tokens]``.
        bounds: ``[sequences + 1]``, the first token of each sequence in a packed batch; checked.
        device: of the tokens.
    """
    meaning = "[batch, length]" if bounds is None else "[total_tokens]"
    check_tensor("parents", parents, tokens, meaning, device, INTEGER)
    if bounds is None:
        each_time(_check_order, "parents", parents)
    else:  # the values of two tensors: such calls are not repeated on a CPU
        _check_order("parents", parents, bounds)


def _check_order(name: str, parents: Tensor, bounds: Tensor | None = None) -> None:
    if not has_values(parents):
        return
    given = parents.tolist()
    rows = given if bounds is None else [given[start:stop] for start, stop in pairwise(bounds.tolist())]
    for row in rows:
        for token, parent in enumerate(row):
            if not -1 <= parent < token:
                raise ValueError(f"{name}: got {parent} for token {token}, expected -1 or a token before it")


def parents_of(tokens: RaggedTokens, parents: Tensor) -> Tensor:
    """``[batch, length]`` int64, each before its token whatever was given: a GPU's values cannot be checked."""
    rows = tokens.rows(parents).long()
    return torch.minimum(rows, torch.arange(rows.shape[1], device=rows.device) - 1).clamp(min=-1)


def up(parents: Tensor, node: Tensor) -> Tensor:
    """What comes before each of the nodes ``[batch, any]``: a token's parent; before -1 the inputs -2, -3 and so on."""
    return torch.where(node >= 0, parents.gather(1, node.clamp(min=0)), node - 1)


def tree_scan(log_decay: Tensor, update: Tensor, parents: Tensor) -> Tensor:
    """``h[t] = exp(log_decay[t]) h[parents[t]] + update[t]`` along dim 1, from zero, in parallel.

    Each round doubles the part of its path that a token has taken in (pointer jumping; Wyllie, 1979).

    Args:
        log_decay: ``[batch, length, ...]``, float32; broadcastable to ``update``.
        update: ``[batch, length, ...]``, float32.
        parents: of `parents_of`.

    Returns:
        h, shaped like ``update``.
    """
    length = update.shape[1]
    sequence = torch.arange(update.shape[0], device=update.device)[:, None]
    for _ in range((length - 1).bit_length() if isinstance(length, int) else _ROUNDS):
        node = parents.clamp(min=0)
        goes_on = (parents >= 0).view(*parents.shape, *[1] * (update.dim() - 2))
        update = torch.where(goes_on, update + torch.exp(log_decay) * update[sequence, node], update)
        log_decay = torch.where(goes_on, log_decay + log_decay[sequence, node], log_decay)
        parents = torch.where(parents >= 0, parents.gather(1, node), parents)
    return update
