"""Shapes of the convolution's decode step: every option small, and real models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch_mamba_ops.ops.case import Case
from torch_mamba_ops.ops.causal_conv1d_varlen_fn.cases import pool_of_windows


@dataclass(frozen=True)
class _Step:
    batch: int = 3
    dim: int = 6
    length: int | None = None  # None: x is [batch, dim]
    lengths: tuple[int, ...] | None = None  # a packed batch
    width: int = 4
    columns: int = 3
    layout: str = "SD"
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    bias: bool = True
    activation: str | None = "silu"
    slots: tuple[int, ...] | None = (6, 1, 3)
    seen: tuple[int, ...] | None = None
    accepted: tuple[int, ...] | None = None
    parents: Any = None  # of a packed batch: also of the token that belongs to no sequence
    pool_size: int = 8

    def __call__(self, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, generator=generator).to(self.dtype)

        def index(values: Any) -> Tensor:
            return torch.tensor(values, device=device, dtype=torch.int32)

        arguments: dict[str, Any] = {"activation": self.activation}
        if self.lengths is not None:
            starts = [sum(self.lengths[:i]) for i in range(len(self.lengths) + 1)]
            arguments |= {"query_start_loc": index(starts), "max_query_len": max(self.lengths)}
            arguments["x"] = normal(starts[-1] + 1, self.dim)  # and one token that belongs to no sequence
        else:
            arguments["x"] = normal(self.batch, self.dim, *(() if self.length is None else (self.length,)))
        rows = self.batch if self.slots is None else self.pool_size
        arguments |= {
            "conv_state": pool_of_windows(
                rows, self.dim, self.columns, self.layout, self.state_dtype, device, generator
            ),
            "weight": normal(self.dim, self.width),
            "bias": normal(self.dim) if self.bias else None,
        }
        for name, values in (
            ("conv_state_indices", self.slots),
            ("cache_seqlens", self.seen),
            ("num_accepted_tokens", self.accepted),
            ("parents", self.parents),
        ):
            if values is not None:
                arguments[name] = index(values)
        return arguments


def _small(name: str, step: _Step, *tags: str) -> Case:
    return Case(name, step, frozenset({"small", *tags}))


def _model(name: str, dim: int) -> Case:
    step = _Step(64, dim, dtype=torch.bfloat16, state_dtype=torch.bfloat16, slots=tuple(range(64)), pool_size=64)
    return Case(name, step, frozenset({"model"}))


_BASE = _Step()
_VECTORS = replace(_BASE, dim=528, dtype=torch.bfloat16, state_dtype=torch.bfloat16)
_PACKED = replace(_BASE, lengths=(2, 0, 3))
_TREE = replace(
    _BASE,
    length=6,
    columns=10,
    accepted=(1, 3, 1),
    parents=((-1, 0, 0, 1, 3, 4), (-1, -1, 0, 2, 1, 3), (-1, 0, 1, 2, 2, 0)),
)

CASES = (
    _small("dim_innermost", _BASE, "opcheck"),
    _small("columns_innermost", replace(_BASE, layout="DS")),
    _small("padded_page", replace(_BASE, layout="page"), "opcheck"),
    _small("hugging_face", replace(_BASE, slots=None, layout="DS", length=1, columns=4), "opcheck"),
    _small("no_slots_dim_innermost", replace(_BASE, slots=None)),
    _small("several_tokens", replace(_BASE, length=2, columns=5), "opcheck"),
    _small("more_tokens_than_columns", replace(_BASE, length=5)),
    _small("several_tokens_no_slots", replace(_BASE, length=2, slots=None)),
    _small("padding", replace(_BASE, slots=(6, -1, 3)), "opcheck"),
    _small("all_padding", replace(_BASE, slots=(-1, -1, -1))),
    _small("width_2", replace(_BASE, width=2, columns=1, bias=False)),
    _small("width_3", replace(_BASE, width=3, columns=2, activation=None)),
    _small("width_5", replace(_BASE, width=5, columns=4)),
    _small("width_6", replace(_BASE, width=6, columns=7, length=3)),
    _small("ring", replace(_BASE, columns=5, seen=(0, 7, 13)), "opcheck"),
    _small("ring_several_tokens", replace(_BASE, columns=5, length=4, seen=(3, 4, 9))),
    _small("accepted_tokens", replace(_BASE, columns=5, length=3, accepted=(1, 3, 2)), "opcheck"),
    _small("accepted_tokens_more_columns", replace(_BASE, columns=8, length=3, accepted=(1, 3, 2), layout="DS")),
    _small("packed", _PACKED, "opcheck"),
    _small("packed_no_slots", replace(_PACKED, slots=None, columns=5)),
    _small("packed_accepted", replace(_PACKED, columns=5, accepted=(2, 1, 3)), "opcheck"),
    _small("packed_ring_padding", replace(_PACKED, columns=5, seen=(2, 1, 6), slots=(6, 1, -1))),
    _small("tree", replace(_TREE, columns=8), "opcheck"),
    _small("tree_columns_innermost", replace(_TREE, layout="DS", slots=(6, -1, 3)), "opcheck"),
    _small("tree_no_slots", replace(_TREE, slots=None)),
    _small("tree_width_2", replace(_TREE, width=2, bias=False)),
    _small("tree_width_6_bfloat16", replace(_TREE, width=6, dtype=torch.bfloat16, state_dtype=torch.bfloat16)),
    _small(
        "tree_packed",
        replace(_PACKED, lengths=(5, 0, 3), columns=7, accepted=(2, 1, 1), parents=(-1, 0, 0, 1, 3, -1, -1, 0, 9)),
        "opcheck",
    ),
    _small("bfloat16", replace(_BASE, dtype=torch.bfloat16, state_dtype=torch.bfloat16)),
    _small("float32_window", replace(_BASE, dtype=torch.bfloat16)),
    # Sizes that GPU kernels load in whole vectors.
    *(
        _small(f"vectors_{layout.lower()}_{columns}", replace(_VECTORS, layout=layout, columns=columns))
        for layout in ("SD", "DS")
        for columns in (3, 4)
    ),
    _small("vectors_no_slots_width_2", replace(_VECTORS, width=2, columns=1, slots=None, bias=False)),
    _model("nemotron_h_8b", 10240),
    _model("bamba_9b", 8448),
    _model("nemotron_nano_9b_v2", 12288),
    _model("falcon_h1_7b", 3584),
    _model("zamba2_7b", 7424),
)
