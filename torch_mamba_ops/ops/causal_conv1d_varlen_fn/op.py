"""The contract of the causal convolution over packed sequences and a pool of windows."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_mamba_ops.dispatch import Op
from torch_mamba_ops.dispatch.repeat import each_time, repeatable
from torch_mamba_ops.ops.checks import INTEGER, canonical_activation, check_dtype, check_rank, check_tensor
from torch_mamba_ops.ops.conv import check_filter, check_window
from torch_mamba_ops.ops.packing import check_packing
from torch_mamba_ops.ops.pool import check_slots


def _fake(x: Tensor, *tensors: Tensor | None, **options: object) -> Tensor:
    return torch.empty_like(x)


OP = Op(
    "causal_conv1d_varlen_fn(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) conv_states, Tensor query_start_loc, "
    "Tensor? cache_indices, Tensor? has_initial_state, *, str? activation, int pad_slot_id, str backend) -> Tensor",
    fake=_fake,
    auto=("triton", "reference"),
)


@repeatable(OP, unread=("has_initial_state",))
def causal_conv1d_varlen_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_states: Tensor,
    query_start_loc: Tensor,
    *,
    cache_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    activation: str | bool | None = None,
    pad_slot_id: int = -1,
    backend: str | None = None,
) -> Tensor:
    """Causal depthwise convolution over packed sequences, whose windows are read from and written to a pool in place.

    The convolution is that of `causal_conv1d_fn`. A prefill that speculative decoding will go on from takes
    ``conv_states[..., : width - 1]``: with one accepted token, `causal_conv1d_update` reads those columns.

    Args:
        x: ``[dim, total_tokens]``, any strides (channel last as well).
        weight: ``[dim, width]``, width 2 to 4.
        bias: ``[dim]``.
        conv_states: ``[slots, dim, columns]``, columns >= width - 1, newest last, any strides (dim or columns
            innermost); the pool. Its last ``width - 1`` columns are the inputs before the first. Mutated: every column
            shifts by the sequence's length and its last inputs are appended.
        query_start_loc: int ``[sequences + 1]``, the first token of each sequence. A sequence may have no token: its
            slot is left alone. Tokens of no sequence get zero.
        cache_indices: int ``[sequences]``, the slot of each sequence; None: sequence i has slot i.
        has_initial_state: bool ``[sequences]``, whether the slot's window counts or zeros; None: zeros.
        activation: None, or ``"silu"`` (also ``"swish"``).
        pad_slot_id: a sequence with this slot touches no window and its output is zero.
        backend: the backend's name; None: as chosen by context, process, environment or automatically.

    Returns:
        ``[dim, total_tokens]`` in x's dtype and memory layout.

    Raises:
        ValueError: a shape, device, width, slot or activation is wrong.
        TypeError: a dtype is wrong.
        BackendError: the backend asked for is unknown or cannot run this call.

    Paper: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), section 3.4.
    """
    check_rank("x", x, (2,), "[dim, total_tokens]")
    check_dtype("x", x)
    dim = x.shape[0]
    width = check_filter(x, dim, weight, bias, widest=4)
    each_time(check_packing, "query_start_loc", query_start_loc, x.shape[1], x.device)
    sequences = query_start_loc.shape[0] - 1
    check_window(conv_states, "conv_states", x, dim, width)
    slots = conv_states.shape[0]
    if cache_indices is not None:
        check_tensor("cache_indices", cache_indices, (sequences,), "[sequences]", x.device, INTEGER)
        each_time(check_slots, "cache_indices", cache_indices, slots, pad_slot_id, written=True)
    elif slots != sequences:
        raise ValueError(f"conv_states: got {slots} slots, expected {sequences}, one a sequence, without cache_indices")
    if has_initial_state is not None:
        check_tensor("has_initial_state", has_initial_state, (sequences,), "[sequences]", x.device, (torch.bool,))
    options = {"activation": canonical_activation(activation), "pad_slot_id": pad_slot_id}
    result: Tensor = OP(
        backend, (x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state), options
    )
    return result
