"""The commit of states, one copy after the other."""

from __future__ import annotations

from torch import Tensor


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
) -> None:
    """See the public function."""
    windows = None if conv_states is None else conv_states.clone()
    states = None if ssm_states is None else ssm_states.clone()
    for copy, target in enumerate(dst_indices.tolist()):
        token = 0
        if num_accepted_tokens is not None:
            token = max(int(num_accepted_tokens[copy]) - 1, 0)
        elif accepted_index is not None:
            token = int(accepted_index[copy])
        slots = src_indices[copy].reshape(-1).tolist()
        if target == pad_slot_id:
            continue
        if conv_states is not None and windows is not None and slots[0] != pad_slot_id:
            window = windows[slots[0]]
            if parents is None:
                kept = window[:, token:]
            else:
                path = []  # the accepted token and those it follows
                while token >= 0:
                    path.append(token)
                    token = int(parents[copy, token])
                inputs = [window[:, c] for c in range(conv_width - 2)]
                inputs += [window[:, conv_width - 2 + node] for node in reversed(path)]
                kept = window.new_empty(len(inputs), window.shape[0])
                for place, column in enumerate(inputs):
                    kept[place] = column
                kept = kept[len(inputs) - (conv_width - 1) :].t()
                token = path[0]
            conv_states[target, :, : kept.shape[1]] = kept
        if ssm_states is not None and states is not None:
            if intermediate_states is None:
                slot = slots[min(token, len(slots) - 1)]
                if slot != pad_slot_id:
                    ssm_states[target] = states[slot]
            else:
                row = copy if intermediate_indices is None else int(intermediate_indices[copy])
                if pad_slot_id not in (row, slots[0]):
                    ssm_states[target] = intermediate_states[row, token]
