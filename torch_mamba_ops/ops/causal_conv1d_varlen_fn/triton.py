"""The packed causal convolution by Triton."""

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


@register_backend("causal_conv1d_varlen_fn", "triton", trace="inline", why_not=_why_not, version=version())
def causal_conv1d_varlen_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_states: Tensor,
    query_start_loc: Tensor,
    cache_indices: Tensor | None,
    has_initial_state: Tensor | None,
    *,
    activation: str | None,
    pad_slot_id: int,
) -> Tensor:
    """See ``op.causal_conv1d_varlen_fn``."""
    out = torch.empty_like(x)
    launch(
        _plan, x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, out, activation,
        pad_slot_id,
    )  # fmt: skip
    return out


def _plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_states: Tensor,
    query_start_loc: Tensor,
    cache_indices: Tensor | None,
    has_initial_state: Tensor | None,
    out: Tensor,
    activation: str | None,
    pad_slot_id: int,
) -> Launch:
    return plan(
        x, out, weight, bias, conv_states, activation,
        bounds=query_start_loc, slots=cache_indices, known=has_initial_state, pad_slot_id=pad_slot_id,
    )  # fmt: skip
