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
    groups = (channels // (group_size or channels), -1)

    def split(tensor: Tensor) -> Tensor:
        """In groups to the end: joined before the weight is multiplied, they would be a second kernel of Inductor's."""
        return tensor.unflatten(-1, groups).float()

    y = split(x)
    if z is not None and not norm_before_gate:
        y = y * silu(split(z))
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * split(weight)
    if bias is not None:
        y = y + split(bias)
    if z is not None and norm_before_gate:
        y = y * silu(split(z))
    return y.to(x.dtype).flatten(-2).contiguous()
