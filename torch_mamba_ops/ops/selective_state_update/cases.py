"""Shapes of the state update: every option small, and the decode steps of real models."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from torch_mamba_ops.ops.case import Case


@dataclass(frozen=True)
class _Shape:
    """Arguments of a decode step; ``heads`` None is Mamba1, ``length`` None is one token a sequence."""

    batch: int = 3
    heads: int | None = 4
    head_dim: int = 6
    state: int = 5
    groups: int = 2
    length: int | None = None
    lengths: tuple[int, ...] | None = None  # a packed batch
    slots: int = 9
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    tied: bool = True
    expanded: bool = False  # tied arguments as Mamba2 layers pass them, with stride 0
    gate: bool = True
    skip: str | None = "head_dim"  # D: "head", "head_dim" or none
    bias: bool = True
    softplus: bool = True
    padded_page: bool = False
    read: Any = None  # state_batch_indices
    write: Any = None  # dst_state_batch_indices
    accepted: tuple[int, ...] | None = None
    buffer_rows: tuple[int, ...] | None = None  # (): a buffer without intermediate_state_indices
    parents: Any = None  # of a packed batch: also of the token that belongs to no sequence
    disable: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def __call__(self, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        """Draws the arguments."""

        def normal(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(shape, device=device, generator=generator).to(dtype)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, device=device, generator=generator)

        def index(values: Any) -> Tensor:
            return torch.tensor(values, device=device, dtype=torch.int32)

        channels = (self.head_dim,) if self.heads is None else (self.heads, self.head_dim)
        per_step = channels[:1] if self.tied and self.heads is not None else channels
        tokens: tuple[int, ...] = (self.batch,) if self.length is None else (self.batch, self.length)
        grouped = () if self.heads is None else (self.groups,)
        arguments: dict[str, Any] = {"dt_softplus": self.softplus, **self.extra}
        if self.lengths is not None:
            starts = [sum(self.lengths[:i]) for i in range(len(self.lengths) + 1)]
            tokens = (starts[-1] + 1,)  # and one token that belongs to no sequence
            arguments |= {"cu_seqlens": index(starts), "max_seqlen": max(self.lengths)}
        rate = -uniform(*per_step, *(() if len(per_step) < len(channels) else (self.state,))) - 1
        step, step_bias = normal(*tokens, *per_step), uniform(*per_step) - 4
        if self.expanded:
            step = step[..., None].expand(*tokens, *channels)
            rate = rate[:, None, None].expand(*channels, self.state)
            step_bias = step_bias[:, None].expand(channels)
        rows = self.batch if self.read is None and self.lengths is None else self.slots
        arguments |= {
            "state": self._pool(normal(rows, *channels, self.state, dtype=self.state_dtype)),
            "x": normal(*tokens, *channels),
            "dt": step,
            "A": rate,
            "B": normal(*tokens, *grouped, self.state),
            "C": normal(*tokens, *grouped, self.state),
            "dt_bias": step_bias if self.bias else None,
            "z": normal(*tokens, *channels) if self.gate else None,
        }
        if self.skip is not None:
            arguments["D"] = normal(*(channels[:1] if self.skip == "head" else channels))
        for name, values in (
            ("state_batch_indices", self.read),
            ("dst_state_batch_indices", self.write),
            ("num_accepted_tokens", self.accepted),
            ("intermediate_state_indices", self.buffer_rows or None),
            ("parents", self.parents),
        ):
            if values is not None:
                arguments[name] = index(values)
        if self.buffer_rows is not None:
            steps = max(self.lengths) if self.lengths is not None else self.length or 1
            arguments["intermediate_states_buffer"] = normal(
                self.slots, steps + 1, *channels, self.state, dtype=self.state_dtype
            )
        if self.disable:
            arguments["disable_state_update"] = True
        return arguments

    def _pool(self, state: Tensor) -> Tensor:
        if not self.padded_page:
            return state
        page = torch.zeros(state.shape[0], state[0].numel() + 40, device=state.device, dtype=state.dtype)
        return page.as_strided(state.shape, (page.stride(0), *state.stride()[1:]), 16).copy_(state)


def _small(name: str, shape: _Shape, *tags: str) -> Case:
    return Case(name, shape, frozenset({"small", *tags}))


_BASE = _Shape()
_MAMBA1 = _Shape(heads=None, head_dim=10)
_SLOTS = (7, 2, 5)
_PACKED = replace(_BASE, lengths=(2, 0, 3), read=_SLOTS)
_TREE = replace(_BASE, length=5, read=_SLOTS, parents=((-1, 0, 0, 1, 1), (-1, -1, 0, 2, 1), (-1, 0, 1, 2, 2)))
_HEADS_64 = _Shape(batch=64, head_dim=64, state=128, dtype=torch.bfloat16, state_dtype=torch.bfloat16, expanded=True)

CASES = (
    _small("mamba2", _BASE, "opcheck"),
    _small("mamba2_expanded", replace(_BASE, expanded=True)),
    _small("mamba2_untied", replace(_BASE, tied=False)),
    _small("mamba1", _MAMBA1, "opcheck"),
    _small("mamba1_slots", replace(_MAMBA1, read=_SLOTS, gate=False)),
    _small("mamba1_several_tokens", replace(_MAMBA1, length=3)),
    _small("bare", replace(_BASE, gate=False, skip=None, bias=False, softplus=False)),
    _small("skip_by_head_one_group", replace(_BASE, skip="head", groups=1)),
    _small("slots_with_padding", replace(_BASE, read=(7, -1, 5)), "opcheck"),
    _small("all_padding", replace(_BASE, read=(-1, -1, -1))),
    _small("other_pad_slot", replace(_BASE, read=(7, 0, 5), extra={"pad_slot_id": 0})),
    _small("pad_slot_without_slots", replace(_BASE, length=2, buffer_rows=(), extra={"pad_slot_id": 1})),
    _small("destination_slots", replace(_BASE, read=_SLOTS, write=(1, -1, 3)), "opcheck"),
    _small("padded_page", replace(_BASE, read=_SLOTS, padded_page=True), "opcheck"),
    _small("bfloat16", replace(_BASE, read=_SLOTS, dtype=torch.bfloat16, state_dtype=torch.bfloat16)),
    _small("float16_state", replace(_BASE, read=_SLOTS, dtype=torch.bfloat16, state_dtype=torch.float16)),
    _small("several_tokens", replace(_BASE, length=4, read=_SLOTS), "opcheck"),
    _small("several_tokens_no_slots", replace(_BASE, length=3)),
    _small("one_token_with_length", replace(_BASE, length=1, read=_SLOTS)),
    _small("slots_by_token", replace(_BASE, length=2, read=((7, 1), (2, -1), (-1, 3)), write=((0, 1), (4, 2), (3, 8)))),
    _small(
        "accepted_tokens",
        replace(_BASE, length=3, read=((7, 1, 0), (2, 3, -1), (4, 5, 6)), accepted=(1, 2, 0)),
        "opcheck",
    ),
    _small(
        "intermediate_states", replace(_BASE, length=3, read=_SLOTS, buffer_rows=(4, -1, 0), disable=True), "opcheck"
    ),
    _small("packed", _PACKED, "opcheck"),
    _small("packed_no_slots", replace(_PACKED, read=None, slots=3)),
    _small("packed_padding_untied", replace(_PACKED, read=(7, 2, -1), tied=False)),
    _small("packed_intermediate", replace(_PACKED, buffer_rows=(4, 3, 0))),
    _small(
        "packed_accepted",
        replace(
            _PACKED,
            read=((7, 1, 0), (2, 3, 4), (8, 5, 6)),
            accepted=(2, 1, 3),
            write=((7, 1, 0), (2, 3, 4), (8, -1, 6)),
        ),
    ),
    _small("mamba1_packed", replace(_MAMBA1, lengths=(1, 3, 2), read=_SLOTS)),
    _small("tree", replace(_TREE, buffer_rows=(4, -1, 0), disable=True), "opcheck"),
    _small(
        "tree_slots_by_token",
        replace(_TREE, write=((7, 1, -1, 3), (4, 6, 2, -1), (-1, 0, 8, 5)), state_dtype=torch.bfloat16),
        "opcheck",
    ),
    _small("tree_padding", replace(_TREE, read=(7, -1, 5), buffer_rows=(), disable=True, state_dtype=torch.bfloat16)),
    _small(
        "tree_packed",
        replace(_PACKED, lengths=(4, 0, 3), parents=(-1, 0, 0, 2, -1, -1, 0, 9), buffer_rows=(4, 3, 0), disable=True),
        "opcheck",
    ),
    _small(
        "mamba1_tree",
        replace(_MAMBA1, length=3, read=_SLOTS, parents=((-1, 0, 0), (-1, -1, 1), (-1, 0, -1)), disable=True),
    ),
    Case("nemotron_h_8b", replace(_HEADS_64, heads=128, groups=8), frozenset({"model"})),
    Case("bamba_9b", replace(_HEADS_64, heads=128, groups=1), frozenset({"model"})),
    Case("nemotron_nano_9b_v2", replace(_HEADS_64, heads=128, head_dim=80, groups=8), frozenset({"model"})),
    Case("falcon_h1_7b", replace(_HEADS_64, heads=24, head_dim=128, state=256, groups=1), frozenset({"model"})),
    Case("zamba2_7b", replace(_HEADS_64, heads=112, state=64, groups=2), frozenset({"model"})),
    Case("granite_4_h_tiny", replace(_HEADS_64, heads=48, groups=1), frozenset({"model"})),
    Case(
        "falcon_mamba_7b",
        _Shape(batch=64, heads=None, head_dim=8192, state=16, dtype=torch.bfloat16),
        frozenset({"model"}),
    ),
)
