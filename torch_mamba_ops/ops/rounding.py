"""Stochastic rounding to 16-bit floats with Philox-4x32 (Salmon et al., "Parallel random numbers", 2011)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def stochastic_round(values: Tensor, dtype: torch.dtype, seed: Tensor, offsets: Tensor, rounds: int) -> Tensor:
    """Rounds float32 values up or down at random, with a mean equal to the value.

    Args:
        values: float32.
        dtype: torch.float16 or torch.bfloat16.
        seed: one int64 element. A tensor, so that a CUDA graph replayed with another seed draws other numbers.
        offsets: int64, broadcastable to values: the element's position in its pool. Same seed and offset, same draw.
        rounds: of Philox; 10 is the standard.

    Returns:
        Values in dtype, at most one unit in the last place from the input.
    """
    info = torch.finfo(dtype)
    mantissa_bits = -int(math.log2(info.eps))
    dropped_bits = 23 - mantissa_bits
    # The unit must be a normal float32 itself: bfloat16 values below 2**-119 round to multiples of 2**-126.
    smallest_exponent = max(int(math.log2(info.smallest_normal)), mantissa_bits - 126)
    _, exponent = torch.frexp(values)  # values = m * 2**exponent with m in [0.5, 1)
    unit_exponent = (exponent - 1).clamp(min=smallest_exponent) - mantissa_bits
    unit = ((unit_exponent.int() + 127) << 23).view(torch.float32)  # exact, which exp2 need not be
    uniform = (philox(seed, offsets, rounds) & ((1 << dropped_bits) - 1)).float() * 2.0**-dropped_bits
    rounded = torch.floor(values / unit + uniform) * unit
    return torch.where(torch.isfinite(values), rounded, values).to(dtype)


def philox(seed: Tensor, offsets: Tensor, rounds: int) -> Tensor:
    """The first 32-bit word of Philox-4x32 for the counter (offset, 0, 0), as int64 in [0, 2**32)."""
    key = [seed.reshape(()).long() & _WORD, (seed.reshape(()).long() >> 32) & _WORD]
    offsets = offsets.long()
    zero = torch.zeros_like(offsets)
    counter = [offsets & _WORD, (offsets >> 32) & _WORD, zero, zero]
    for _ in range(rounds):
        high0, low0 = _multiply(counter[0], _MULTIPLIERS[0])
        high1, low1 = _multiply(counter[2], _MULTIPLIERS[1])
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + _WEYL[0]) & _WORD, (key[1] + _WEYL[1]) & _WORD]
    return counter[0]


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit words, in 64-bit signed arithmetic that must not overflow."""
    low_part = a * (b & 0xFFFF)
    high_part = a * (b >> 16) + (low_part >> 16)
    return high_part >> 16, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)
