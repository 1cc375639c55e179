"""Shapes of the packed convolution: every option small, and the prefill of real models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch_mamba_ops.ops.case import Case


def pool_of_windows(
    slots: int,
    dim: int,
    columns: int,
    layout: str,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> Tensor:
    """[slots, dim, columns]: ``"DS"`` columns innermost, ``"SD"`` dim innermost, ``"page"`` SD in padded pages."""
    values = torch.randn((slots, columns, dim), device=device, generator=generator).to(dtype)
    if layout == "page":
        page = torch.zeros(slots, columns * dim + 20, device=device, dtype=dtype)
        values = page.as_strided(values.shape, (page.stride(0), dim, 1), 4).copy_(values)
    pool = values.transpose(1, 2)
    return pool.contiguous() if layout == "DS" else pool


@dataclass(frozen=True)
class _Packed:
    """Arguments of a packed call; after its texts comes one token more that belongs to none."""

    dim: int = 6
    lengths: tuple[int, ...] = (5, 0, 1, 7)
    width: int = 4
    columns: int = 3
    layout: str = "SD"
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    bias: bool = True
    activation: str | None = "silu"
    slots: tuple[int, ...] | None = (6, 1, 3, 0)
    initial: tuple[bool, ...] | None = (True, True, True, False)
    pool_size: int = 8
    before: int = 0  # tokens of no text that come before the first
    index_dtype: torch.dtype = torch.int32
    tokens_innermost: bool = False
    projection: int = 0  # channels of a wider row that x is a slice of
    pad_slot_id: int = -1

    def __call__(self, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        """Draws the arguments."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, generator=generator).to(self.dtype)

        starts = [self.before + sum(self.lengths[:i]) for i in range(len(self.lengths) + 1)]
        rows = len(self.lengths) if self.slots is None else self.pool_size
        x = normal(starts[-1] + 1, max(self.dim, self.projection)).t()[: self.dim]
        arguments: dict[str, Any] = {
            "x": x.contiguous() if self.tokens_innermost else x,
            "weight": normal(self.dim, self.width),
            "bias": normal(self.dim) if self.bias else None,
            "conv_states": pool_of_windows(
                rows, self.dim, self.columns, self.layout, self.state_dtype, device, generator
            ),
            "query_start_loc": torch.tensor(starts, device=device, dtype=self.index_dtype),
            "activation": self.activation,
            "pad_slot_id": self.pad_slot_id,
        }
        for name, values, dtype in (
            ("cache_indices", self.slots, self.index_dtype),
            ("has_initial_state", self.initial, torch.bool),
        ):
            if values is not None:
                arguments[name] = torch.tensor(values, device=device, dtype=dtype)
        return arguments


def _small(name: str, packed: _Packed, *tags: str) -> Case:
    return Case(name, packed, frozenset({"small", *tags}))


_BASE = _Packed()
_TOKENS = replace(_BASE, tokens_innermost=True)
_LONG = replace(_BASE, lengths=(37, 2, 0, 64, 21), slots=(6, 1, 3, 0, 2), initial=(True, True, True, False, True))

CASES = (
    _small("dim_innermost", _BASE, "opcheck"),
    _small("columns_innermost", replace(_BASE, layout="DS"), "opcheck"),
    _small("padded_page", replace(_BASE, layout="page"), "opcheck"),
    _small("no_slots", replace(_BASE, slots=None)),
    _small("no_initial_states", replace(_BASE, initial=None, bias=False, activation=None)),
    _small("padding", replace(_BASE, slots=(6, 1, -1, 0)), "opcheck"),
    _small("other_pad_slot", replace(_BASE, slots=(6, 1, 0, 5), pad_slot_id=0)),
    _small("all_padding", replace(_BASE, slots=(-1, -1, -1, -1))),
    _small("all_empty", replace(_BASE, lengths=(0, 0, 0, 0))),
    _small("width_2", replace(_BASE, width=2, columns=1)),
    _small("one_column_more", replace(_BASE, columns=4)),
    _small("more_columns", replace(_BASE, width=3, columns=6)),
    _small("bfloat16", replace(_BASE, dtype=torch.bfloat16, state_dtype=torch.bfloat16)),
    _small("float32_window", replace(_BASE, dtype=torch.bfloat16)),
    _small("float16", replace(_BASE, dtype=torch.float16, state_dtype=torch.bfloat16, layout="DS")),
    _small("int64_indices", replace(_BASE, index_dtype=torch.int64)),
    _small("tokens_before_the_first_text", replace(_BASE, before=3)),
    _small("long_texts", _LONG),
    _small("long_texts_of_a_projection", replace(_LONG, dim=24, projection=48, dtype=torch.bfloat16, columns=5)),
    _small("many_texts", replace(_BASE, lengths=(1, 2) * 70, slots=None, initial=(True, False, True, True) * 35)),
    _small("tokens_innermost", _TOKENS, "opcheck"),
    _small("tokens_innermost_padding", replace(_TOKENS, slots=(6, 1, 3, -1), layout="DS", before=9)),
    _small("tokens_innermost_no_initial_states", replace(_TOKENS, initial=None, bias=False, activation=None)),
    _small(
        "tokens_innermost_long_texts",
        replace(_TOKENS, dim=3, lengths=(301, 2, 0, 0), width=3, columns=4, dtype=torch.float16),
    ),
    Case(
        "nemotron_h_8b",
        _Packed(
            dim=10240,
            lengths=(16384,) * 4,
            dtype=torch.bfloat16,
            state_dtype=torch.bfloat16,
            slots=(0, 1, 2, 3),
            initial=(True,) * 4,
        ),
        frozenset({"model"}),
    ),
)
