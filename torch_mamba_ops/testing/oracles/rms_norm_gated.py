"""The gated RMSNorm, row by row and group by group."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def rms_norm_gated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """See the public function."""
    if z is not None and not norm_before_gate:
        x = x * silu(z)
    normed = [
        part / (part.pow(2).mean(-1, keepdim=True) + eps).sqrt() for part in x.split(group_size or x.shape[-1], -1)
    ]
    y = torch.cat(normed, -1) * weight
    if bias is not None:
        y = y + bias
    return y * silu(z) if z is not None and norm_before_gate else y
