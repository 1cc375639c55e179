"""The dense state space dual scan by Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_mamba_ops.dispatch import register_backend
from torch_mamba_ops.ops.ssd_launch import scan, why_not
from torch_mamba_ops.tuning import version


@register_backend("mamba_chunk_scan_combined", "triton", trace="inline", why_not=why_not, version=version())
def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    chunk_size: int,
    dt_softplus: bool,
    dt_min: float | None,
    dt_max: float | None,
    state_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``op.mamba_chunk_scan_combined``."""
    batch, _, heads, head_dim = x.shape
    one_state = (heads, head_dim, B.shape[-1])
    dtype = state_dtype or torch.float32
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final_states = x.new_empty((batch, *one_state), dtype=dtype)
    varlen_states = x.new_empty((sequences, *one_state), dtype=dtype)
    packed = cu_seqlens is not None
    out = scan(
        x, dt, A, B, C, D, z, dt_bias, None if packed else seq_idx, cu_seqlens, None,
        initial=initial_states, initial_is="none" if initial_states is None else "first" if packed else "all",
        has_initial=None, final=varlen_states if packed else final_states, row_final=final_states if packed else None,
        slots=None, pool=False, pad_slot_id=-1, chunk_size=chunk_size, dt_softplus=dt_softplus, dt_min=dt_min,
        dt_max=dt_max,
    )  # fmt: skip
    return out, final_states, varlen_states
