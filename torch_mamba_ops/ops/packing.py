"""Where the tokens of a packed batch belong, worked out on the device: no host sync, no data-dependent shape."""

from __future__ import annotations

import torch
from torch import Tensor


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
