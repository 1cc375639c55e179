"""The selective scan in torch: a parallel scan over blocks of tokens, float32 inside."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from torch_mamba_ops.dispatch import register_backend
from torch_mamba_ops.ops.scan import linear_scan


@register_backend("selective_scan_fn", "reference", trace="inline")
def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    *,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """See ``op.selective_scan_fn``."""
    batch, dim, length = u.shape
    if batch == 0 or length == 0:
        return u.new_empty(u.shape), u.new_zeros((batch, *A.shape), dtype=torch.float32)
    inputs = u.float().transpose(1, 2)  # [batch, length, dim]
    step = delta.float()
    if delta_bias is not None:
        step = step + delta_bias.float()[:, None]
    if delta_softplus:
        step = softplus(step)
    step = step.transpose(1, 2)
    log_decay = step[..., None] * A.float()
    states = linear_scan(log_decay, (step * inputs)[..., None] * _by_channel(B, dim))
    y = (states * _by_channel(C, dim)).sum(-1)
    if D is not None:
        y = y + D.float() * inputs
    y = y.transpose(1, 2)
    if z is not None:
        y = y * silu(z.float())
    return y.to(u.dtype).contiguous(), states[:, -1].clone()


def _by_channel(projection: Tensor, dim: int) -> Tensor:
    """Broadcastable against [batch, length, dim, state]."""
    projection = projection.float()
    if projection.dim() == 2:
        return projection
    if projection.dim() == 3:
        return projection.transpose(1, 2).unsqueeze(2)
    groups = projection.shape[1]
    repeated = projection.permute(0, 3, 1, 2).unsqueeze(3)  # [batch, length, groups, 1, state]
    return repeated.expand(-1, -1, -1, dim // groups, -1).flatten(2, 3)
