"""Prefix caching with states at the ends of blocks: which slots take part in a step's copies, worked out on the device.

A sequence of ``n`` tokens has its running state in the slot of block ``(n - 1) // block_size``. A block that a sequence
has gone beyond keeps the state at its end, from which another sequence with the same beginning can go on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Keep:
    """Arguments of a commit: first copies to the blocks that end among the accepted tokens, then to running blocks.

    Attributes:
        src: int ``[2 * sequences]``.
        dst: int ``[2 * sequences]``.
        accepted_index: int ``[2 * sequences]``.
        parents: int ``[2 * sequences, tokens]``, or None.
        rows: int ``[2 * sequences]``.
        running: int ``[sequences]``, the slots of the running states.
    """

    src: Tensor
    dst: Tensor
    accepted_index: Tensor
    parents: Tensor | None
    rows: Tensor
    running: Tensor


def to_carry(
    block_table: Tensor, computed: Tensor, scheduled: Tensor, block_size: int, pad_slot_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Source, destination and running slot of each sequence; see `StateCopyPlan.preprocess`."""
    before, after = (computed - 1) // block_size, (computed + scheduled - 1) // block_size
    slots = torch.where(scheduled > 0, _slot(block_table, after), pad_slot_id)
    carried = (computed > 0) & (scheduled > 0) & (before != after)
    return torch.where(carried, _slot(block_table, before), pad_slot_id), slots, slots


def to_keep(
    block_table: Tensor,
    computed: Tensor,
    scheduled: Tensor,
    num_accepted_tokens: Tensor | None,
    accepted_index: Tensor | None,
    parents: Tensor | None,
    block_size: int,
    pad_slot_id: int,
) -> Keep:
    """See `StateCopyPlan.postprocess`."""
    if accepted_index is None:
        assert num_accepted_tokens is not None
        accepted = num_accepted_tokens.clamp(min=1)
        index = accepted - 1
    else:
        index = accepted_index
        accepted = index + 1 if parents is None else _depth(parents, index)
    total = computed + accepted
    boundary = total // block_size * block_size  # the last one
    crossed = (scheduled > 0) & (boundary > computed) & (boundary < total)
    behind = torch.where(crossed, total - boundary, 0)  # accepted tokens after the boundary
    at_boundary = index - behind if parents is None else _ancestor(parents, index, behind)

    written = _slot(block_table, (computed + scheduled - 1) // block_size)
    running = torch.where(scheduled > 0, _slot(block_table, (total - 1) // block_size), pad_slot_id)
    kept = torch.where(crossed, _slot(block_table, boundary // block_size - 1), pad_slot_id)
    rows = torch.arange(index.shape[0], device=index.device)
    return Keep(
        torch.cat([written, written]),
        torch.cat([kept, running]),
        torch.cat([at_boundary, index]),
        None if parents is None else torch.cat([parents, parents]),
        torch.cat([rows, rows]),
        running,
    )


def _slot(block_table: Tensor, block: Tensor) -> Tensor:
    return block_table.gather(1, block.clamp(min=0).long()[:, None])[:, 0]


def _depth(parents: Tensor, node: Tensor) -> Tensor:
    """Tokens from a root to a token, both counted."""
    depth = torch.zeros_like(node)
    for _ in range(parents.shape[1]):
        depth = depth + (node >= 0)
        node = torch.where(node >= 0, _parent(parents, node), -1)
    return depth


def _ancestor(parents: Tensor, node: Tensor, steps: Tensor) -> Tensor:
    """The token so many steps up."""
    for step in range(parents.shape[1] - 1):
        node = torch.where(step < steps, _parent(parents, node), node)
    return node


def _parent(parents: Tensor, node: Tensor) -> Tensor:
    return parents.gather(1, node.clamp(min=0).long()[:, None])[:, 0].to(node.dtype)
