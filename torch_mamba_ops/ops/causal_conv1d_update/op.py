"""The contract of the decode step of the causal convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_mamba_ops.dispatch import Op
from torch_mamba_ops.dispatch.repeat import each_time, repeatable
from torch_mamba_ops.ops.checks import INTEGER, canonical_activation, check_dtype, check_out, check_rank, check_tensor
from torch_mamba_ops.ops.conv import check_filter, check_window
from torch_mamba_ops.ops.packing import check_longest, check_packing
from torch_mamba_ops.ops.pool import check_slots
from torch_mamba_ops.ops.tree import check_parents


def _fake(x: Tensor, *tensors: Tensor | None, **options: object) -> Tensor:
    return torch.empty_like(x)


OP = Op(
    "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, Tensor? cache_seqlens, "
    "Tensor? conv_state_indices, Tensor? num_accepted_tokens, Tensor? query_start_loc, Tensor? parents, *, "
    "str? activation, SymInt? max_query_len, int pad_slot_id, str backend) -> Tensor",
    fake=_fake,
    auto=("triton", "reference"),
    hints=("max_query_len",),
)


@repeatable(OP, unread=("cache_seqlens", "num_accepted_tokens"))
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | bool | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
    *,
    num_accepted_tokens: Tensor | None = None,
    parents: Tensor | None = None,
    query_start_loc: Tensor | None = None,
    max_query_len: int | None = None,
    pad_slot_id: int = -1,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One decode step, of one or several tokens, of the causal convolution over a pool of windows updated in place.

    The convolution is that of `causal_conv1d_fn`, the window being the inputs before the first.

    Args:
        x: ``[batch, dim]``, ``[batch, dim, length]`` or, with query_start_loc, ``[total_tokens, dim]``.
        conv_state: ``[slots, dim, columns]``, columns >= width - 1, newest last, any strides (dim or columns
            innermost); the pool. The window is its last ``width - 1`` columns. Mutated: all columns shift by the number
            of new tokens, which are appended.
        weight: ``[dim, width]``, width 2 to 6.
        bias: ``[dim]``.
        activation: None, or ``"silu"`` (also ``"swish"``).
        cache_seqlens: int ``[batch]``, tokens seen so far: the columns are a ring, written from column
            ``cache_seqlens % columns``, and nothing shifts.
        conv_state_indices: int ``[batch]``, the slot of each sequence; None: sequence i has slot i.
        num_accepted_tokens: int ``[batch]``, speculative decoding: how many tokens of the last step were accepted (0
            counts as 1). The window is then columns ``[accepted - 1, accepted + width - 2)``, and afterwards the first
            columns hold its last ``width - 2`` inputs and the new tokens; needs columns >= width - 2 + tokens.
        parents: int ``[batch, length]`` or, packed, ``[total_tokens]``, drafts that are a tree: the number, in its
            sequence, of the token that each token follows, which comes before it; -1: the window. As `commit_states`
            takes them. Needs num_accepted_tokens, with which every token gets a column of its own. None: each token
            follows the one before.
        query_start_loc: int ``[batch + 1]``, the first token of each sequence in a packed batch. A sequence may have no
            token: its slot is left alone. Tokens of no sequence get zero.
        max_query_len: with query_start_loc, a bound on the tokens of one sequence.
        pad_slot_id: a sequence with this slot touches no window and its output is zero.
        out: like x; written and returned.
        backend: the backend's name; None: as chosen by context, process, environment or automatically.

    Returns:
        Shaped like x, in its dtype and memory layout; never x itself.

    Raises:
        ValueError: a shape, device, width, slot or activation is wrong, ``out`` overlaps an input, or options exclude
            each other.
        TypeError: a dtype is wrong.
        BackendError: the backend asked for is unknown or cannot run this call.

    Paper: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), section 3.4.
    """
    packed = query_start_loc is not None
    check_rank(
        "x", x, (2,) if packed else (2, 3), "[total_tokens, dim]" if packed else "[batch, dim] or [batch, dim, length]"
    )
    check_dtype("x", x)
    dim = x.shape[1]
    width = check_filter(x, dim, weight, bias, widest=6)
    check_window(conv_state, "conv_state", x, dim, width)
    slots, _, columns = conv_state.shape
    if query_start_loc is not None:
        if max_query_len is None:
            raise ValueError(
                "max_query_len: got None with query_start_loc, expected a bound on the tokens of one sequence"
            )
        check_longest("max_query_len", max_query_len)
        each_time(check_packing, "query_start_loc", query_start_loc, x.shape[0], x.device, max_query_len)
        batch, length = query_start_loc.shape[0] - 1, max_query_len
    elif max_query_len is not None:
        raise ValueError(f"max_query_len: got {max_query_len} without query_start_loc, expected both")
    else:
        batch, length = x.shape[0], x.shape[2] if x.dim() == 3 else 1
    if conv_state_indices is not None:
        check_tensor("conv_state_indices", conv_state_indices, (batch,), "[batch]", x.device, INTEGER)
        each_time(check_slots, "conv_state_indices", conv_state_indices, slots, pad_slot_id, written=True)
    elif slots != batch:
        raise ValueError(f"conv_state: got {slots} slots, expected {batch}, one a sequence, without conv_state_indices")
    if cache_seqlens is not None:
        check_tensor("cache_seqlens", cache_seqlens, (batch,), "[batch]", x.device, INTEGER)
        if num_accepted_tokens is not None:
            raise ValueError("cache_seqlens: given with num_accepted_tokens, expected one of them")
        if length > columns:
            raise ValueError(f"x: got {length} tokens for a ring of {columns} columns, expected no more than that")
    if num_accepted_tokens is not None:
        check_tensor("num_accepted_tokens", num_accepted_tokens, (batch,), "[batch]", x.device, INTEGER)
        if columns < width - 2 + length:
            expected = f"width - 2 + tokens = {width - 2 + length}, with num_accepted_tokens"
            raise ValueError(f"conv_state: got {columns} columns, expected at least {expected}")
    if parents is not None:
        if num_accepted_tokens is None:
            raise ValueError("parents: given without num_accepted_tokens, expected both")
        if query_start_loc is None and x.dim() == 2:
            raise ValueError("parents: given with one token a sequence, expected x with a length, or query_start_loc")
        check_parents(parents, x.shape[:1] if packed else (batch, length), query_start_loc, x.device)
    tensors = (
        x, conv_state, weight, bias, cache_seqlens, conv_state_indices, num_accepted_tokens, query_start_loc, parents,
    )  # fmt: skip
    if out is not None:
        check_out(out, x, dict(zip(OP.tensors, tensors, strict=True)))
    options = {
        "activation": canonical_activation(activation),
        "max_query_len": max_query_len,
        "pad_slot_id": pad_slot_id,
    }
    result: Tensor = OP(backend, tensors, options)
    return result if out is None else out.copy_(result)
