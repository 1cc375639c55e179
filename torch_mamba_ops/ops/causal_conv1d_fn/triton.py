"""The dense causal convolution by Triton. Only forward: the operator differentiates its reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_mamba_ops.dispatch import register_backend
from torch_mamba_ops.ops.conv_prefill import plan
from torch_mamba_ops.ops.launch import Launch, launch, reasons_against_triton
from torch_mamba_ops.tuning import version


def _why_not(*tensors: Tensor | None, **options: Any) -> list[str]:
    return reasons_against_triton(tensors)


@register_backend("causal_conv1d_fn", "triton", trace="inline", why_not=_why_not, version=version())
def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    *,
    activation: str | None,
) -> Tensor:
    """See ``op.causal_conv1d_fn``."""
    out = torch.empty_like(x)
    launch(_plan, x, weight, bias, seq_idx, initial_states, out, activation)
    return out


def _plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    out: Tensor,
    activation: str | None,
) -> Launch:
    return plan(x, out, weight, bias, initial_states, activation, owners=seq_idx)
