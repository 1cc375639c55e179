"""The gated RMSNorm in torch, which Inductor fuses into one kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from torch_mamba_ops.dispatch import register_backend


@register_backend("rms_norm_gated", "reference", trace="inline")
def rms_norm_gated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    *,
    eps: float,
    group_size: int | None,
    norm_before_gate: bool,
) -> Tensor:
    """See ``op.rms_norm_gated``."""
    channels = x.shape[-1]
    y = x.float()
    if z is not None and not norm_before_gate:
        y = y * silu(z.float())
    groups = y.unflatten(-1, (channels // (group_size or channels), -1))
    y = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight.float()
    if bias is not None:
        y = y + bias.float()
    if z is not None and norm_before_gate:
        y = y * silu(z.float())
    return y.to(x.dtype).contiguous()
