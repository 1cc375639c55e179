"""The contract of the state space dual scan over dense batches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_mamba_ops.dispatch import Op
from torch_mamba_ops.ops.checks import INTEGER, check_rank, check_scan_inputs, check_tensor, finite_limits
from torch_mamba_ops.ops.packing import check_packing


def _fake(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    state_dtype: torch.dtype | None,
    **options: object,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = state_dtype or torch.float32
    one_state = (*x.shape[2:], B.shape[-1])
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        x.new_empty(x.shape),
        x.new_empty((x.shape[0], *one_state), dtype=dtype),
        x.new_empty((sequences, *one_state), dtype=dtype),
    )


OP = Op(
    "mamba_chunk_scan_combined(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? dt_bias, Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens, *, int chunk_size, "
    "bool dt_softplus, float? dt_min, float? dt_max, ScalarType? state_dtype, str backend) "
    "-> (Tensor out, Tensor final_states, Tensor varlen_states)",
    fake=_fake,
    auto=("triton", "reference"),
    differentiable=True,
    hints=("chunk_size",),
)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    r"""State space dual (SSD) scan over dense batches, of any length. Differentiable.

    .. math::
        h_t = e^{\Delta_t A} h_{t-1} + \Delta_t\, x_t \otimes B_t, \qquad
        y_t = (h_t C_t + D x_t) \cdot \mathrm{silu}(z_t),
        \qquad \Delta = \mathrm{clamp}(\mathrm{softplus}(dt + dt\_bias))

    Args:
        x: ``[batch, length, heads, head_dim]``, any strides.
        dt: ``[batch, length, heads]``.
        A: ``[heads]``, negative.
        B: ``[batch, length, groups, state]``; groups divide the heads.
        C: like B.
        chunk_size: tokens a chunk, a power of two. Changes rounding, nothing else.
        D: ``[heads]`` or ``[heads, head_dim]``.
        z: like x; the gate.
        dt_bias: ``[heads]``.
        initial_states: ``[batch, heads, head_dim, state]``, the state before the first token's sequence.
        seq_idx: int ``[batch, length]``, which sequence a token belongs to; sequences stand one after the other: no
            number comes back in its row.
        cu_seqlens: int ``[sequences + 1]``, the first token of each sequence packed in the one row of a batch of one.
        dt_softplus: whether the step size goes through softplus.
        dt_limit: the step size is clamped to this range.
        return_final_states: also return the state after the last token.
        return_varlen_states: also return the state after each sequence of ``cu_seqlens``.
        state_dtype: of the returned states; None: float32.
        backend: the backend's name; None: as chosen by context, process, environment or automatically.

    Returns:
        out ``[batch, length, heads, head_dim]`` in x's dtype, contiguous; or a tuple of it with, as asked,
        ``[batch, heads, head_dim, state]`` final states and ``[sequences, heads, head_dim, state]`` varlen states.

    Raises:
        ValueError: a shape, device, chunk size or limit is wrong, or options exclude each other.
        TypeError: a dtype is wrong.
        BackendError: the backend asked for is unknown or cannot run this call.

    Paper: Dao and Gu, "Transformers are SSMs" (2024).
    """
    check_rank("x", x, (4,), "[batch, length, heads, head_dim]")
    batch, length, heads, head_dim = x.shape
    size = check_scan_inputs((batch, length), x, dt, A, B, C, chunk_size, D, z, dt_bias)
    if initial_states is not None:
        meaning = "[batch, heads, head_dim, state]"
        check_tensor("initial_states", initial_states, (batch, heads, head_dim, size), meaning, x.device)
    if seq_idx is not None:
        check_tensor("seq_idx", seq_idx, (batch, length), "[batch, length]", x.device, INTEGER)
    if cu_seqlens is not None:
        check_packing("cu_seqlens", cu_seqlens, length, x.device)
        if batch != 1:
            raise ValueError(f"x: got a batch of {batch}, expected 1 with cu_seqlens")
    elif return_varlen_states:
        raise ValueError("cu_seqlens: got None, expected [sequences + 1] with return_varlen_states")
    dt_min, dt_max = finite_limits(dt_limit)
    out, final_states, varlen_states = OP(
        backend,
        (x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens),
        {
            "chunk_size": chunk_size,
            "dt_softplus": dt_softplus,
            "dt_min": dt_min,
            "dt_max": dt_max,
            "state_dtype": state_dtype,
        },
    )
    results = (
        out,
        *((final_states,) if return_final_states else ()),
        *((varlen_states,) if return_varlen_states else ()),
    )
    return results if len(results) > 1 else out
