"""The contract of the selective state update: arguments, checks, result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_mamba_ops.dispatch import Op
from torch_mamba_ops.dispatch.op import Preference
from torch_mamba_ops.dispatch.repeat import each_time, repeatable
from torch_mamba_ops.ops.checks import (
    FLOATING,
    INTEGER,
    check_dtype,
    check_groups,
    check_int,
    check_out,
    check_rank,
    check_tensor,
)
from torch_mamba_ops.ops.packing import check_longest, check_packing
from torch_mamba_ops.ops.pool import check_slots
from torch_mamba_ops.ops.tree import check_parents
from torch_mamba_ops.tuning import preferred


def _fake(state: Tensor, x: Tensor, *tensors: Tensor | None, **options: object) -> Tensor:
    return x.new_empty(x.shape)


def _prefer(
    *,
    state: Tensor,
    x: Tensor,
    dst_state_batch_indices: Tensor | None,
    cu_seqlens: Tensor | None,
    num_accepted_tokens: Tensor | None,
    intermediate_states_buffer: Tensor | None,
    **others: object,
) -> Preference | None:
    """What is measured is one token a sequence, whose state is written where it was read."""
    if x.dim() != state.dim() - 1 or cu_seqlens is not None or intermediate_states_buffer is not None:
        return None
    if num_accepted_tokens is not None or dst_state_batch_indices is not None:
        return None
    heads = state.shape[1] if state.dim() == 4 else 1
    work, (head_dim, size) = x.shape[0] * heads, state.shape[-2:]
    return preferred("selective_state_update", work, state.device, state.dtype, P=head_dim, N=size)


OP = Op(
    "selective_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? dt_bias, Tensor? state_batch_indices, Tensor? dst_state_batch_indices, Tensor? cu_seqlens, "
    "Tensor? num_accepted_tokens, Tensor(b!)? intermediate_states_buffer, Tensor? intermediate_state_indices, "
    "Tensor? rand_seed, Tensor? parents, *, bool dt_softplus, int pad_slot_id, SymInt? max_seqlen, "
    "bool disable_state_update, int philox_rounds, str backend) -> Tensor",
    fake=_fake,
    auto=("triton", "reference"),
    hints=("max_seqlen",),
    prefer=_prefer,
)


@repeatable(OP, unread=("num_accepted_tokens", "rand_seed"))
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    *,
    dst_state_batch_indices: Tensor | None = None,
    pad_slot_id: int = -1,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    num_accepted_tokens: Tensor | None = None,
    intermediate_states_buffer: Tensor | None = None,
    intermediate_state_indices: Tensor | None = None,
    parents: Tensor | None = None,
    disable_state_update: bool = False,
    rand_seed: Tensor | None = None,
    philox_rounds: int = 10,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""One decode step, of one or several tokens, over a pool of states that is updated in place.

    .. math::
        h \leftarrow e^{\Delta A} h + \Delta\, x \otimes B, \qquad y = (h C + D x) \cdot \mathrm{silu}(z),
        \qquad \Delta = \mathrm{softplus}(dt + dt\_bias)

    Mamba1 has a state ``[slots, dim, state]`` and no heads; Mamba2 has ``[slots, heads, head_dim, state]``. Shapes
    below are Mamba2's; for Mamba1 read ``dim`` for ``heads, head_dim`` and drop ``groups``. ``tokens`` stands for
    ``batch`` (one token each), ``batch, length`` (several tokens each) or, with ``cu_seqlens``, ``total_tokens``.

    Args:
        state: ``[slots, heads, head_dim, state]``, float; the pool, any strides. Mutated.
        x: ``[tokens, heads, head_dim]``.
        dt: ``[tokens, heads, head_dim]``, or ``[tokens, heads]`` when one step size serves a head (Mamba2). An
            expanded tensor (stride 0 over ``head_dim``) counts as the latter, when A and dt_bias are expanded too.
        A: ``[heads, head_dim, state]``, or ``[heads]`` (tied to dt's shape); negative.
        B: ``[tokens, groups, state]``; groups divide the heads.
        C: like B.
        D: ``[heads, head_dim]`` or ``[heads]``.
        z: like x; the gate.
        dt_bias: ``[heads, head_dim]``, or ``[heads]`` with a tied dt.
        dt_softplus: whether the step size goes through softplus.
        state_batch_indices: int ``[batch]``, the slot of each sequence; None: sequence i has slot i. ``[batch,
            columns]`` for speculative decoding: a slot for the state after each token.
        dst_state_batch_indices: where states are written, if not where they are read. ``[batch]``: the state after the
            last token; ``[batch, columns]``: the state after token i goes to column i. Not a
            slot that another sequence reads.
        pad_slot_id: a sequence with this slot touches no state and its output is zero. As a destination: not written.
        cu_seqlens: int ``[batch + 1]``, first token of each sequence in a packed batch. Sequences of no token are left
            alone; tokens of no sequence get zero.
        max_seqlen: with cu_seqlens, a bound on the tokens of one sequence.
        num_accepted_tokens: int ``[batch]``; reads the state of column ``max(num_accepted_tokens - 1, 0)``. Needs
            ``state_batch_indices`` with columns.
        intermediate_states_buffer: ``[rows, length, heads, head_dim, state]``; receives the state after each token.
            Mutated.
        intermediate_state_indices: int ``[batch]``, the row of each sequence in that buffer; None: row i.
        parents: int ``[batch, length]`` or, packed, ``[total_tokens]``, drafts that are a tree: the number, in its
            sequence, of the token that each token follows, which comes before it; -1: the state that is read. As
            `commit_states` takes them. Needs disable_state_update or a slot for the state after each token, since there
            is no one state after the step. None: each token follows the one before.
        disable_state_update: leave ``state`` alone (verify drafts, commit later).
        rand_seed: int64, one element; float16 and bfloat16 states are rounded stochastically (Philox, counted by the
            element's place in the pool). Not those in intermediate_states_buffer.
        philox_rounds: of that generator.
        out: like x; written and returned.
        backend: the backend's name; None: as chosen by context, process, environment or automatically.

    Returns:
        ``[tokens, heads, head_dim]`` in x's dtype.

    Raises:
        ValueError: a shape, device or slot is wrong, ``out`` overlaps an input, or options exclude each other.
        TypeError: a dtype is wrong.
        BackendError: the backend asked for is unknown or cannot run this call.

    Papers: Gu and Dao, "Mamba" (2023); Dao and Gu, "Transformers are SSMs" (2024).
    """
    check_rank("state", state, (3, 4), "[slots, dim, state] or [slots, heads, head_dim, state]")
    device = state.device
    inner = state.shape[1:]
    channels, size = inner[:-1], inner[-1]
    check_int("pad_slot_id", pad_slot_id)
    if state.dim() == 4:
        check_rank("A", A, (1, 3), "[heads] or [heads, head_dim, state]")
        check_rank("dt", dt, range(2, 5), "[tokens, heads] or [tokens, heads, head_dim]")
        if D is not None:
            check_rank("D", D, (1, 2), "[heads] or [heads, head_dim]")
        A, dt, dt_bias, D = _tied(A, dt, dt_bias, D)
    tied = state.dim() == 4 and A.dim() == 1

    tokens = _token_dims(x, len(channels), cu_seqlens, max_seqlen)
    check_dtype("state", state)
    check_tensor("x", x, (*tokens, *channels), "[tokens, heads, head_dim], like the state", device)
    per_step = tuple(channels[:1]) if tied else tuple(channels)
    check_tensor("dt", dt, (*tokens, *per_step), "[tokens, heads]" if tied else "[tokens, heads, head_dim]", device)
    check_tensor(
        "A", A, per_step if tied else (*per_step, size), "[heads]" if tied else "[heads, head_dim, state]", device
    )
    check_rank("B", B, (len(tokens) + len(channels),), "[tokens, groups, state]")
    groups = tuple(B.shape[len(tokens) : -1])
    check_tensor("B", B, (*tokens, *groups, size), "[tokens, groups, state]", device)
    check_tensor("C", C, (*tokens, *groups, size), "[tokens, groups, state], like B", device)
    if groups:
        check_groups("B", groups[0], channels[0])
    if D is not None:
        by_head = len(channels) == 2 and D.dim() == 1
        check_tensor("D", D, channels[:1] if by_head else channels, "[heads] or [heads, head_dim]", device)
    if z is not None:
        check_tensor("z", z, x.shape, "the shape of x", device)
    if dt_bias is not None:
        check_tensor("dt_bias", dt_bias, per_step, "[heads]" if tied else "[heads, head_dim]", device)

    batch = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else tokens[0]
    _check_slots_arguments(
        state,
        batch,
        state_batch_indices,
        dst_state_batch_indices,
        num_accepted_tokens,
        pad_slot_id,
        disable_state_update,
        device,
    )
    if parents is not None:
        write = state_batch_indices if dst_state_batch_indices is None else dst_state_batch_indices
        _check_tree(parents, tokens, cu_seqlens, device, write, disable_state_update)
    if intermediate_states_buffer is not None:
        length = max_seqlen if max_seqlen is not None else tokens[1] if len(tokens) == 2 else 1
        check_rank(
            "intermediate_states_buffer",
            intermediate_states_buffer,
            (2 + len(inner),),
            "[rows, length, heads, head_dim, state]",
        )
        rows, steps = intermediate_states_buffer.shape[:2]
        check_tensor(
            "intermediate_states_buffer",
            intermediate_states_buffer,
            (rows, steps, *inner),
            "[rows, length, heads, head_dim, state]",
            device,
        )
        if steps < length:
            raise ValueError(f"intermediate_states_buffer: got {steps} steps a row, expected at least {length}")
        if intermediate_state_indices is not None:
            check_tensor("intermediate_state_indices", intermediate_state_indices, (batch,), "[batch]", device, INTEGER)
            each_time(
                check_slots, "intermediate_state_indices", intermediate_state_indices, rows, pad_slot_id, written=True
            )
        elif rows < batch:
            raise ValueError(f"intermediate_states_buffer: got {rows} rows, expected {batch}, one a sequence")
    elif intermediate_state_indices is not None:
        raise ValueError("intermediate_state_indices: given without intermediate_states_buffer, expected both")
    if rand_seed is not None:
        check_rank("rand_seed", rand_seed, range(9), "of one element")
        check_tensor("rand_seed", rand_seed.reshape(-1), (1,), "one element", device, (torch.int64,))
        check_int("philox_rounds", philox_rounds)
        check_dtype("state (with rand_seed)", state, (torch.float16, torch.bfloat16))
        if philox_rounds <= 0:
            raise ValueError(f"philox_rounds: got {philox_rounds}, expected at least 1")
    tensors = (
        state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, dst_state_batch_indices, cu_seqlens,
        num_accepted_tokens, intermediate_states_buffer, intermediate_state_indices, rand_seed, parents,
    )  # fmt: skip
    if out is not None:
        check_out(out, x, dict(zip(OP.tensors, tensors, strict=True)))
    result = OP(
        backend,
        tensors,
        {
            "dt_softplus": dt_softplus,
            "pad_slot_id": pad_slot_id,
            "max_seqlen": max_seqlen,
            "disable_state_update": disable_state_update,
            "philox_rounds": philox_rounds,
        },
    )
    return result if out is None else out.copy_(result)


def _tied(A: Tensor, dt: Tensor, dt_bias: Any, D: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One value a head where the caller expanded it, before the compiler can materialise the expansion."""
    expanded = A.dim() == 3 and A.stride(-1) == 0 and A.stride(-2) == 0 and dt.stride(-1) == 0
    if expanded and (dt_bias is None or dt_bias.stride(-1) == 0):
        A, dt = A[:, 0, 0], dt[..., 0]
        dt_bias = dt_bias[:, 0] if dt_bias is not None else None
    if D is not None and D.dim() == 2 and D.stride(-1) == 0:
        D = D[:, 0]
    return A, dt, dt_bias, D


def _token_dims(x: Tensor, channel_dims: int, cu_seqlens: Tensor | None, max_seqlen: int | None) -> tuple[int, ...]:
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError(f"max_seqlen: got {max_seqlen} without cu_seqlens, expected both")
        check_rank(
            "x", x, (channel_dims + 1, channel_dims + 2), "[batch, heads, head_dim] or [batch, length, heads, head_dim]"
        )
    else:
        check_rank("x", x, (channel_dims + 1,), "[total_tokens, heads, head_dim], with cu_seqlens")
        if max_seqlen is None:
            raise ValueError("max_seqlen: got None with cu_seqlens, expected a bound on the tokens of one sequence")
        check_longest("max_seqlen", max_seqlen)
        each_time(check_packing, "cu_seqlens", cu_seqlens, x.shape[0], x.device, max_seqlen)
    return tuple(x.shape[: x.dim() - channel_dims])


def _check_tree(
    parents: Any,
    tokens: tuple[int, ...],
    cu_seqlens: Tensor | None,
    device: torch.device,
    write: Tensor | None,
    keep: bool,
) -> None:
    if not keep and (write is None or write.dim() == 1):
        raise ValueError(
            "parents: given with one state to write for each sequence, expected disable_state_update=True, or slots "
            "[batch, columns], one for the state after each token"
        )
    if cu_seqlens is None and len(tokens) == 1:
        raise ValueError("parents: given with one token a sequence, expected x with a length, or cu_seqlens")
    check_parents(parents, tokens, cu_seqlens, device)


def _check_slots_arguments(
    state: Tensor,
    batch: int,
    read: Tensor | None,
    write: Tensor | None,
    accepted: Tensor | None,
    pad_slot_id: int,
    keep: bool,
    device: torch.device,
) -> None:
    if read is None:
        if state.shape[0] != batch:
            raise ValueError(
                f"state: got {state.shape[0]} slots, expected {batch}, one a sequence, without state_batch_indices"
            )
        if write is not None or accepted is not None:
            given = "dst_state_batch_indices" if write is not None else "num_accepted_tokens"
            raise ValueError(f"{given}: given without state_batch_indices, expected both")
        return
    for name, slots in (("state_batch_indices", read), ("dst_state_batch_indices", write)):
        if slots is not None:
            check_rank(name, slots, (1, 2), "[batch] or [batch, columns]")
            check_tensor(name, slots, (batch, *slots.shape[1:]), "[batch] or [batch, columns]", device, INTEGER)
            if slots.dim() == 2 and slots.shape[1] == 0:
                raise ValueError(f"{name}: got no column, expected one for the state after each token")
            target = not keep and (write is None or slots is write)
            # Columns may hold slots that no token of this call writes.
            each_time(check_slots, name, slots, state.shape[0], pad_slot_id, written=target and slots.dim() == 1)
    if accepted is not None:
        check_tensor("num_accepted_tokens", accepted, (batch,), "[batch]", device, INTEGER)
        if read.dim() != 2:
            raise ValueError("state_batch_indices: got [batch], expected [batch, columns] with num_accepted_tokens")


__all__ = ["FLOATING", "OP", "selective_state_update"]
