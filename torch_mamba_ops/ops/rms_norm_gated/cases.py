"""Shapes of the gated norm: every option small, and the channels of real models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torch_mamba_ops.ops.case import Case


def _build(
    tokens: tuple[int, ...],
    channels: int,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    gate: bool = True,
    **options: Any,
) -> Callable[[torch.device, torch.Generator], dict[str, Any]]:
    def build(device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device, generator=generator).to(dtype)

        arguments: dict[str, Any] = {"x": normal(*tokens, channels), "weight": normal(channels), **options}
        arguments["bias"] = normal(channels) if bias else None
        arguments["z"] = normal(*tokens, channels) if gate else None
        return arguments

    return build


CASES = (
    Case("norm_before_gate", _build((2, 5), 48), frozenset({"small", "opcheck", "grad"})),
    Case("gate_before_norm", _build((2, 5), 48, norm_before_gate=False, eps=1e-5), frozenset({"small", "grad"})),
    Case("groups", _build((7,), 48, group_size=16, norm_before_gate=False), frozenset({"small", "opcheck", "grad"})),
    Case("bias_no_gate", _build((7,), 40, bias=True, gate=False), frozenset({"small"})),
    Case("bfloat16", _build((7,), 64, torch.bfloat16, bias=True), frozenset({"small"})),
    Case(
        "nemotron_h_8b",
        _build((64,), 8192, torch.bfloat16, group_size=1024, norm_before_gate=False),
        frozenset({"model"}),
    ),
    Case("bamba_9b", _build((64,), 8192, torch.bfloat16, norm_before_gate=False), frozenset({"model"})),
)
