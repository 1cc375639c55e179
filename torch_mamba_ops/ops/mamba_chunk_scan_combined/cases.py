"""Shapes of the dense scan: every option small, and the prefill of real models."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from torch_mamba_ops.ops.case import Case


@dataclass(frozen=True)
class Scan:
    """Arguments of a scan; the packed scan's cases use it too, with ``batch`` None."""

    batch: int | None = 2
    length: int = 21
    heads: int = 4
    head_dim: int = 6
    state: int = 5
    groups: int = 2
    chunk_size: int = 8
    dtype: torch.dtype = torch.float32
    skip: str | None = "head"  # D: "head", "head_dim" or none
    gate: bool = True
    bias: bool = True
    softplus: bool = True
    initial: bool = False
    sliced: bool = False  # x, B and C as slices of one projection, as models pass them
    seq_idx: tuple[tuple[int, ...], ...] | None = None
    cu_seqlens: tuple[int, ...] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __call__(self, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        """Draws the arguments."""

        def normal(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(shape, device=device, generator=generator).to(dtype)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, device=device, generator=generator)

        tokens = (self.length,) if self.batch is None else (self.batch, self.length)
        inner, shared = self.heads * self.head_dim, self.groups * self.state
        if self.sliced:
            x, B, C = normal(*tokens, inner + 2 * shared).split([inner, shared, shared], -1)
        else:
            x, B, C = normal(*tokens, inner), normal(*tokens, shared), normal(*tokens, shared)
        arguments: dict[str, Any] = {
            "x": x.unflatten(-1, (self.heads, self.head_dim)),
            "dt": normal(*tokens, self.heads),
            "A": -uniform(self.heads) - 1,
            "B": B.unflatten(-1, (self.groups, self.state)),
            "C": C.unflatten(-1, (self.groups, self.state)),
            "chunk_size": self.chunk_size,
            "dt_bias": uniform(self.heads) - 4 if self.bias else None,
            "z": normal(*tokens, self.heads, self.head_dim) if self.gate else None,
            "dt_softplus": self.softplus,
            **self.extra,
        }
        if self.skip is not None:
            arguments["D"] = normal(*((self.heads,) if self.skip == "head" else (self.heads, self.head_dim)))
        if self.initial:
            arguments["initial_states"] = normal(
                self.batch or 1, self.heads, self.head_dim, self.state, dtype=torch.float32
            )
        for name, values in (("seq_idx", self.seq_idx), ("cu_seqlens", self.cu_seqlens)):
            if values is not None:
                arguments[name] = torch.tensor(values, device=device, dtype=torch.int32)
        return arguments


_BASE = Scan()
_STATES = {"return_final_states": True}
_TWO_ROWS = (tuple([3] * 5 + [4] * 9 + [7] * 7), tuple([0] * 16 + [1] * 5))
_PACKED = replace(_BASE, batch=1, cu_seqlens=(0, 5, 5, 16, 21), extra={**_STATES, "return_varlen_states": True})


def _small(name: str, scan: Scan, *tags: str) -> Case:
    return Case(name, scan, frozenset({"small", *tags}))


def _model(name: str, **shape: Any) -> Case:
    base = Scan(batch=1, length=2048, head_dim=64, state=128, groups=1, chunk_size=256, gate=False, sliced=True)
    return Case(name, replace(base, dtype=torch.bfloat16, extra=_STATES, **shape), frozenset({"model"}))


CASES = (
    _small("plain", _BASE, "opcheck", "grad"),
    _small("bare", replace(_BASE, skip=None, gate=False, bias=False, softplus=False)),
    _small("whole_chunks", replace(_BASE, length=16, extra=_STATES), "opcheck"),
    _small("shorter_than_a_chunk", replace(_BASE, length=3, chunk_size=64, extra=_STATES)),
    _small("one_token", replace(_BASE, length=1, initial=True, extra=_STATES)),
    _small("initial_states", replace(_BASE, initial=True, extra=_STATES), "opcheck", "grad"),
    _small("skip_by_channel_one_group", replace(_BASE, skip="head_dim", groups=1, batch=1)),
    _small("dt_limit", replace(_BASE, softplus=False, extra={"dt_limit": (0.1, 0.5)}), "grad"),
    _small("dt_limit_from_below", replace(_BASE, extra={"dt_limit": (0.01, float("inf"))})),
    _small("seq_idx", replace(_BASE, seq_idx=_TWO_ROWS, extra=_STATES), "opcheck", "grad"),
    _small("seq_idx_initial_states", replace(_BASE, seq_idx=_TWO_ROWS, initial=True, extra=_STATES), "grad"),
    _small("packed", _PACKED, "opcheck", "grad"),
    _small("packed_initial_states", replace(_PACKED, initial=True)),
    _small("sliced_bfloat16", replace(_BASE, sliced=True, dtype=torch.bfloat16, extra=_STATES)),
    _small("bfloat16_states", replace(_BASE, extra={**_STATES, "state_dtype": torch.bfloat16}), "opcheck"),
    _small("every_head_a_group", replace(_BASE, groups=4, head_dim=5, state=7)),
    _small("longer", replace(_BASE, batch=1, length=150, chunk_size=16, initial=True, extra=_STATES)),
    _model("mamba2_2.7b", heads=80),
    _model("bamba_9b", heads=128),
    _model("nemotron_h_8b", heads=128, groups=8, chunk_size=128),
    _model("nemotron_nano_9b_v2", heads=128, head_dim=80, groups=8, chunk_size=128),
    _model("falcon_h1_7b", heads=24, head_dim=128, state=256),
    _model("zamba2_7b", heads=112, state=64, groups=2),
    _model("granite_4_h_tiny", heads=48),
)
