"""Formulas and rearrangements of tiles that several operations' Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to 2e-7 of itself, also where exp(x) is small against 1: dt's usual range."""
    small = tl.exp2(tl.abs(x) * -LOG2_E)
    # log1p(small) / small, a polynomial off by 5e-9 at most: tl.log and a division take five times the instructions.
    ratio = small * -0.0032439841884844970 + 0.019851282238960266
    ratio = ratio * small - 0.056959208101034164
    ratio = ratio * small + 0.10603623092174530
    ratio = ratio * small - 0.15305574238300323
    ratio = ratio * small + 0.19675934314727783
    ratio = ratio * small - 0.24954132735729218
    ratio = ratio * small + 0.33329963684082031
    ratio = ratio * small - 0.49999901652336121
    ratio = ratio * small + 1.0
    return ratio * small + tl.maximum(x, 0.0)


@triton.jit
def silu(x):
    """x * sigmoid(x)."""
    return x / (1.0 + tl.exp2(x * -LOG2_E))


@triton.jit
def to_lanes(tile, GROUP: tl.constexpr):
    """The columns of a tile [rows, GROUP], GROUP 4 or 8."""
    even, odd = tl.split(tl.reshape(tile, [tile.shape[0], GROUP // 2, 2]))
    if GROUP == 4:
        a, c = tl.split(even)
        b, d = tl.split(odd)
        return a, b, c, d
    else:
        a, c, e, g = to_lanes(even, 4)
        b, d, f, h = to_lanes(odd, 4)
        return a, b, c, d, e, f, g, h


@triton.jit
def from_lanes(lanes, GROUP: tl.constexpr):
    """The inverse of `to_lanes`."""
    if GROUP == 4:
        even = tl.join(lanes[0], lanes[2])
        odd = tl.join(lanes[1], lanes[3])
    else:
        even = from_lanes((lanes[0], lanes[2], lanes[4], lanes[6]), 4)
        odd = from_lanes((lanes[1], lanes[3], lanes[5], lanes[7]), 4)
    return tl.reshape(tl.join(even, odd), [even.shape[0], GROUP])
