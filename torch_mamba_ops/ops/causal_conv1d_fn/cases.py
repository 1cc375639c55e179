"""Shapes of the dense convolution: every option small, and the prefill of real models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch_mamba_ops.ops.case import Case


@dataclass(frozen=True)
class _Convolution:
    """Arguments of a dense call."""

    batch: int = 2
    dim: int = 6
    length: int = 11
    width: int = 4
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = None  # the same
    bias: bool = True
    activation: str | None = "silu"
    initial: bool = False
    final: bool = False
    channel_last: bool = False
    seq_idx: tuple[tuple[int, ...], ...] | None = None
    seq_idx_dtype: torch.dtype = torch.int32

    def __call__(self, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        """Draws the arguments."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, generator=generator).to(self.dtype)

        x = normal(self.batch, self.dim, self.length)
        if self.channel_last:  # a slice of a projection, as models pass it
            x = normal(self.batch, self.length, self.dim + 3)[..., : self.dim].transpose(1, 2)
        arguments: dict[str, Any] = {
            "x": x,
            "weight": normal(self.dim, self.width).to(self.weight_dtype or self.dtype),
            "bias": normal(self.dim) if self.bias else None,
            "activation": self.activation,
            "return_final_states": self.final,
        }
        if self.initial:
            arguments["initial_states"] = normal(self.batch, self.dim, self.width - 1)
        if self.seq_idx is not None:
            arguments["seq_idx"] = torch.tensor(self.seq_idx, device=device, dtype=self.seq_idx_dtype)
        return arguments


def _small(name: str, convolution: _Convolution, *tags: str) -> Case:
    return Case(name, convolution, frozenset({"small", *tags}))


def _model(name: str, dim: int, length: int = 2048, channel_last: bool = True) -> Case:
    convolution = _Convolution(1, dim, length, dtype=torch.bfloat16, channel_last=channel_last)
    return Case(name, convolution, frozenset({"model"}))


_BASE = _Convolution()
_TWO_ROWS = ((0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2), (4, 4, 4, 4, 4, 4, 4, 4, 4, 5, 5))

CASES = (
    _small("plain", _BASE, "opcheck", "grad"),
    _small("width_2", replace(_BASE, width=2, bias=False)),
    _small("width_3_no_activation", replace(_BASE, width=3, activation=None)),
    _small("states", replace(_BASE, initial=True, final=True), "opcheck", "grad"),
    _small("shorter_than_the_window", replace(_BASE, length=2, initial=True, final=True)),
    _small("final_states_only", replace(_BASE, length=1, final=True)),
    _small("channel_last_bfloat16", replace(_BASE, channel_last=True, dtype=torch.bfloat16, final=True), "opcheck"),
    _small("seq_idx", replace(_BASE, seq_idx=_TWO_ROWS), "opcheck", "grad"),
    _small("seq_idx_states", replace(_BASE, seq_idx=_TWO_ROWS, initial=True, final=True)),
    _small("channel_last_seq_idx", replace(_BASE, seq_idx=_TWO_ROWS, channel_last=True, seq_idx_dtype=torch.int64)),
    _small("channel_last_seq_idx_states", replace(_BASE, seq_idx=_TWO_ROWS, channel_last=True, initial=True)),
    _small("float16_float32_weight", replace(_BASE, dtype=torch.float16, weight_dtype=torch.float32)),
    _small("long_text", replace(_BASE, batch=1, dim=3, length=301, seq_idx=(tuple(t // 50 for t in range(301)),))),
    _small("long_text_bfloat16_width_3", replace(_BASE, dim=3, length=530, width=3, dtype=torch.bfloat16)),
    _small("channel_last_long_text", replace(_BASE, length=75, channel_last=True, initial=True, final=True)),
    _model("nemotron_h_8b", 10240),
    _model("bamba_9b", 8448),
    _model("nemotron_nano_9b_v2", 12288),
    _model("falcon_h1_7b", 3584),
    _model("zamba2_7b", 7424),
    _model("falcon_mamba_7b", 8192, channel_last=False),
    _model("nemotron_h_8b_64k", 10240, 65536),
)
