"""Shapes of the selective scan: every option small, and the prefill of real models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch_mamba_ops.ops.case import Case


@dataclass(frozen=True)
class _Scan:
    batch: int = 2
    dim: int = 6
    length: int = 21
    state: int = 5
    dtype: torch.dtype = torch.float32
    projection: str = "token"  # B and C: "token", "group" or "fixed"
    skip: bool = True
    gate: bool = True
    bias: bool = True
    softplus: bool = True
    transposed: bool = False  # u, delta and z as models pass them, [batch, length, dim] in memory
    last_state: bool = True

    def __call__(self, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, generator=generator).to(self.dtype)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, device=device, generator=generator)

        def channels() -> Tensor:
            if self.transposed:
                return normal(self.batch, self.length, self.dim).transpose(1, 2)
            return normal(self.batch, self.dim, self.length)

        shape = {
            "token": (self.batch, self.state, self.length),
            "group": (self.batch, 2, self.state, self.length),
            "fixed": (self.dim, self.state),
        }[self.projection]
        return {
            "u": channels(),
            "delta": channels(),
            "A": -uniform(self.dim, self.state) - 1,
            "B": normal(*shape),
            "C": normal(*shape),
            "D": normal(self.dim) if self.skip else None,
            "z": channels() if self.gate else None,
            "delta_bias": uniform(self.dim) - 4 if self.bias else None,
            "delta_softplus": self.softplus,
            "return_last_state": self.last_state,
        }


def _small(name: str, scan: _Scan, *tags: str) -> Case:
    return Case(name, scan, frozenset({"small", *tags}))


_BASE = _Scan()

CASES = (
    _small("plain", _BASE, "grad"),
    _small("bare", replace(_BASE, skip=False, gate=False, bias=False, softplus=False, last_state=False)),
    _small("groups", replace(_BASE, projection="group"), "opcheck", "grad"),
    _small("fixed_projections", replace(_BASE, projection="fixed")),
    _small("one_token", replace(_BASE, length=1)),
    _small("longer", replace(_BASE, batch=1, length=300), "opcheck", "grad"),
    _small("long", replace(_BASE, batch=1, dim=2, state=3, length=4500)),
    _small("transposed_bfloat16", replace(_BASE, transposed=True, dtype=torch.bfloat16)),
    Case("falcon_mamba_7b", _Scan(1, 8192, 4096, 16, torch.bfloat16, transposed=True), frozenset({"model"})),
)
