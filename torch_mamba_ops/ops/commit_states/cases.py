"""Shapes of the commit: drafts in a row and in a tree, states from slots and from a buffer, both layouts, padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_mamba_ops.ops.case import Case


@dataclass(frozen=True)
class _Shape:
    """Arguments of a commit. ``state`` None: windows alone; ``dim`` 0: states alone."""

    src: Any = (1, 4, 6)  # a slot for each copy, or a row of slots
    dst: tuple[int, ...] = (1, 0, 6)
    accepted: tuple[int, ...] | None = None
    index: tuple[int, ...] | None = None
    parents: Any = None
    dim: int = 5
    columns: int = 6
    layout: str = "SD"
    state: tuple[int, ...] | None = (2, 3, 4)
    tokens: int | None = None  # a buffer with the states after so many
    rows: tuple[int, ...] | None = None
    padded_page: bool = False
    slots: int = 8
    dtype: torch.dtype = torch.float32
    conv_dtype: torch.dtype = torch.float32

    def __call__(self, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        """Draws the arguments."""

        def normal(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(shape, device=device, generator=generator).to(dtype)

        def index(values: Any) -> Tensor | None:
            return None if values is None else torch.tensor(values, device=device, dtype=torch.int32)

        arguments: dict[str, Any] = {"conv_states": None, "ssm_states": None}
        if self.dim:
            shape = (self.dim, self.columns) if self.layout == "DS" else (self.columns, self.dim)
            windows = self._paged(normal(self.slots, *shape, dtype=self.conv_dtype))
            arguments["conv_states"] = windows if self.layout == "DS" else windows.transpose(1, 2)
        if self.state is not None:
            arguments["ssm_states"] = self._paged(normal(self.slots, *self.state))
            if self.tokens is not None:
                rows = len(self.dst) if self.rows is None else max(self.rows) + 2
                arguments["intermediate_states"] = normal(rows, self.tokens, *self.state)
        given = {
            "src_indices": index(self.src),
            "dst_indices": index(self.dst),
            "num_accepted_tokens": index(self.accepted),
            "accepted_index": index(self.index),
            "parents": index(self.parents),
            "intermediate_indices": index(self.rows),
        }
        arguments |= {name: value for name, value in given.items() if value is not None}
        return arguments | ({"conv_width": 4} if self.parents is not None else {})

    def _paged(self, pool: Tensor) -> Tensor:
        if not self.padded_page:
            return pool
        page = torch.zeros(pool.shape[0], pool[0].numel() + 24, device=pool.device, dtype=pool.dtype)
        return page.as_strided(pool.shape, (page.stride(0), *pool.stride()[1:]), 8).copy_(pool)


def _small(name: str, *tags: str, **changes: Any) -> Case:
    return Case(name, _Shape(**changes), frozenset({"small", *tags}))


_TREE = ((-1, 0, 0, 1), (-1, 0, 1, 1), (-1, 0, 0, 2))

CASES = (
    _small("copied_as_it_is"),
    _small("accepted_in_place", "opcheck", src=(1, 4, 6), dst=(1, 4, 6), accepted=(3, 1, 2), tokens=3),
    _small("accepted_in_place_dim_first", src=(1, 4, 6), dst=(1, 4, 6), accepted=(3, 0, 2), tokens=3, layout="DS"),
    _small("accepted_index", "opcheck", index=(2, 0, 1), tokens=3, rows=(2, 0, 3), padded_page=True, layout="DS"),
    _small("slots_for_each_token", "opcheck", src=((1, 2, 3), (4, 5, 6)), dst=(0, 7), accepted=(3, 2)),
    _small("slots_for_each_token_swap", src=((1, 2, 3), (4, 5, 0)), dst=(4, 1), accepted=(1, 1)),
    _small("slots_for_each_token_clash", src=((1, 2, 3), (4, 5, 6)), dst=(5, 3), accepted=(3, 2), layout="DS"),
    _small("windows_alone", "opcheck", state=None, accepted=(3, 1, 6), layout="DS", conv_dtype=torch.bfloat16),
    _small("states_alone", "opcheck", dim=0, tokens=2, accepted=(1, 2, 2), dtype=torch.float16),
    _small("tree", "opcheck", index=(3, 2, 3), parents=_TREE, tokens=4),
    _small("tree_dim_first", index=(0, 3, 1), parents=_TREE, tokens=4, layout="DS"),
    _small(
        "padding", "opcheck", src=(1, -1, 6, 3), dst=(-1, 0, 5, 2), accepted=(2, 2, 2, 1), tokens=2, rows=(0, 1, -1, 2)
    ),
    _small("padding_of_a_token", src=((1, -1), (2, 3)), dst=(0, 7), accepted=(2, 2)),
    _small("all_padding", src=(-1, 2), dst=(3, -1), accepted=(2, 2), tokens=2),
    _small("no_copies", src=(), dst=(), accepted=()),
    _small("kept_and_carried", src=(1, 1, 4, 4), dst=(0, 1, 5, 7), accepted=(1, 3, 2, 3), tokens=3, rows=(0, 0, 1, 1)),
    _small("ring", src=(3, 0, 6, 5), dst=(0, 6, 3, 5), accepted=(3, 1, 2, 3), layout="DS"),
    _small("several_tiles", dim=900, columns=7, state=(9001,), accepted=(3, 1, 2), padded_page=True),
    _small("one_column", columns=1, accepted=(1, 1, 1)),
    Case(
        "nemotron_h_8b_64_sequences_4_drafts",
        _Shape(
            src=tuple(range(64)),
            dst=tuple(range(64)),
            accepted=tuple(i % 5 + 1 for i in range(64)),
            dim=10240,
            columns=7,
            state=(128, 64, 128),
            tokens=5,
            slots=64,
            dtype=torch.bfloat16,
            conv_dtype=torch.bfloat16,
        ),
        frozenset({"model"}),
    ),
)
