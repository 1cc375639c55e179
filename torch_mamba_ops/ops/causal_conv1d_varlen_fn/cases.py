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

    def __call__(self, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, generator=generator).to(self.dtype)

        starts = [sum(self.lengths[:i]) for i in range(len(self.lengths) + 1)]
        rows = len(self.lengths) if self.slots is None else self.pool_size
        arguments: dict[str, Any] = {
            "x": normal(starts[-1] + 1, self.dim).t(),  # and one token that belongs to no sequence
            "weight": normal(self.dim, self.width),
            "bias": normal(self.dim) if self.bias else None,
            "conv_states": pool_of_windows(
                rows, self.dim, self.columns, self.layout, self.state_dtype, device, generator
            ),
            "query_start_loc": torch.tensor(starts, device=device, dtype=torch.int32),
            "activation": self.activation,
        }
        for name, values, dtype in (
            ("cache_indices", self.slots, torch.int32),
            ("has_initial_state", self.initial, torch.bool),
        ):
            if values is not None:
                arguments[name] = torch.tensor(values, device=device, dtype=dtype)
        return arguments


def _small(name: str, packed: _Packed, *tags: str) -> Case:
    return Case(name, packed, frozenset({"small", *tags}))


_BASE = _Packed()

CASES = (
    _small("dim_innermost", _BASE, "opcheck"),
    _small("columns_innermost", replace(_BASE, layout="DS"), "opcheck"),
    _small("padded_page", replace(_BASE, layout="page"), "opcheck"),
    _small("no_slots", replace(_BASE, slots=None)),
    _small("no_initial_states", replace(_BASE, initial=None, bias=False, activation=None)),
    _small("padding", replace(_BASE, slots=(6, 1, -1, 0))),
    _small("all_padding", replace(_BASE, slots=(-1, -1, -1, -1))),
    _small("all_empty", replace(_BASE, lengths=(0, 0, 0, 0))),
    _small("width_2", replace(_BASE, width=2, columns=1)),
    _small("one_column_more", replace(_BASE, columns=4)),
    _small("more_columns", replace(_BASE, width=3, columns=6)),
    _small("bfloat16", replace(_BASE, dtype=torch.bfloat16, state_dtype=torch.bfloat16)),
    _small("float32_window", replace(_BASE, dtype=torch.bfloat16)),
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
