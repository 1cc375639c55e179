"""Rows of a pool of states, picked by slot: read, write, refuse. Padding rows touch nothing.

No boolean masks: they have data-dependent shapes, which neither CUDA graphs nor exported programs can have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_mamba_ops.ops.checks import has_values


def check_slots(name: str, slots: Tensor | None, size: int, pad_slot_id: int, *, written: bool = False) -> None:
    """Raises a ValueError for slots outside the pool, or ``written`` twice, where their values can be checked."""
    if slots is None or not has_values(slots) or slots.numel() == 0:
        return
    given = slots.flatten().tolist()  # at these sizes Python is faster than kernels and their scalars
    if min(given) < 0 or max(given) >= size:
        wrong = [slot for slot in given if not 0 <= slot < size and slot != pad_slot_id]
        if wrong:
            raise ValueError(f"{name}: got slot {wrong[0]}, expected 0 to {size - 1}, or {pad_slot_id} for padding")
    used = [slot for slot in given if slot != pad_slot_id] if written else []
    if len(set(used)) < len(used):
        twice = next(slot for slot in used if used.count(slot) > 1)
        raise ValueError(f"{name}: got slot {twice} twice, expected different slots, since each is written")


def safe_index(slots: Tensor, valid: Tensor, size: int) -> Tensor:
    """Slots to index a pool with: row 0 where not valid. Negative slots become ``size``, which indexing refuses, since
    it would take them from the end."""
    slots = slots.long()
    return torch.where(valid, torch.where(slots < 0, size, slots), 0)


def write_rows(pool: Tensor, index: tuple[Tensor, ...], values: Tensor, valid: Tensor) -> None:
    """``pool[index[r]] = values[r]`` for the valid rows ``r``, in place.

    Rows that are not valid repeat the first valid row's write, so that no two different values meet in one place; when
    no row is valid the first place is written with what it holds.

    Args:
        pool: any strides; its leading dimensions are indexed.
        index: safe indices [rows], one for each leading dimension.
        values: [rows, ...], cast to the pool's dtype.
        valid: [rows] bool.
    """
    count = valid.shape[0]
    if count == 0:
        return
    rows = torch.arange(count, device=valid.device)
    first = torch.where(valid, rows, count).amin()
    source = torch.where(valid, rows, first.clamp(max=count - 1))
    target = tuple(part[source] for part in index)
    pool.index_put_(target, torch.where(first < count, values[source].to(pool.dtype), pool[target]))
