"""Shapes of the packed scan: every option small, and the prefill of real models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from torch_mamba_ops.ops.case import Case
from torch_mamba_ops.ops.mamba_chunk_scan_combined.cases import Scan


@dataclass(frozen=True)
class _Packed:
    """A scan of sequences of these lengths, and one token that belongs to none."""

    scan: Scan
    lengths: tuple[int, ...] = (5, 0, 11, 8)
    slots: tuple[int, ...] | None = (6, 1, 3, 0)
    initial: tuple[bool, ...] | None = (True, True, False, True)
    computed: tuple[int, ...] | None = None
    pool: bool = True
    pool_dtype: torch.dtype = torch.float32
    pool_size: int = 8
    padded_page: bool = False

    def __call__(self, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        starts = [sum(self.lengths[:i]) for i in range(len(self.lengths) + 1)]
        arguments = replace(self.scan, batch=None, length=starts[-1] + 1, cu_seqlens=tuple(starts))(device, generator)
        if self.pool:
            rows = len(self.lengths) if self.slots is None else self.pool_size
            inner = (self.scan.heads, self.scan.head_dim, self.scan.state)
            states = torch.randn((rows, *inner), device=device, generator=generator).to(self.pool_dtype)
            if self.padded_page:
                page = torch.zeros(rows, states[0].numel() + 24, device=device, dtype=self.pool_dtype)
                states = page.as_strided(states.shape, (page.stride(0), *states.stride()[1:]), 8).copy_(states)
            arguments["states"] = states
        for name, values, dtype in (
            ("state_indices", self.slots, torch.int32),
            ("has_initial_state", self.initial, torch.bool),
            ("num_computed_tokens", self.computed, torch.int32),
        ):
            if values is not None:
                arguments[name] = torch.tensor(values, device=device, dtype=dtype)
        return arguments


def _small(name: str, packed: _Packed, *tags: str) -> Case:
    return Case(name, packed, frozenset({"small", *tags}))


_BASE = _Packed(Scan())

CASES = (
    _small("plain", _BASE, "opcheck"),
    _small("no_pool", replace(_BASE, pool=False, slots=None, initial=None), "opcheck"),
    _small("no_slots", replace(_BASE, slots=None)),
    _small("no_initial_states", replace(_BASE, initial=None)),
    _small("padding", replace(_BASE, slots=(6, 1, -1, 0)), "opcheck"),
    _small("all_padding", replace(_BASE, slots=(-1, -1, -1, -1))),
    _small("all_empty", replace(_BASE, lengths=(0, 0, 0, 0))),
    _small("continued", replace(_BASE, computed=(3, 0, 13, 8)), "opcheck"),
    _small("padded_page", replace(_BASE, padded_page=True), "opcheck"),
    _small("bfloat16", replace(_BASE, scan=Scan(dtype=torch.bfloat16, sliced=True), pool_dtype=torch.bfloat16)),
    _small("bare", replace(_BASE, scan=Scan(skip=None, gate=False, bias=False, softplus=False))),
    _small("one_sequence", replace(_BASE, lengths=(37,), slots=(2,), initial=(True,))),
    _small("dt_limit", replace(_BASE, scan=Scan(skip="head_dim", extra={"dt_limit": (0.01, 0.05)}))),
    Case(
        "nemotron_h_8b_16_sequences",
        _Packed(
            Scan(
                heads=128,
                head_dim=64,
                state=128,
                groups=8,
                chunk_size=128,
                dtype=torch.bfloat16,
                gate=False,
                sliced=True,
            ),
            lengths=(512,) * 16,
            slots=tuple(range(16)),
            initial=(True,) * 16,
            pool_size=16,
        ),
        frozenset({"model"}),
    ),
)
