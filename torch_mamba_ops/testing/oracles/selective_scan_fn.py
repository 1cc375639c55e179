"""The selective scan, one token after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See the public function."""
    batch, dim, length = u.shape
    step = delta if delta_bias is None else delta + delta_bias[:, None]
    if delta_softplus:
        step = softplus(step)

    def at(projection: Tensor, t: int) -> Tensor:
        if projection.dim() == 2:
            return projection
        if projection.dim() == 3:
            return projection[:, None, :, t]
        return projection[..., t].repeat_interleave(dim // projection.shape[1], 1)

    h, outputs = u.new_zeros(batch, *A.shape), []
    for t in range(length):
        h = torch.exp(step[:, :, t, None] * A) * h + (step[:, :, t] * u[:, :, t])[..., None] * at(B, t)
        outputs.append((h * at(C, t)).sum(-1))
    y = torch.stack(outputs, -1)
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * silu(z)
    return (y, h) if return_last_state else y
