"""The state space recurrence over packed sequences and a pool, one sequence and one token after the other."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from torch_mamba_ops.testing.oracles.mamba_chunk_scan_combined import recurrence

FACTORS = ("x", "B", "C")


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
) -> Tensor:
    """See the public function."""
    out = torch.zeros_like(x)
    bounds = cu_seqlens.tolist()
    for n, (begin, end) in enumerate(pairwise(bounds)):
        slot = n if state_indices is None else int(state_indices[n])
        if begin == end or (state_indices is not None and slot == pad_slot_id):
            continue
        h = x.new_zeros(*x.shape[1:], B.shape[-1])
        if states is not None and has_initial_state is not None and has_initial_state[n]:
            h = states[slot]
        gate = None if z is None else z[begin:end]
        tokens = x[begin:end], dt[begin:end], A, B[begin:end], C[begin:end]
        out[begin:end], h = recurrence(h, *tokens, D, gate, dt_bias, dt_softplus, dt_limit)
        if states is not None:
            states[slot] = h
    return out
