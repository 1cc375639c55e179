"""Where the tokens of a packed batch belong, worked out on the device: no host sync, no data-dependent shape."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from torch_mamba_ops.ops.checks import INTEGER, check_int, check_rank, check_tensor, has_values


def sequence_of_token(cu_seqlens: Tensor, total_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """The sequence of each token, its position there, and whether it belongs to one at all.

    Args:
        cu_seqlens: int ``[sequences + 1]``, the first token of each sequence.
        total_tokens: tokens in the packed batch, covered by cu_seqlens or not.

    Returns:
        int64 ``[total_tokens]`` sequence and position (0 where there is none), bool ``[total_tokens]``.
    """
    token = torch.arange(total_tokens, device=cu_seqlens.device)
    bounds = cu_seqlens.long()
    valid = (token >= bounds[0]) & (token < bounds[-1])
    sequence = torch.where(valid, torch.searchsorted(bounds, token, right=True) - 1, 0)
    return sequence, torch.where(valid, token - bounds[sequence], 0), valid


def check_packing(name: str, bounds: Any, tokens: int, device: torch.device, longest: int | None = None) -> None:
    """Checks the first token of each sequence, ``[sequences + 1]``, and their values where they can be.

    Args:
        name: of the argument.
        bounds: what was given.
        tokens: in the packed batch.
        device: of the tokens.
        longest: the bound on the tokens of one sequence that the caller gave.
    """
    check_rank(name, bounds, (1,), "[sequences + 1]")
    check_tensor(name, bounds, bounds.shape, "[sequences + 1]", device, INTEGER)
    if not has_values(bounds):
        return
    values = bounds.tolist()
    if not values:
        raise ValueError(f"{name}: got no element, expected [sequences + 1]")
    lengths = [after - before for before, after in pairwise(values)]
    if values[0] < 0 or values[-1] > tokens or min(lengths, default=0) < 0:
        raise ValueError(f"{name}: got {values}, expected ascending numbers from 0 to {tokens}, the tokens")
    if longest is not None and max(lengths, default=0) > longest:
        raise ValueError(f"{name}: got a sequence of {max(lengths)} tokens, expected at most {longest}, as given")


def check_longest(name: str, value: Any) -> None:
    """Checks the bound on the tokens of one sequence."""
    check_int(name, value)
    if value < 1:
        raise ValueError(f"{name}: got {value}, expected at least 1")
