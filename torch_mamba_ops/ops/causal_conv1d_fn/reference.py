"""The dense causal convolution in torch: a sum over shifted inputs, which Inductor fuses into one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_mamba_ops.dispatch import register_backend
from torch_mamba_ops.ops.conv import convolve


@register_backend("causal_conv1d_fn", "reference", trace="inline")
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
    batch, dim, length = x.shape
    width = weight.shape[1]
    if x.numel() == 0:
        return torch.empty_like(x)
    before = x.new_zeros((batch, dim, width - 1)) if initial_states is None else initial_states
    window = torch.cat([before, x], -1).transpose(1, 2)  # [batch, width - 1 + length, dim]
    owner = None if seq_idx is None else torch.cat([seq_idx[:, :1].expand(-1, width - 1), seq_idx], 1)

    def tap(i: int) -> Tensor:
        inputs = window.narrow(1, i, length)
        if owner is None or seq_idx is None:
            return inputs
        return torch.where((owner.narrow(1, i, length) == seq_idx).unsqueeze(-1), inputs, 0.0)

    return torch.empty_like(x).copy_(convolve(tap, weight, bias, activation).transpose(1, 2))
