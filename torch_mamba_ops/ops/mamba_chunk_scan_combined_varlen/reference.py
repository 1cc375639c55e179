"""The packed state space dual scan in torch: chunks of each sequence worked out on the device, float32 inside."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_mamba_ops.dispatch import register_backend
from torch_mamba_ops.ops.pool import safe_index, write_rows
from torch_mamba_ops.ops.ssd import finish, packed_scan, step_sizes


@register_backend("mamba_chunk_scan_combined_varlen", "reference", trace="inline")
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
    sequences = cu_seqlens.shape[0] - 1
    if x.shape[0] == 0 or sequences == 0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    if state_indices is None:
        index = torch.arange(sequences, device=x.device)
        valid = torch.ones_like(index, dtype=torch.bool)
    else:
        valid = state_indices != pad_slot_id
        index = safe_index(state_indices, valid, sequences if states is None else states.shape[0])
    initial = None
    if states is not None and has_initial_state is not None:
        initial = torch.where((has_initial_state & valid).view(-1, 1, 1, 1), states[index].float(), 0.0)

    step = step_sizes(dt, dt_bias, dt_softplus, dt_min, dt_max)
    row = x.unsqueeze(0), step.unsqueeze(0), A, B.unsqueeze(0), C.unsqueeze(0)
    y, last, packed = packed_scan(*row, cu_seqlens, chunk_size, initial, num_computed_tokens)
    out = finish(y[0], x, D, z, packed.covered & valid[packed.sequence_of_token])
    if states is not None:
        write_rows(states, (index,), last, valid & packed.not_empty)
    return out
