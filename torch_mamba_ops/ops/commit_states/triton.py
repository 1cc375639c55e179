"""The commit of states on GPUs: which states the Triton kernel can take, and how it is started."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from torch_mamba_ops.dispatch import register_backend
from torch_mamba_ops.ops.copying import BLOCK_BYTES, is_dense, reasons_against_copies, tiles, units
from torch_mamba_ops.ops.launch import Launch, launch, reasons_against_triton

_WINDOW_BLOCK = 1024  # elements: few enough that where each one goes takes no registers from the states
_MOST_COLUMNS = 64


def _why_not(
    conv_states: Tensor | None,
    ssm_states: Tensor | None,
    src_indices: Tensor,
    dst_indices: Tensor,
    num_accepted_tokens: Tensor | None,
    accepted_index: Tensor | None,
    parents: Tensor | None,
    intermediate_states: Tensor | None,
    intermediate_indices: Tensor | None,
    **options: Any,
) -> list[str]:
    reasons = reasons_against_triton((dst_indices,))
    for pool in (conv_states, ssm_states):
        if pool is not None:
            reasons += reasons_against_copies(pool, dst_indices.shape[0], one_pool=True)
    if conv_states is not None and conv_states.shape[2] > _MOST_COLUMNS:
        reasons.append(f"it moves up to {_MOST_COLUMNS} columns of a window, not {conv_states.shape[2]}")
    for name, tensor, outer in (("ssm_states", ssm_states, 1), ("intermediate_states", intermediate_states, 2)):
        if tensor is not None and not is_dense(tensor, outer):
            reasons.append(f"it copies states that are contiguous, and one of {name} has gaps or another order")
    return list(dict.fromkeys(reasons))


@register_backend("commit_states", "triton", trace="inline", why_not=_why_not)
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
    launch(
        _plan, dst_indices, src_indices, conv_states, ssm_states, num_accepted_tokens, accepted_index, parents,
        intermediate_states, intermediate_indices, conv_width, pad_slot_id,
    )  # fmt: skip


def _plan(
    dst_indices: Tensor,
    src_indices: Tensor,
    conv_states: Tensor | None,
    ssm_states: Tensor | None,
    num_accepted_tokens: Tensor | None,
    accepted_index: Tensor | None,
    parents: Tensor | None,
    intermediate_states: Tensor | None,
    intermediate_indices: Tensor | None,
    conv_width: int,
    pad_slot_id: int,
) -> Launch:
    from torch_mamba_ops.ops.commit_states import kernels

    accepted = num_accepted_tokens if accepted_index is None else accepted_index
    tensors = {
        "conv_states": conv_states,
        "ssm_states": ssm_states,
        "accepted": accepted,
        "parents": parents,
        "intermediate": intermediate_states,
        "rows": intermediate_indices,
        "src_indices": src_indices,
        "dst_indices": dst_indices,
    }
    options: dict[str, Any] = {
        "copies": dst_indices.shape[0],
        "pad_slot_id": pad_slot_id,
        "src_copy": src_indices.stride(0),
        "src_token": 0,
        "dst_copy": dst_indices.stride(0),
        "accepted_copy": 0 if accepted is None else accepted.stride(0),
        "parents_copy": 0 if parents is None else parents.stride(0),
        "parents_token": 0 if parents is None else parents.stride(1),
        "row_copy": 0 if intermediate_indices is None else intermediate_indices.stride(0),
        "last": 0,
        "dim": 0,
        "columns": 0,
        "window_tiles": 0,
        "window_slot": 0,
        "window_channel": 0,
        "window_column": 0,
        "size": 0,
        "state_slot": 0,
        "source_row": 0,
        "source_token": 0,
        "FIRST": 1 if accepted_index is None else 0,
        "WIDTH": conv_width,
        "UNIT": 1,
        "COLUMNS": 1,
        "COLUMNS_INNERMOST": False,
        "HAS_ACCEPTED": accepted is not None,
        "HAS_PARENTS": parents is not None,
        "HAS_BUFFER": intermediate_states is not None,
        "HAS_ROWS": intermediate_indices is not None,
        "HAS_WINDOWS": conv_states is not None,
        "HAS_STATES": ssm_states is not None,
        "WINDOW_BLOCK": _WINDOW_BLOCK,
        "BLOCK": 1,
        "num_warps": 4,
    }
    window_tiles = state_tiles = 0
    if conv_states is not None:
        _, dim, columns = conv_states.shape
        slot, channel, column = conv_states.stride()
        width = 1 << (columns - 1).bit_length()
        window_tiles = tiles(dim, _WINDOW_BLOCK // width)
        options |= {
            "dim": dim,
            "columns": columns,
            "window_tiles": window_tiles,
            "window_slot": slot,
            "window_channel": channel,
            "window_column": column,
            "COLUMNS": width,
            "COLUMNS_INNERMOST": column < channel,
        }
    if ssm_states is not None:
        size, block = math.prod(ssm_states.shape[1:]), BLOCK_BYTES // ssm_states.element_size()
        state_tiles = tiles(size, block)
        strides = [ssm_states.stride(0)]
        if intermediate_states is not None:
            strides += intermediate_states.stride()[:2]
            options["last"] = intermediate_states.shape[1] - 1
        elif src_indices.dim() == 2:
            options |= {"src_token": src_indices.stride(1), "last": src_indices.shape[1] - 1}
        unit = units(ssm_states.element_size(), *strides)
        in_units = [stride // unit for stride in strides]
        options |= {"size": size, "state_slot": in_units[0], "UNIT": unit, "BLOCK": block}
        if intermediate_states is not None:
            options |= {"source_row": in_units[1], "source_token": in_units[2]}
    copies = dst_indices.shape[0]
    return Launch(kernels.commit_states, (window_tiles + state_tiles, copies + 1), tensors, options)
