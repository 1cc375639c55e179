"""The packed causal convolution, one sequence and one token after the other."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from torch_mamba_ops.testing.oracles.causal_conv1d_fn import convolved


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
) -> Tensor:
    """See the public function."""
    width = weight.shape[1]
    out = torch.zeros_like(x)
    bounds = query_start_loc.tolist()
    for n, (begin, end) in enumerate(pairwise(bounds)):
        slot = n if cache_indices is None else int(cache_indices[n])
        if begin == end or (cache_indices is not None and slot == pad_slot_id):
            continue
        known = has_initial_state is not None and bool(has_initial_state[n])
        window = conv_states[slot].clone() if known else torch.zeros_like(conv_states[slot])
        for t in range(begin, end):
            window = torch.cat([window, x[:, t : t + 1]], 1)
            out[:, t] = convolved(window[:, -width:], weight, bias, activation)
            window = window[:, 1:]
        conv_states[slot] = window
    return out
