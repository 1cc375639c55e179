"""The state space recurrence over dense batches, one token after the other."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

FACTORS = ("x", "B", "C")


def recurrence(
    h: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """One sequence: x [length, heads, head_dim], h [heads, head_dim, state]; returns outputs and the last state."""
    heads = x.shape[1]
    step = dt if dt_bias is None else dt + dt_bias
    step = (softplus(step) if dt_softplus else step).clamp(*dt_limit)
    outputs = []
    for t in range(x.shape[0]):
        b, c = (p[t].repeat_interleave(heads // p.shape[1], 0).unsqueeze(1) for p in (B, C))
        h = torch.exp(step[t] * A)[:, None, None] * h + (step[t][:, None] * x[t])[..., None] * b
        y = (h * c).sum(-1)
        if D is not None:
            y = y + (D[:, None] if D.dim() == 1 else D) * x[t]
        outputs.append(y if z is None else y * silu(z[t]))
    return torch.stack(outputs) if outputs else x.clone(), h


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
) -> Tensor | tuple[Tensor, ...]:
    """See the public function."""
    zero = x.new_zeros(*x.shape[2:], B.shape[-1])
    rows, finals, varlen = [], [], []
    for r in range(x.shape[0]):
        bounds = [0, x.shape[1]]
        if cu_seqlens is not None:
            bounds = cu_seqlens.tolist()
        elif seq_idx is not None:
            changes = [t for t in range(1, x.shape[1]) if seq_idx[r, t] != seq_idx[r, t - 1]]
            bounds = [0, *changes, x.shape[1]]
        h, pieces = zero, []
        for i, (begin, end) in enumerate(pairwise(bounds)):
            start = initial_states[r] if initial_states is not None and i == 0 else zero
            gate = None if z is None else z[r, begin:end]
            tokens = x[r, begin:end], dt[r, begin:end], A, B[r, begin:end], C[r, begin:end]
            y, last = recurrence(start, *tokens, D, gate, dt_bias, dt_softplus, dt_limit)
            pieces.append(y)
            varlen.append(last)
            h = last if end > begin else h
        rows.append(torch.cat(pieces))
        finals.append(h)
    results: tuple[Tensor, ...] = (torch.stack(rows),)
    results += (torch.stack(finals),) if return_final_states else ()
    results += (torch.stack(varlen),) if return_varlen_states else ()
    return results if len(results) > 1 else results[0]
