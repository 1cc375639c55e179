"""First-order linear recurrences over tokens, in parallel and with a structure that does not depend on their number."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_mamba_ops.ops.move import Move

_BLOCK = 16
_LEVELS = 3


def linear_scan(log_decay: Tensor, update: Tensor) -> Tensor:
    """``h[t] = exp(log_decay[t]) h[t-1] + update[t]`` along dim 1, from zero.

    Args:
        log_decay: ``[batch, length, ...]``, float32, at most 0; broadcastable to ``update``. -inf forgets the past.
        update: ``[batch, length, ...]``, float32.

    Returns:
        h, shaped like ``update``.
    """
    length = update.shape[1]
    if isinstance(length, int) and length <= 2 * _BLOCK:
        return _doubling(log_decay, update)[1]
    return _blocked(log_decay, update, _LEVELS)


def segment_sum(values: Tensor) -> Tensor:
    """``S[..., j, i] = sum of values[..., j+1 : i+1]`` for j <= i, and -inf for j > i.

    A masked cumulative sum, not a difference of two: -inf stays -inf instead of making NaN, and no digits cancel.
    """
    size = values.shape[-1]
    index = torch.arange(size, device=values.device)
    after = index[None, :] > index[:, None]
    sums = torch.where(after, values.unsqueeze(-2), 0.0).cumsum(-1)
    return torch.where(after | (index[None, :] == index[:, None]), sums, -torch.inf)


def _doubling(log_decay: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """Inclusive scan over a dim 1 of static size (Hillis and Steele, 1986)."""
    length = update.shape[1]
    offset = 1
    while offset < length:
        carried = update[:, offset:] + torch.exp(log_decay[:, offset:]) * update[:, :-offset]
        update = torch.cat([update[:, :offset], carried], 1)
        log_decay = torch.cat([log_decay[:, :offset], log_decay[:, offset:] + log_decay[:, :-offset]], 1)
        offset *= 2
    return log_decay, update


def _blocked(log_decay: Tensor, update: Tensor, levels: int) -> Tensor:
    if levels == 0:
        decay = torch.exp(segment_sum(log_decay.movedim(1, -1)))  # [batch, ..., from, to]
        return torch.einsum("b...ji,b...j->b...i", decay, update.movedim(1, -1)).movedim(-1, 1)
    batch, length = update.shape[:2]
    blocks = length // _BLOCK + 2  # at least two, so that no graph is specialised on a single block
    place = torch.arange(blocks * _BLOCK, device=update.device)
    # Modulo: any token will do where there is none, and Inductor for GPUs cannot index by a clamp (torch 2.11).
    move = Move(place % length, place < length, torch.arange(length, device=update.device), None)

    def split(tensor: Tensor) -> Tensor:
        return move(tensor).reshape(batch * blocks, _BLOCK, *tensor.shape[2:])

    decay_here, here = _doubling(split(log_decay), split(update))
    decay_here, here = (t.unflatten(0, (batch, blocks)) for t in (decay_here, here))
    carry = _blocked(decay_here[:, :, -1], here[:, :, -1], levels - 1)
    # roll and indexing, since a slice to a symbolic length specialises on whether it is one element, or the whole.
    is_first = (torch.arange(blocks, device=update.device) == 0).view(-1, *([1] * (carry.dim() - 2)))
    before = torch.where(is_first, 0.0, carry.roll(1, 1))
    joined = here + torch.exp(decay_here) * before.unsqueeze(2)
    return move.back()(joined.flatten(1, 2))
