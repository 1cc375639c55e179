"""The packed causal convolution in torch: every tap is a gather from the tokens or the sequence's window."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_mamba_ops.dispatch import register_backend
from torch_mamba_ops.ops.conv import convolve
from torch_mamba_ops.ops.packing import sequence_of_token
from torch_mamba_ops.ops.pool import safe_index, write_rows


@register_backend("causal_conv1d_varlen_fn", "reference", trace="inline")
def causal_conv1d_varlen_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_states: Tensor,
    query_start_loc: Tensor,
    cache_indices: Tensor | None,
    has_initial_state: Tensor | None,
    *,
    activation: str | None,
    pad_slot_id: int,
) -> Tensor:
    """See ``op.causal_conv1d_varlen_fn``."""
    total, sequences = x.shape[1], query_start_loc.shape[0] - 1
    if x.numel() == 0 or sequences == 0:
        return torch.zeros_like(x)
    width, columns = weight.shape[1], conv_states.shape[2]
    if cache_indices is None:
        index = torch.arange(sequences, device=x.device)
        valid = torch.ones_like(index, dtype=torch.bool)
    else:
        valid = cache_indices != pad_slot_id
        index = safe_index(cache_indices, valid, conv_states.shape[0])
    known = torch.zeros_like(valid) if has_initial_state is None else has_initial_state & valid
    # Padding rows keep what they hold: only known windows may enter a result.
    window = torch.where(known[:, None, None], conv_states[index], 0.0).transpose(1, 2)  # [sequences, columns, dim]

    tokens = x.t()
    token = torch.arange(total, device=x.device)
    sequence, position, covered = sequence_of_token(query_start_loc, total)

    def tap(i: int) -> Tensor:
        back = width - 1 - i
        if back == 0:
            return tokens
        earlier = tokens[(token - back).clamp(min=0)]
        from_window = window[sequence, (columns + position - back).clamp(max=columns - 1)]
        return torch.where((position >= back)[:, None], earlier, from_window)

    y = convolve(tap, weight, bias, activation)
    y = torch.where((covered & valid[sequence])[:, None], y, 0.0)
    out = torch.empty_like(x).copy_(y.t())

    starts = query_start_loc[:-1].long()
    lengths = query_start_loc[1:].long() - starts
    column = (
        lengths[:, None] - columns + torch.arange(columns, device=x.device)
    )  # token of each column of the new window
    appended = tokens[(starts[:, None] + column).clamp(min=0, max=total - 1)]
    shifted = window.gather(1, (columns + column).clamp(max=columns - 1).unsqueeze(-1).expand_as(window))
    new = torch.where((column >= 0)[..., None], appended.to(conv_states.dtype), shifted).transpose(1, 2)
    write_rows(conv_states, (index,), new, valid & (lengths > 0))
    return out
