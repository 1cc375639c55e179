"""Shapes of the selective scan: every option small, and the prefill of real models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch_mamba_ops.ops.case import Case

_TENSORS = ("u", "delta", "z", "B", "C")


@dataclass(frozen=True)
class _Scan:
    batch: int = 2
    dim: int = 6
    length: int = 21
    state: int = 5
    dtype: torch.dtype = torch.float32
    B: int | str = "token"  # "token", "fixed", or a number of groups
    C: int | str = "token"
    skip: bool = True
    gate: bool = True
    bias: bool = True
    softplus: bool = True
    by_token: tuple[str, ...] = ()  # those that a projection wrote: [batch, length, ...] in memory
    last_state: bool = True

    def __call__(self, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, generator=generator).to(self.dtype)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, device=device, generator=generator)

        def tokens(name: str, *shape: int) -> Tensor:
            if name in self.by_token:
                return normal(self.batch, self.length, *shape).movedim(1, -1)
            return normal(self.batch, *shape, self.length)

        def projection(name: str, kind: int | str) -> Tensor:
            if kind == "fixed":
                return normal(self.dim, self.state)
            return tokens(name, self.state) if isinstance(kind, str) else tokens(name, kind, self.state)

        return {
            "u": tokens("u", self.dim),
            "delta": tokens("delta", self.dim),
            "A": -uniform(self.dim, self.state) - 1,
            "B": projection("B", self.B),
            "C": projection("C", self.C),
            "D": normal(self.dim) if self.skip else None,
            "z": tokens("z", self.dim) if self.gate else None,
            "delta_bias": uniform(self.dim) - 4 if self.bias else None,
            "delta_softplus": self.softplus,
            "return_last_state": self.last_state,
        }


def _small(name: str, scan: _Scan, *tags: str) -> Case:
    return Case(name, scan, frozenset({"small", *tags}))


_BASE = _Scan()
_MODEL = _Scan(batch=1, length=4096, state=16, dtype=torch.bfloat16)

CASES = (
    _small("plain", _BASE, "grad"),
    _small("bare", replace(_BASE, skip=False, gate=False, bias=False, softplus=False, last_state=False)),
    _small("groups", replace(_BASE, B=2, C=2), "opcheck", "grad"),
    _small("groups_that_do_not_nest", replace(_BASE, B=2, C=3)),
    _small("fixed_projections", replace(_BASE, B="fixed", C="fixed")),
    _small("one_fixed_projection", replace(_BASE, B="fixed", C=2)),
    _small("another_fixed_projection", replace(_BASE, C="fixed", gate=False)),
    _small("one_token", replace(_BASE, length=1)),
    _small("one_channel_one_state", replace(_BASE, dim=1, state=1)),
    _small("blocks_of_channels", replace(_BASE, dim=40, state=16)),
    _small("large_state", replace(_BASE, batch=1, dim=3, state=200)),
    _small("longer", replace(_BASE, batch=1, length=300), "opcheck", "grad"),
    _small("long", replace(_BASE, batch=1, dim=2, state=3, length=4500)),
    _small("by_token_bfloat16", replace(_BASE, by_token=_TENSORS, dtype=torch.bfloat16), "opcheck"),
    _small("mixed_memory_float16", replace(_BASE, by_token=("z", "B"), dtype=torch.float16)),
    Case("falcon_mamba_7b", replace(_MODEL, dim=8192, by_token=_TENSORS), frozenset({"model"})),
    Case("mamba_2_8b", replace(_MODEL, dim=5120, by_token=("z", "B", "C")), frozenset({"model"})),
    Case("mamba_130m", replace(_MODEL, dim=1536), frozenset({"model"})),
)
