"""The selective state update in torch: float32 inside, all tokens of a sequence at once by a parallel scan."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from torch_mamba_ops.dispatch import register_backend
from torch_mamba_ops.ops.pool import safe_index, write_rows
from torch_mamba_ops.ops.rounding import stochastic_round
from torch_mamba_ops.ops.scan import linear_scan
from torch_mamba_ops.ops.tokens import RaggedTokens
from torch_mamba_ops.ops.tree import parents_of, tree_scan

Rounding = Callable[[Tensor, Tensor], Tensor]


@register_backend("selective_state_update", "reference", trace="inline")
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state_batch_indices: Tensor | None,
    dst_state_batch_indices: Tensor | None,
    cu_seqlens: Tensor | None,
    num_accepted_tokens: Tensor | None,
    intermediate_states_buffer: Tensor | None,
    intermediate_state_indices: Tensor | None,
    rand_seed: Tensor | None,
    parents: Tensor | None,
    *,
    dt_softplus: bool,
    pad_slot_id: int,
    max_seqlen: int | None,
    disable_state_update: bool,
    philox_rounds: int,
) -> Tensor:
    """See ``op.selective_state_update``."""
    if state.dim() == 3:  # Mamba1 is Mamba2 with one head whose channels differ in A and dt
        one_head = selective_state_update(
            state.unsqueeze(1),
            x.unsqueeze(-2),
            dt.unsqueeze(-2),
            A.unsqueeze(0),
            B.unsqueeze(-2),
            C.unsqueeze(-2),
            None if D is None else D.unsqueeze(-2),
            None if z is None else z.unsqueeze(-2),
            None if dt_bias is None else dt_bias.unsqueeze(-2),
            state_batch_indices,
            dst_state_batch_indices,
            cu_seqlens,
            num_accepted_tokens,
            None if intermediate_states_buffer is None else intermediate_states_buffer.unsqueeze(2),
            intermediate_state_indices,
            rand_seed,
            parents,
            dt_softplus=dt_softplus,
            pad_slot_id=pad_slot_id,
            max_seqlen=max_seqlen,
            disable_state_update=disable_state_update,
            philox_rounds=philox_rounds,
        )
        return one_head.squeeze(-2)

    tokens = RaggedTokens(x, 2, cu_seqlens, max_seqlen)
    if A.dim() == 1:  # tied: one step size a head
        A, dt = A[:, None, None], dt[..., None]
        dt_bias = None if dt_bias is None else dt_bias[:, None]
    step = tokens.rows(dt).float()
    if dt_bias is not None:
        step = step + dt_bias.float()
    if dt_softplus:
        step = softplus(step)
    if tokens.present is not None:
        step = torch.where(tokens.present[:, :, None, None], step, 0.0)  # a missing token leaves the state as it is
    inputs = tokens.rows(x).float()
    to_state, from_state = (_to_heads(tokens.rows(t).float(), x.shape[-2]).unsqueeze(-2) for t in (B, C))

    read, valid = _slots_to_read(state_batch_indices, num_accepted_tokens, pad_slot_id)
    initial = state if read is None or valid is None else state[safe_index(read, valid, state.shape[0])]
    log_decay = step[..., None] * A.float()
    update = (step * inputs)[..., None] * to_state
    tree = None if parents is None else parents_of(tokens, parents)
    states = _states(log_decay, update, initial.float(), tree)

    y = (states * from_state).sum(-1)
    if D is not None:
        y = y + (D[:, None] if D.dim() == 1 else D).float() * inputs
    if z is not None:
        y = y * silu(tokens.rows(z).float())
    if valid is not None:
        y = torch.where(valid[:, None, None, None], y, 0.0)
    out = tokens.unrows(y).to(x.dtype)

    if intermediate_states_buffer is not None:
        _keep_steps(intermediate_states_buffer, states, intermediate_state_indices, valid, pad_slot_id, tokens)
    if not disable_state_update:

        def rounded(values: Tensor, slots: Tensor) -> Tensor:
            if rand_seed is None:
                return values
            inner = torch.arange(values[0, ..., 0].numel(), device=values.device).view(values.shape[1:-1])
            rows = slots.view(-1, 1, 1) * inner.numel() + inner
            return stochastic_round(values, state.dtype, rand_seed, rows, philox_rounds)

        write = state_batch_indices if dst_state_batch_indices is None else dst_state_batch_indices
        _write(state, states, write, valid, pad_slot_id, tokens, rounded)
    return out


def _to_heads(grouped: Tensor, heads: int) -> Tensor:
    """[batch, length, groups, state] -> [batch, length, heads, state]"""
    groups = grouped.shape[2]
    return grouped.unsqueeze(3).expand(-1, -1, -1, heads // groups, -1).flatten(2, 3)


def _slots_to_read(
    slots: Tensor | None, accepted: Tensor | None, pad_slot_id: int
) -> tuple[Tensor | None, Tensor | None]:
    if slots is None:
        return None, None
    if accepted is not None:
        column = (accepted.long() - 1).clamp(min=0, max=slots.shape[1] - 1)
        slots = slots.gather(1, column[:, None])[:, 0]
    elif slots.dim() == 2:
        slots = slots[:, 0]
    return slots, slots != pad_slot_id


def _states(log_decay: Tensor, update: Tensor, initial: Tensor, parents: Tensor | None) -> Tensor:
    """The state after each token, [batch, length, heads, head_dim, state]."""
    if parents is not None:
        is_root = (parents < 0)[..., None, None, None]
        update = torch.where(is_root, update + torch.exp(log_decay) * initial.unsqueeze(1), update)
        return tree_scan(log_decay, update, parents)
    first = update[:, :1] + torch.exp(log_decay[:, :1]) * initial.unsqueeze(1)
    if update.shape[1] == 1:
        return first
    return linear_scan(log_decay, torch.cat([first, update[:, 1:]], 1))


def _keep_steps(
    buffer: Tensor, states: Tensor, rows: Tensor | None, valid: Tensor | None, pad_slot_id: int, tokens: RaggedTokens
) -> None:
    batch, length = states.shape[:2]
    every = torch.ones(batch, dtype=torch.bool, device=states.device)
    kept = every if rows is None else rows != pad_slot_id
    if rows is None:
        rows = torch.arange(batch, device=states.device)
    wanted = kept if valid is None else valid & kept
    wanted = tokens.steps_present(wanted[:, None].expand(batch, length))
    index = safe_index(rows, kept, buffer.shape[0])
    steps = torch.arange(length, device=states.device).expand(batch, length).flatten()
    index = index[:, None].expand(batch, length).flatten()
    write_rows(buffer, (index, steps), states.flatten(0, 1), wanted.flatten())


def _write(
    state: Tensor,
    states: Tensor,
    slots: Tensor | None,
    valid: Tensor | None,
    pad_slot_id: int,
    tokens: RaggedTokens,
    rounded: Rounding,
) -> None:
    batch, length = states.shape[:2]
    if slots is None or valid is None:
        values = rounded(tokens.last(states), torch.arange(batch, device=state.device))
        if tokens.not_empty is not None:
            values = torch.where(tokens.not_empty[:, None, None, None], values.to(state.dtype), state)
        state.copy_(values)
        return
    if slots.dim() == 2:  # a slot for the state after each token
        columns = min(length, slots.shape[1])
        slots, states = slots[:, :columns], states[:, :columns].flatten(0, 1)
        wanted = tokens.steps_present((slots != pad_slot_id) & valid[:, None]).flatten()
        slots = slots.flatten()
    else:
        states = tokens.last(states)
        wanted = (slots != pad_slot_id) & valid
        if tokens.not_empty is not None:
            wanted = wanted & tokens.not_empty
    index = safe_index(slots, wanted, state.shape[0])
    write_rows(state, (index,), rounded(states, index), wanted)
