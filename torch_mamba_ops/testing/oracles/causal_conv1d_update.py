"""The decode step of the causal convolution, one sequence and one token after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_mamba_ops.testing.oracles.causal_conv1d_fn import convolved


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | bool | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
    *,
    num_accepted_tokens: Tensor | None = None,
    parents: Tensor | None = None,
    query_start_loc: Tensor | None = None,
    max_query_len: int | None = None,
    pad_slot_id: int = -1,
) -> Tensor:
    """See the public function."""
    width, columns = weight.shape[1], conv_state.shape[2]
    out = torch.zeros_like(x)
    batch = x.shape[0] if query_start_loc is None else query_start_loc.shape[0] - 1
    for n in range(batch):
        slot = n if conv_state_indices is None else int(conv_state_indices[n])
        if query_start_loc is not None:
            tokens = x[int(query_start_loc[n]) : int(query_start_loc[n + 1])]
            outputs = out[int(query_start_loc[n]) : int(query_start_loc[n + 1])]
            tree = None if parents is None else parents[int(query_start_loc[n]) : int(query_start_loc[n + 1])]
        else:
            tokens, outputs = (t[n].t() if x.dim() == 3 else t[n : n + 1] for t in (x, out))
            tree = None if parents is None else parents[n]
        if (conv_state_indices is not None and slot == pad_slot_id) or not len(tokens):
            continue
        old = conv_state[slot].clone()
        if num_accepted_tokens is not None:
            first = max(int(num_accepted_tokens[n]), 1) - 1
            window = old[:, first : first + width - 1]
        elif cache_seqlens is not None:
            window = torch.stack(
                [old[:, (int(cache_seqlens[n]) - back) % columns] for back in range(width - 1, 0, -1)], 1
            )
        else:
            window = old[:, columns - (width - 1) :]
        inputs = window
        for t in range(len(tokens)):
            inputs = torch.cat([inputs, tokens[t][:, None]], 1)
            path = inputs
            if tree is not None:
                nodes = [t]  # upwards
                while nodes[-1] >= 0:
                    nodes.append(int(tree[nodes[-1]]))
                path = torch.cat([window, *(tokens[node][:, None] for node in reversed(nodes[:-1]))], 1)
            outputs[t] = convolved(path[:, -width:], weight, bias, activation)
            if cache_seqlens is not None:
                conv_state[slot, :, (int(cache_seqlens[n]) + t) % columns] = tokens[t]
        if num_accepted_tokens is not None:
            conv_state[slot, :, : width - 2 + len(tokens)] = inputs[:, 1:]
        elif cache_seqlens is None:
            conv_state[slot] = torch.cat([old, inputs[:, width - 1 :]], 1)[:, -columns:]
    return out
