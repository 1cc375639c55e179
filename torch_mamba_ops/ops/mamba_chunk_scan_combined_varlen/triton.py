"""The packed state space dual scan by Triton: states are read and written in the pool, inside the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_mamba_ops.dispatch import register_backend
from torch_mamba_ops.ops.ssd_launch import scan, why_not
from torch_mamba_ops.tuning import version


@register_backend("mamba_chunk_scan_combined_varlen", "triton", trace="inline", why_not=why_not, version=version())
def mamba_chunk_scan_combined_varlen(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cu_seqlens: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    states: Tensor | None,
    state_indices: Tensor | None,
    has_initial_state: Tensor | None,
    num_computed_tokens: Tensor | None,
    *,
    chunk_size: int,
    dt_softplus: bool,
    dt_min: float | None,
    dt_max: float | None,
    pad_slot_id: int,
) -> Tensor:
    """See ``op.mamba_chunk_scan_combined_varlen``."""
    if cu_seqlens.shape[0] == 1:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    flagged = states is not None and has_initial_state is not None
    return scan(
        x, dt, A, B, C, D, z, dt_bias, None, cu_seqlens, num_computed_tokens,
        initial=states if flagged else None, initial_is="flagged" if flagged else "none",
        has_initial=has_initial_state, final=states, row_final=None, slots=state_indices, pool=True,
        pad_slot_id=pad_slot_id, chunk_size=chunk_size, dt_softplus=dt_softplus, dt_min=dt_min, dt_max=dt_max,
    )  # fmt: skip
