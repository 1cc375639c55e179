"""Shapes of the state copy: SSM and conv states, padding, one pool or two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torch_mamba_ops.ops.case import Case


def _build(
    inner: tuple[int, ...],
    src: list[int],
    dst: list[int],
    dtype: torch.dtype = torch.float32,
    one_pool: bool = False,
    padded_page: bool = False,
    slots: int = 8,
) -> Callable[[torch.device, torch.Generator], dict[str, Any]]:
    def build(device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        def pool() -> torch.Tensor:
            made = torch.randn((slots, *inner), device=device, generator=generator).to(dtype)
            if not padded_page:
                return made
            page = torch.zeros(slots, made[0].numel() + 24, device=device, dtype=dtype)
            return page.as_strided(made.shape, (page.stride(0), *made.stride()[1:]), 8).copy_(made)

        source = pool()
        index = [torch.tensor(i, device=device, dtype=torch.int32) for i in (src, dst)]
        destination = source if one_pool else pool()
        return {"src_pool": source, "dst_pool": destination, "src_indices": index[0], "dst_indices": index[1]}

    return build


CASES = (
    Case("two_pools", _build((3, 4, 5), [0, 5, 2], [7, 0, 3]), frozenset({"small", "opcheck"})),
    Case("swap_in_one_pool", _build((6,), [1, 4], [4, 1], one_pool=True), frozenset({"small", "opcheck"})),
    Case("padding", _build((6,), [-1, 4, 2], [4, -1, 1]), frozenset({"small"})),
    Case("all_padding", _build((6,), [-1, -1], [-1, 2]), frozenset({"small"})),
    Case(
        "padded_page",
        _build((4, 5), [1, 4, 0], [6, 2, 5], torch.bfloat16, padded_page=True),
        frozenset({"small", "opcheck"}),
    ),
    Case(
        "nemotron_h_8b_64_slots",
        _build((128, 64, 128), list(range(64)), list(range(64, 128)), one_pool=True, slots=128),
        frozenset({"model"}),
    ),
)
