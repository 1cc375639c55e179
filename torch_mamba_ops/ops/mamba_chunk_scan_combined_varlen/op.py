"""The contract of the state space dual scan over packed sequences and a pool of states."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_mamba_ops.dispatch import Op
from torch_mamba_ops.dispatch.repeat import each_time, repeatable
from torch_mamba_ops.ops.checks import INTEGER, check_out, check_rank, check_scan_inputs, check_tensor, finite_limits
from torch_mamba_ops.ops.packing import check_packing
from torch_mamba_ops.ops.pool import check_slots


def _fake(x: Tensor, *tensors: Tensor | None, **options: object) -> Tensor:
    return x.new_empty(x.shape)


OP = Op(
    "mamba_chunk_scan_combined_varlen(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor cu_seqlens, Tensor? D, "
    "Tensor? z, Tensor? dt_bias, Tensor(a!)? states, Tensor? state_indices, Tensor? has_initial_state, "
    "Tensor? num_computed_tokens, *, int chunk_size, bool dt_softplus, float? dt_min, float? dt_max, int pad_slot_id, "
    "str backend) -> Tensor",
    fake=_fake,
    auto=("triton", "reference"),
    hints=("chunk_size",),
)


@repeatable(OP, unread=("has_initial_state", "num_computed_tokens"))
def mamba_chunk_scan_combined_varlen(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    cu_seqlens: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    states: Tensor | None = None,
    state_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    num_computed_tokens: Tensor | None = None,
    pad_slot_id: int = -1,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """State space dual (SSD) scan over packed sequences, whose states are read from and written to a pool in place.

    The recurrence is that of `mamba_chunk_scan_combined`. All metadata of the batch is worked out on the device.

    Args:
        x: ``[total_tokens, heads, head_dim]``, any strides.
        dt: ``[total_tokens, heads]``.
        A: ``[heads]``, negative.
        B: ``[total_tokens, groups, state]``; groups divide the heads.
        C: like B.
        chunk_size: tokens a chunk, a power of two.
        cu_seqlens: int ``[sequences + 1]``, the first token of each sequence. A sequence may have no token: its slot is
            left alone. Tokens of no sequence get zero.
        D: ``[heads]`` or ``[heads, head_dim]``.
        z: like x; the gate.
        dt_bias: ``[heads]``.
        dt_softplus: whether the step size goes through softplus.
        dt_limit: the step size is clamped to this range.
        states: ``[slots, heads, head_dim, state]``, float, any strides; the pool. Mutated: each sequence's slot
            receives its last state.
        state_indices: int ``[sequences]``, the slot of each sequence; None: sequence i has slot i.
        has_initial_state: bool ``[sequences]``, whether a sequence starts from its slot's state; None: from zero.
        num_computed_tokens: int ``[sequences]``, tokens of each sequence that came before, so that chunks begin at the
            same positions however a prompt is cut.
        pad_slot_id: a sequence with this slot touches no state and its output is zero.
        out: like x; written and returned.
        backend: the backend's name; None: as chosen by context, process, environment or automatically.

    Returns:
        ``[total_tokens, heads, head_dim]`` in x's dtype, contiguous.

    Raises:
        ValueError: a shape, device, slot, chunk size or limit is wrong, or options exclude each other.
        TypeError: a dtype is wrong.
        BackendError: the backend asked for is unknown or cannot run this call.

    Paper: Dao and Gu, "Transformers are SSMs" (2024).
    """
    check_rank("x", x, (3,), "[total_tokens, heads, head_dim]")
    tokens, heads, head_dim = x.shape
    size = check_scan_inputs((tokens,), x, dt, A, B, C, chunk_size, D, z, dt_bias)
    each_time(check_packing, "cu_seqlens", cu_seqlens, tokens, x.device)
    sequences = cu_seqlens.shape[0] - 1
    if states is None:
        for name, tensor in (("state_indices", state_indices), ("has_initial_state", has_initial_state)):
            if tensor is not None:
                raise ValueError(f"{name}: given without states, expected both")
    else:
        check_rank("states", states, (4,), "[slots, heads, head_dim, state]")
        slots = states.shape[0]
        check_tensor("states", states, (slots, heads, head_dim, size), "[slots, heads, head_dim, state]", x.device)
        if state_indices is None and slots != sequences:
            raise ValueError(f"states: got {slots} slots, expected {sequences}, one a sequence, without state_indices")
    for name, tensor, dtypes in (
        ("state_indices", state_indices, INTEGER),
        ("has_initial_state", has_initial_state, (torch.bool,)),
        ("num_computed_tokens", num_computed_tokens, INTEGER),
    ):
        if tensor is not None:
            check_tensor(name, tensor, (sequences,), "[sequences]", x.device, dtypes)
    if states is not None and state_indices is not None:
        each_time(check_slots, "state_indices", state_indices, states.shape[0], pad_slot_id, written=True)
    dt_min, dt_max = finite_limits(dt_limit)
    tensors = (
        x, dt, A, B, C, cu_seqlens, D, z, dt_bias, states, state_indices, has_initial_state, num_computed_tokens,
    )  # fmt: skip
    if out is not None:
        check_out(out, x, dict(zip(OP.tensors, tensors, strict=True)))
    options = {
        "chunk_size": chunk_size,
        "dt_softplus": dt_softplus,
        "dt_min": dt_min,
        "dt_max": dt_max,
        "pad_slot_id": pad_slot_id,
    }
    result: Tensor = OP(backend, tensors, options)
    return result if out is None else out.copy_(result)
