"""The decode step of the causal convolution in torch: window and tokens side by side, then the window written back."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_mamba_ops.dispatch import register_backend
from torch_mamba_ops.ops.conv import convolve
from torch_mamba_ops.ops.pool import safe_index, write_rows
from torch_mamba_ops.ops.tokens import RaggedTokens
from torch_mamba_ops.ops.tree import parents_of, up


@register_backend("causal_conv1d_update", "reference", trace="inline")
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
    num_accepted_tokens: Tensor | None,
    query_start_loc: Tensor | None,
    parents: Tensor | None,
    *,
    activation: str | None,
    max_query_len: int | None,
    pad_slot_id: int,
) -> Tensor:
    """See ``op.causal_conv1d_update``."""
    if x.numel() == 0:
        return torch.empty_like(x)
    width, columns = weight.shape[1], conv_state.shape[2]
    by_token = x.transpose(1, 2) if x.dim() == 3 else x
    layout = RaggedTokens(by_token, 1, query_start_loc, max_query_len)
    tokens = layout.rows(by_token)  # [batch, length, dim]
    batch, length, _ = tokens.shape
    valid = None
    if conv_state_indices is None:
        old = conv_state.transpose(1, 2)
    else:
        valid = conv_state_indices != pad_slot_id
        index = safe_index(conv_state_indices, valid, conv_state.shape[0])
        old = conv_state[index].transpose(1, 2)  # [batch, columns, dim]

    def columns_of(column: Tensor) -> Tensor:
        """Columns [batch or 1, any] of the old windows."""
        column = column.clamp(min=0, max=columns - 1).expand(batch, -1)
        return old.gather(1, column.unsqueeze(-1).expand(-1, -1, old.shape[2]))

    def tokens_of(token: Tensor) -> Tensor:
        token = token.clamp(min=0, max=length - 1).expand(batch, -1)
        return tokens.gather(1, token.unsqueeze(-1).expand(-1, -1, tokens.shape[2])).to(conv_state.dtype)

    def first(count: int) -> Tensor:
        return torch.arange(count, device=x.device)[None]

    lengths = length if layout.lengths is None else layout.lengths[:, None]
    if num_accepted_tokens is not None:
        accepted = num_accepted_tokens.long()[:, None].clamp(min=1)
        before = columns_of(accepted - 1 + first(width - 1))
        if layout.lengths is None:
            written = (first(columns) < width - 2 + length).unsqueeze(-1)
            new = torch.where(written, torch.cat([before[:, 1:], tokens, old], 1)[:, :columns], old)
        else:
            place = first(columns)
            token = place - (width - 2)
            kept = columns_of(torch.where(token < 0, accepted + place, place))
            new = torch.where(((token >= 0) & (token < lengths)).unsqueeze(-1), tokens_of(token), kept)
    elif cache_seqlens is not None:
        seen = cache_seqlens.long()[:, None]
        before = columns_of((seen - (width - 1) + first(width - 1)) % columns)
        token = (first(columns) - seen) % columns
        new = torch.where((token < lengths).unsqueeze(-1), tokens_of(token), old)
    else:
        before = old[:, columns - (width - 1) :]
        if layout.lengths is None:
            new = torch.cat([old, tokens], 1)[:, length:]
        else:
            column = first(columns) + lengths
            new = torch.where((column >= columns).unsqueeze(-1), tokens_of(column - columns), columns_of(column))
    new = new.transpose(1, 2)

    window = torch.cat([before, tokens], 1)
    if parents is None:
        y = convolve(lambda i: window.narrow(1, i, length), weight, bias, activation)
    else:
        tree, path = parents_of(layout, parents), [first(length).expand(batch, -1)]
        for _ in range(width - 1):
            path.append(up(tree, path[-1]))
        sequence = torch.arange(batch, device=x.device)[:, None]
        y = convolve(lambda i: window[sequence, path[width - 1 - i] + (width - 1)], weight, bias, activation)
    if valid is not None:
        y = torch.where(valid[:, None, None], y, 0.0)
    y = layout.unrows(y)
    out = torch.empty_like(x).copy_(y.transpose(1, 2) if x.dim() == 3 else y)

    if valid is None:
        if layout.not_empty is not None:
            new = torch.where(layout.not_empty[:, None, None], new, conv_state)
        conv_state.copy_(new)
    else:
        write_rows(conv_state, (index,), new, valid if layout.not_empty is None else valid & layout.not_empty)
    return out
