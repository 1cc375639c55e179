"""Formulas that several operations' Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softplus(x):
    """log(1 + exp(x)), also where exp(x) is small against 1: dt's usual range, and Triton has no log1p."""
    small = tl.exp(-tl.abs(x))
    sum_ = 1.0 + small
    # Kahan's log1p: the error of the sum cancels in the quotient.
    log1p = tl.where(sum_ == 1.0, small, tl.log(sum_) * (small / tl.where(sum_ == 1.0, 1.0, sum_ - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def silu(x):
    """x * sigmoid(x)."""
    return x / (1.0 + tl.exp(-x))
