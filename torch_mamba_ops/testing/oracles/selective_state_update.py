"""The selective state update, one sequence and one token after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus


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
) -> Tensor:
    """See the public function. Every argument may be tied (``[heads]``) or not."""
    channels = state.shape[1:-1]
    several = cu_seqlens is None and x.dim() == len(channels) + 2
    before = state.clone()
    out = torch.zeros_like(x)

    def channelwise(value: Tensor) -> Tensor:
        """[heads] -> [heads, 1], which broadcasts against [heads, head_dim]."""
        return value[:, None] if value.dim() < len(channels) else value

    def token(index: tuple[int, ...], h: Tensor) -> tuple[Tensor, Tensor]:
        step = channelwise(dt[index])
        if dt_bias is not None:
            step = step + channelwise(dt_bias)
        if dt_softplus:
            step = softplus(step)
        rate = A[:, None, None] if A.dim() == 1 else A
        b, c = B[index], C[index]
        if len(channels) == 2:
            b, c = (t.repeat_interleave(channels[0] // t.shape[0], 0).unsqueeze(1) for t in (b, c))
        h = torch.exp(step[..., None] * rate) * h + (step * x[index])[..., None] * b
        y = (h * c).sum(-1)
        if D is not None:
            y = y + channelwise(D) * x[index]
        return h, y * silu(z[index]) if z is not None else y

    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    for n in range(batch):
        if cu_seqlens is not None:
            tokens: list[tuple[int, ...]] = [(t,) for t in range(int(cu_seqlens[n]), int(cu_seqlens[n + 1]))]
        else:
            tokens = [(n, t) for t in range(x.shape[1])] if several else [(n,)]
        read = _slot(state_batch_indices, n, 0)
        if num_accepted_tokens is not None:
            read = _slot(state_batch_indices, n, max(int(num_accepted_tokens[n]) - 1, 0))
        if (state_batch_indices is not None and read == pad_slot_id) or not tokens:
            continue
        row = n if intermediate_state_indices is None else int(intermediate_state_indices[n])
        keep_steps = intermediate_state_indices is None or row != pad_slot_id
        write = state_batch_indices if dst_state_batch_indices is None else dst_state_batch_indices
        by_token = write is not None and write.dim() == 2
        h = before[read]
        states: list[Tensor] = []
        for i, index in enumerate(tokens):
            if parents is not None:
                parent = int(parents[index])
                h = before[read] if parent < 0 else states[parent]
            h, out[index] = token(index, h)
            states.append(h)
            if intermediate_states_buffer is not None and keep_steps:
                intermediate_states_buffer[row, i] = h
            last_column = write.shape[1] if write is not None and by_token else len(tokens)
            if disable_state_update or (not by_token and i + 1 < len(tokens)) or i >= last_column:
                continue
            slot = _slot(write, n, i)
            if write is None or slot != pad_slot_id:
                state[slot] = h
    return out


def _slot(slots: Tensor | None, sequence: int, column: int) -> int:
    if slots is None:
        return sequence
    return int(slots[sequence, column] if slots.dim() == 2 else slots[sequence])
