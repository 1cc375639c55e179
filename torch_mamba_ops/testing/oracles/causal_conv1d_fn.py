"""The causal convolution, one token after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def convolved(window: Tensor, weight: Tensor, bias: Tensor | None, activation: str | bool | None) -> Tensor:
    """One output [..., dim] of the last ``width`` inputs [..., dim, width]."""
    y = (window * weight).sum(-1)
    if bias is not None:
        y = y + bias
    return silu(y) if activation in ("silu", "swish", True) else y


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See the public function."""
    batch, dim, length = x.shape
    width = weight.shape[1]
    rows, finals = [], []
    for r in range(batch):
        zeros = x.new_zeros(dim, width - 1)
        window = zeros if initial_states is None else initial_states[r]
        seen, outputs = window, []
        for t in range(length):
            if seq_idx is not None and t > 0 and seq_idx[r, t] != seq_idx[r, t - 1]:
                window = zeros
            window = torch.cat([window, x[r, :, t : t + 1]], 1)
            outputs.append(convolved(window, weight, bias, activation))
            window = window[:, 1:]
            seen = torch.cat([seen, x[r, :, t : t + 1]], 1)[:, 1:]
        rows.append(torch.stack(outputs, -1))
        finals.append(seen)
    out, final_states = torch.stack(rows), torch.stack(finals)
    if not return_final_states:
        return out
    return out, final_states if final_states_out is None else final_states_out.copy_(final_states)
