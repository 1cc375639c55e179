"""The state space dual scan over dense batches in torch: matrix products over chunks, float32 inside."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_mamba_ops.dispatch import register_backend
from torch_mamba_ops.ops.ssd import dense_chunks, finish, packed_scan, scan_chunks, step_sizes


@register_backend("mamba_chunk_scan_combined", "reference", trace="inline")
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
    batch, length, heads, head_dim = x.shape
    one_state = (heads, head_dim, B.shape[-1])
    dtype = state_dtype or torch.float32
    step = step_sizes(dt, dt_bias, dt_softplus, dt_min, dt_max)
    initial = None if initial_states is None else initial_states.float()
    no_states = x.new_empty((0, *one_state), dtype=dtype)
    if batch == 0 or length == 0:
        before = x.new_zeros((batch, *one_state)) if initial is None else initial
        sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return x.new_empty(x.shape), before.to(dtype, copy=True), x.new_zeros((sequences, *one_state), dtype=dtype)

    if cu_seqlens is not None:
        sequences = cu_seqlens.shape[0] - 1
        begin = x.new_zeros((sequences, *one_state), dtype=torch.float32)
        if initial is not None:
            begin = torch.cat([initial, begin[1:]])
        y, states, packed = packed_scan(x, step, A, B, C, cu_seqlens, chunk_size, begin, None)
        order = torch.arange(sequences, device=x.device)
        last = torch.where(packed.not_empty, order, 0).amax()  # the last sequence that has a token
        final = torch.where((order == last).view(-1, 1, 1, 1), states, 0.0).sum(0, keepdim=True)
        return finish(y, x, D, z, packed.covered), final.to(dtype), states.to(dtype)

    chunks = dense_chunks(length, chunk_size, x.device)
    start = None
    if initial is not None:
        start = initial.unsqueeze(1).expand(-1, chunks.first.shape[0], *one_state)
    y, ends = scan_chunks(x, step, A, B, C, chunks, start, seq_idx)
    return finish(chunks.join(y), x, D, z), ends[:, -1].to(dtype, copy=True), no_states
