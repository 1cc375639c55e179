"""The contract of the commit of states."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torch_mamba_ops.dispatch import Op
from torch_mamba_ops.ops.checks import INTEGER, check_int, check_rank, check_tensor, has_values
from torch_mamba_ops.ops.pool import check_slots


def _fake(*tensors: Tensor | None, **options: object) -> None:
    return None


OP = Op(
    "commit_states(Tensor(a!)? conv_states, Tensor(b!)? ssm_states, Tensor src_indices, Tensor dst_indices, "
    "Tensor? num_accepted_tokens, Tensor? accepted_index, Tensor? parents, Tensor? intermediate_states, "
    "Tensor? intermediate_indices, *, int conv_width, int pad_slot_id, str backend) -> ()",
    fake=_fake,
    auto=("triton", "reference"),
)


def commit_states(
    conv_states: Tensor | None,
    ssm_states: Tensor | None,
    src_indices: Tensor,
    dst_indices: Tensor,
    num_accepted_tokens: Tensor | None = None,
    *,
    accepted_index: Tensor | None = None,
    parents: Tensor | None = None,
    intermediate_states: Tensor | None = None,
    intermediate_indices: Tensor | None = None,
    conv_width: int = 2,
    pad_slot_id: int = -1,
    backend: str | None = None,
) -> None:
    """Puts the states after each sequence's last accepted token into a slot: accepts drafts, and drops the others.

    ``t`` is that token's number in the step, 0 for the first. After `causal_conv1d_update` with ``num_accepted_tokens``
    the step's tokens stand in columns ``width - 2`` and up of a window, so that those the next step needs are columns
    ``t`` to ``t + width - 2``: they move to the front, where a step with one accepted token reads them. The SSM state
    after token ``t`` comes from a buffer of states after each token, or from the slot that was given to that token.
    All sources are read before anything is written, so that a slot may be its own destination, and slots may swap.

    Args:
        conv_states: ``[slots, dim, columns]``, any strides; windows (of all layers, side by side, if ``dim`` is all of
            their channels). Mutated: column ``c`` receives column ``c + t`` of the source; those for which there is
            none stay as they are. None: there are none.
        ssm_states: ``[slots, ...]``, contiguous but for the stride over slots. Mutated. None: there are none.
        src_indices: int ``[copies]``, or ``[copies, tokens]`` with a slot for the state after each token, as
            `selective_state_update` takes them; windows then come from column 0.
        dst_indices: int ``[copies]``, no slot twice.
        num_accepted_tokens: int ``[copies]``, ``t + 1`` (0 counts as 1). None, without accepted_index: ``t`` is 0.
        accepted_index: int ``[copies]``, ``t`` itself, for drafts that are a tree.
        parents: int ``[copies, tokens]``, the token before each token of a tree, -1 for a root. The first ``conv_width
            - 1`` columns receive the window found upwards from token ``t``. None: each token follows the one before.
        intermediate_states: ``[rows, tokens, ...]``, states after each token, of ssm_states' dtype; contiguous but for
            the strides over rows and tokens.
        intermediate_indices: int ``[copies]``, the row of each copy in that buffer; None: row i.
        conv_width: taps of the filter; used with parents.
        pad_slot_id: a copy whose source or destination is this slot is left out; with it as the row in the buffer, the
            SSM state is.
        backend: the backend's name; None: as chosen by context, process, environment or automatically.

    Raises:
        ValueError: a shape, device or slot is wrong, or options exclude each other.
        TypeError: a dtype is wrong.
        BackendError: the backend asked for is unknown or cannot run this call.
    """
    check_rank("dst_indices", dst_indices, (1,), "[copies]")
    copies, device = dst_indices.shape[0], dst_indices.device
    check_tensor("dst_indices", dst_indices, (copies,), "[copies]", device, INTEGER)
    check_rank("src_indices", src_indices, (1, 2), "[copies] or [copies, tokens]")
    shape = (copies, *src_indices.shape[1:])
    check_tensor("src_indices", src_indices, shape, "[copies] or [copies, tokens]", device, INTEGER)
    if conv_states is None and ssm_states is None:
        raise ValueError("conv_states: got None and ssm_states None, expected one of them")
    for name, pool, ranks, meaning in (
        ("conv_states", conv_states, (3,), "[slots, dim, columns]"),
        ("ssm_states", ssm_states, range(1, 9), "[slots, ...]"),
    ):
        if pool is not None:
            check_rank(name, pool, ranks, meaning)
            check_tensor(name, pool, pool.shape, meaning, device, (pool.dtype,))
            check_slots("src_indices", src_indices, pool.shape[0], pad_slot_id)
            check_slots("dst_indices", dst_indices, pool.shape[0], pad_slot_id, written=True)
    tokens = None if src_indices.dim() == 1 else src_indices.shape[1]
    if intermediate_states is not None:
        tokens = _check_buffer(ssm_states, intermediate_states, intermediate_indices, copies, pad_slot_id)
    elif intermediate_indices is not None:
        raise ValueError("intermediate_indices: given without intermediate_states, expected both")
    accepted = num_accepted_tokens if accepted_index is None else accepted_index
    if parents is not None:
        if accepted_index is None:
            raise ValueError("parents: given without accepted_index, expected both")
        check_rank("parents", parents, (2,), "[copies, tokens]")
        tokens = parents.shape[1] if tokens is None else tokens
        check_tensor("parents", parents, (copies, tokens), "[copies, tokens]", device, INTEGER)
        check_int("conv_width", conv_width)
        columns = None if conv_states is None else conv_states.shape[2]
        if columns is not None and not 2 <= conv_width <= columns + 2 - tokens:
            expected = f"2 to {columns + 2 - tokens}, for {columns} columns and {tokens} tokens"
            raise ValueError(f"conv_width: got {conv_width}, expected {expected}")
    if accepted is not None:
        name = "num_accepted_tokens" if accepted_index is None else "accepted_index"
        if accepted_index is not None and num_accepted_tokens is not None:
            raise ValueError("accepted_index: given with num_accepted_tokens, expected one of them")
        check_tensor(name, accepted, (copies,), "[copies]", device, INTEGER)
        most = tokens if tokens is not None else None if conv_states is None else conv_states.shape[2]
        _check_accepted(name, accepted, most, counted=accepted_index is None)
    OP(
        backend,
        (
            conv_states, ssm_states, src_indices, dst_indices, num_accepted_tokens, accepted_index, parents,
            intermediate_states, intermediate_indices,
        ),
        {"conv_width": conv_width, "pad_slot_id": pad_slot_id},
    )  # fmt: skip


def _check_buffer(ssm_states: Tensor | None, buffer: Any, rows: Tensor | None, copies: int, pad_slot_id: int) -> int:
    """Checks the buffer of states; returns the tokens that it has states for."""
    if ssm_states is None:
        raise ValueError("intermediate_states: given without ssm_states, expected both")
    rank = ssm_states.dim() + 1
    check_rank("intermediate_states", buffer, (rank,), "[rows, tokens, ...], like ssm_states")
    shape = (*buffer.shape[:2], *ssm_states.shape[1:])
    check_tensor("intermediate_states", buffer, shape, "[rows, tokens, ...]", ssm_states.device, (ssm_states.dtype,))
    if buffer.shape[1] == 0:
        raise ValueError("intermediate_states: got no token, expected the states after at least one")
    if rows is not None:
        check_tensor("intermediate_indices", rows, (copies,), "[copies]", ssm_states.device, INTEGER)
        check_slots("intermediate_indices", rows, buffer.shape[0], pad_slot_id)
    elif buffer.shape[0] < copies:
        raise ValueError(f"intermediate_states: got {buffer.shape[0]} rows, expected {copies}, one a copy")
    return int(buffer.shape[1])


def _check_accepted(name: str, accepted: Tensor, tokens: int | None, *, counted: bool) -> None:
    if tokens is None or not has_values(accepted):
        return
    most = tokens - (not counted)
    for given in accepted.tolist():
        if not 0 <= given <= most:
            raise ValueError(f"{name}: got {given}, expected 0 to {most}, for {tokens} tokens")
