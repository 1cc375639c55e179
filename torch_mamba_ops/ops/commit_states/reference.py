"""The commit of states in torch: gather, then scatter."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_mamba_ops.dispatch import register_backend
from torch_mamba_ops.ops.pool import safe_index, write_rows
from torch_mamba_ops.ops.tree import up


@register_backend("commit_states", "reference", trace="inline")
def commit_states(
    conv_states: Tensor | None,
    ssm_states: Tensor | None,
    src_indices: Tensor,
    dst_indices: Tensor,
    num_accepted_tokens: Tensor | None,
    accepted_index: Tensor | None,
    parents: Tensor | None,
    intermediate_states: Tensor | None,
    intermediate_indices: Tensor | None,
    *,
    conv_width: int,
    pad_slot_id: int,
) -> None:
    """See ``op.commit_states``."""
    by_token = src_indices.unsqueeze(1) if src_indices.dim() == 1 else src_indices
    token = torch.zeros_like(dst_indices, dtype=torch.int64)
    if num_accepted_tokens is not None:
        token = (num_accepted_tokens.long() - 1).clamp(min=0)
    elif accepted_index is not None:
        token = accepted_index.long().clamp(min=0)
    wanted = dst_indices != pad_slot_id

    if conv_states is not None:
        valid = wanted & (by_token[:, 0] != pad_slot_id)
        source, target = (safe_index(i, valid, conv_states.shape[0]) for i in (by_token[:, 0], dst_indices))
        columns = conv_states.shape[2]
        column = torch.arange(columns, device=token.device)
        if parents is None:
            moved_from = token[:, None] + column
            moves = moved_from < columns
        else:
            moved_from = _up(parents.long(), token, column, conv_width)
            moves = (column < conv_width - 1).expand_as(moved_from)
        at = moved_from.clamp(max=columns - 1).unsqueeze(1).expand(-1, conv_states.shape[1], -1)
        moved = conv_states[source].gather(2, at)
        write_rows(conv_states, (target,), torch.where(moves.unsqueeze(1), moved, conv_states[target]), valid)

    if ssm_states is not None:
        slot = by_token[:, 0]
        if intermediate_states is None:
            slot = by_token.gather(1, token.clamp(max=by_token.shape[1] - 1)[:, None])[:, 0]
        valid = wanted & (slot != pad_slot_id)
        if intermediate_states is None:
            values = ssm_states[safe_index(slot, valid, ssm_states.shape[0])]
        else:
            row = torch.arange(token.shape[0], device=token.device)
            if intermediate_indices is not None:
                row = intermediate_indices
                valid = valid & (row != pad_slot_id)
            row = safe_index(row, valid, intermediate_states.shape[0])
            values = intermediate_states[row, token.clamp(max=intermediate_states.shape[1] - 1)]
        write_rows(ssm_states, (safe_index(dst_indices, valid, ssm_states.shape[0]),), values, valid)


def _up(parents: Tensor, token: Tensor, column: Tensor, width: int) -> Tensor:
    """For each copy the column that comes to each column, ``[copies, columns]``: upwards from the accepted token, and
    from a root on through the inputs before the step, of which -1 is the last."""
    node = token[:, None].expand(-1, column.shape[0])
    for step in range(width - 2):
        parent = up(parents.clamp(min=-1), node.clamp(max=parents.shape[1] - 1))
        node = torch.where(column + step < width - 2, parent, node)
    return node + (width - 2)
