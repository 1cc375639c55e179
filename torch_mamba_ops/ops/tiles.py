"""Formulas that several operations' Triton kernels share."""

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
