"""Stochastic rounding to 16-bit floats with Philox-4x32 (Salmon et al., "Parallel random numbers", 2011)."""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
DRAWS = 8  # values that share a call of Philox: 16 bits each of its four words


def stochastic_round(values: Tensor, dtype: torch.dtype, seed: Tensor, rows: Tensor, rounds: int) -> Tensor:
    """Rounds float32 values up or down at random, with a mean equal to the value.

    Adds random bits below the last one that stays and cuts the rest off: towards zero, or away from it if they carry.

    Args:
        values: float32 ``[..., size]``.
        dtype: torch.float16 or torch.bfloat16.
        seed: one int64 element. A tensor, so that a CUDA graph replayed with another seed draws other numbers.
        rows: int64 ``[...]``, each row's number in its pool. Same seed, row and place in the row, same draw.
        rounds: of Philox; 10 is the standard.

    Returns:
        Values in dtype, one of the two neighbours of the input; a float16 neighbour beyond the largest is infinity.
    """
    size = values.shape[-1]
    calls = (size + DRAWS - 1) // DRAWS
    counter = rows[..., None].long() * calls + torch.arange(calls, device=values.device)
    words = torch.stack(philox(seed, counter, rounds), -1)
    halves = torch.stack([words & 0xFFFF, words >> 16], -1).flatten(-3)  # [..., calls * DRAWS]
    random = halves[..., torch.arange(size, device=values.device)].int()
    bits = values.contiguous().view(torch.int32)
    if dtype == torch.bfloat16:
        rounded = ((bits + random) & -0x10000).view(torch.float32)
    else:
        rounded = ((bits + (random >> 3)) & -0x2000).view(torch.float32)
        small = torch.floor(values.abs() * 2.0**24 + random * 2.0**-16) * 2.0**-24  # below the smallest normal number
        rounded = torch.where(values.abs() < 2.0**-14, torch.copysign(small, values), rounded)
    return torch.where(torch.isfinite(values), rounded, values).to(dtype)


def philox(seed: Tensor, offsets: Tensor, rounds: int) -> list[Tensor]:
    """The four 32-bit words of Philox-4x32 for the counter (offset, 0, 0), as int64 in [0, 2**32)."""
    key = [seed.reshape(()).long() & _WORD, (seed.reshape(()).long() >> 32) & _WORD]
    offsets = offsets.long()
    zero = torch.zeros_like(offsets)
    counter = [offsets & _WORD, (offsets >> 32) & _WORD, zero, zero]
    for _ in range(rounds):
        high0, low0 = _multiply(counter[0], _MULTIPLIERS[0])
        high1, low1 = _multiply(counter[2], _MULTIPLIERS[1])
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + _WEYL[0]) & _WORD, (key[1] + _WEYL[1]) & _WORD]
    return counter


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit words, in 64-bit signed arithmetic that must not overflow."""
    low_part = a * (b & 0xFFFF)
    high_part = a * (b >> 16) + (low_part >> 16)
    return high_part >> 16, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)
