"""The decode step of the convolution by Triton: which of its two kernels runs a call, and on what blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_mamba_ops.dispatch import register_backend
from torch_mamba_ops.ops.launch import Launch, launch, reasons_against_triton
from torch_mamba_ops.tuning import configs_for, key_of, version

_MOST_COLUMNS = 8  # that a thread can hold in registers


def _why_not(*tensors: Tensor | None, **options: Any) -> list[str]:
    return reasons_against_triton(tensors)


@register_backend("causal_conv1d_update", "triton", trace="inline", why_not=_why_not, version=version())
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
    # Tokens of no sequence are no program's.
    out = torch.empty_like(x) if query_start_loc is None else torch.zeros_like(x)
    launch(
        plan, x, conv_state, weight, bias, cache_seqlens, conv_state_indices, num_accepted_tokens, query_start_loc,
        parents, out, activation, pad_slot_id, result=out if query_start_loc is None else None,
    )  # fmt: skip
    return out


def plan(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
    num_accepted_tokens: Tensor | None,
    query_start_loc: Tensor | None,
    parents: Tensor | None,
    out: Tensor,
    activation: str | None,
    pad_slot_id: int,
) -> Launch:
    from torch_mamba_ops.ops.causal_conv1d_update import kernels

    dim = x.shape[1]
    tensors = {
        "conv_state_ptr": conv_state,
        "out_ptr": out,
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "conv_state_indices_ptr": conv_state_indices,
    }
    options: dict[str, Any] = {
        "dim": dim,
        "pad_slot_id": pad_slot_id,
        "slot_stride": conv_state.stride(0),
        "column_stride": conv_state.stride(2),
        "WIDTH": int(weight.shape[1]),
        "HAS_BIAS": bias is not None,
        "HAS_INDICES": conv_state_indices is not None,
        "SILU": activation == "silu",
    }
    plain = cache_seqlens is None and num_accepted_tokens is None and query_start_loc is None
    if plain and is_dense(x, conv_state, weight, bias):
        batch = x.shape[0]
        columns_innermost = conv_state.stride(2) == 1
        config = _config(batch, dim, int(weight.shape[1]), int(conv_state.shape[2]), columns_innermost, conv_state)
        sequences, warps = config["SEQUENCES"], config["num_warps"]
        group = 16 // max(x.element_size(), conv_state.element_size())
        options |= {
            "batch": batch,
            "x_stride": x.stride(0),
            "out_stride": out.stride(0),
            "COLUMNS": int(conv_state.shape[2]),
            "COLUMNS_INNERMOST": columns_innermost,
            "GROUPS": 32 * warps,
            "GROUP": group,
            **config,
        }
        grid = (_blocks(batch, sequences), _blocks(dim, 32 * warps * group))
        return Launch(kernels.update_one_token, grid, tensors, options)

    if query_start_loc is not None:
        batch, length, token_dim = query_start_loc.shape[0] - 1, 1, 0
    else:
        batch, length, token_dim = x.shape[0], x.shape[2] if x.dim() == 3 else 1, x.dim() - 1
    tensors |= {
        "cache_seqlens_ptr": cache_seqlens,
        "num_accepted_tokens_ptr": num_accepted_tokens,
        "query_start_loc_ptr": query_start_loc,
        "parents_ptr": parents,
    }
    options |= {
        "length": length,
        "columns": conv_state.shape[2],
        "x_sequence_stride": x.stride(0),
        "x_dim_stride": x.stride(1),
        "x_token_stride": x.stride(token_dim),
        "out_sequence_stride": out.stride(0),
        "out_dim_stride": out.stride(1),
        "out_token_stride": out.stride(token_dim),
        "state_dim_stride": conv_state.stride(1),
        "weight_dim_stride": weight.stride(0),
        "weight_tap_stride": weight.stride(1),
        "bias_stride": 0 if bias is None else bias.stride(0),
        "parents_sequence_stride": 0 if parents is None else parents.stride(0),
        "parents_token_stride": 0 if parents is None else parents.stride(-1),
        "RING": cache_seqlens is not None,
        "ACCEPTED": num_accepted_tokens is not None,
        "PACKED": query_start_loc is not None,
        "HAS_PARENTS": parents is not None,
        "BLOCK": 256,
        "CHUNK": 4,
        "num_warps": 2,
    }
    return Launch(kernels.update_tokens, (batch, _blocks(dim, 256)), tensors, options)


def is_dense(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether one token a sequence stands in vectors: channels side by side and, where the kernel wants them, 16 bytes
    of them at a time. Triton takes that from numbers that are multiples of 16."""
    dim, columns = x.shape[1], conv_state.shape[2]
    slot, channel, column = conv_state.stride()
    columns_innermost = column == 1 and channel == columns
    return (
        (x.dim() == 2 or x.shape[2] == 1)
        and columns <= _MOST_COLUMNS
        and x.stride(1) == 1
        and weight.is_contiguous()
        and (bias is None or bias.stride(0) == 1)
        and (columns_innermost or channel == 1)
        and all(number % 16 == 0 for number in (dim, x.stride(0), slot))
        and (columns_innermost or column % 16 == 0)
    )


def _config(
    batch: int, dim: int, width: int, columns: int, columns_innermost: bool, conv_state: Tensor
) -> dict[str, Any]:
    """Sequences and warps of a program of the one-token kernel.

    Two sequences share the weights that are loaded, and the assembler has all of their loads on the way before the
    first use; with one it saves registers and waits in between.
    """
    key = key_of(conv_state.dtype, W=width, K=columns, DS=int(columns_innermost))
    found = configs_for("causal_conv1d_update", key, batch * dim, conv_state.device)
    if found is not None:
        return found
    alone = isinstance(batch, int) and batch == 1
    return {"SEQUENCES": 1, "num_warps": 1} if alone else {"SEQUENCES": 2, "num_warps": 2}


def _blocks(count: int, size: int) -> int:
    return (count + size - 1) // size
