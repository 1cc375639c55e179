"""Shapes of the state copy: SSM and conv states, padding, one pool or two, copies that stand in each other's way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_mamba_ops.ops.case import Case


def _plain(pool: Tensor) -> Tensor:
    return pool


def _padded_page(pool: Tensor) -> Tensor:
    page = torch.zeros(pool.shape[0], pool[0].numel() + 24, device=pool.device, dtype=pool.dtype)
    return page.as_strided(pool.shape, (page.stride(0), *pool.stride()[1:]), 8).copy_(pool)


def _channels_innermost(pool: Tensor) -> Tensor:
    return pool.transpose(1, 2).contiguous().transpose(1, 2)


def _first_columns(pool: Tensor) -> Tensor:
    """Of a wider pool, as prefill takes them for speculative decoding."""
    return torch.cat([pool, torch.zeros_like(pool)], -1)[..., : pool.shape[-1]]


def _build(
    inner: tuple[int, ...],
    src: Sequence[int],
    dst: Sequence[int],
    dtype: torch.dtype = torch.float32,
    one_pool: bool = False,
    layout: Callable[[Tensor], Tensor] = _plain,
    src_layout: Callable[[Tensor], Tensor] | None = None,
    slots: int = 8,
) -> Callable[[torch.device, torch.Generator], dict[str, Any]]:
    def build(device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        def pool(layout: Callable[[Tensor], Tensor]) -> Tensor:
            return layout(torch.randn((slots, *inner), device=device, generator=generator).to(dtype))

        source = pool(src_layout or layout)
        index = [torch.tensor(i, device=device, dtype=torch.int32) for i in (src, dst)]
        destination = source if one_pool else pool(layout)
        return {"src_pool": source, "dst_pool": destination, "src_indices": index[0], "dst_indices": index[1]}

    return build


def _small(name: str, build: Callable[[torch.device, torch.Generator], dict[str, Any]], *tags: str) -> Case:
    return Case(name, build, frozenset({"small", *tags}))


CASES = (
    _small("two_pools", _build((3, 4, 5), [0, 5, 2], [7, 0, 3]), "opcheck"),
    _small("swap_in_one_pool", _build((6,), [1, 4], [4, 1], one_pool=True), "opcheck"),
    _small("ring_in_one_pool", _build((6,), [3, 0, 6, 5], [0, 6, 3, 5], one_pool=True)),
    _small("chain_in_one_pool", _build((6,), [1, 0, 2, 2, 5], [2, 1, 3, 4, 6], one_pool=True)),
    _small("ring_with_branches", _build((6,), [0, 1, 2, 2, 6, 7], [1, 2, 0, 6, 7, 4], one_pool=True)),
    _small(
        "many_copies_in_one_pool",
        _build((6,), [*range(1, 200), 0], [*range(200)], one_pool=True, slots=210),
    ),
    _small("padding", _build((6,), [-1, 4, 2], [4, -1, 1]), "opcheck"),
    _small("padding_in_one_pool", _build((6,), [-1, 4, 2, 6], [4, -1, 6, 1], one_pool=True)),
    _small("all_padding", _build((6,), [-1, -1], [-1, 2])),
    _small("no_copies", _build((6,), [], [])),
    _small("one_number_a_slot", _build((), [1, 5], [3, 0])),
    _small("several_tiles", _build((9001,), [1, 0, 4], [0, 1, 2], one_pool=True, slots=5)),
    _small("padded_page", _build((4, 5), [1, 4, 0], [6, 2, 5], torch.bfloat16, layout=_padded_page), "opcheck"),
    _small("channels_innermost", _build((6, 3), [1, 4, 0], [6, 2, 5], torch.float16, layout=_channels_innermost)),
    _small("another_layout", _build((6, 3), [1, 4, 0], [6, 2, 5], src_layout=_channels_innermost), "opcheck"),
    _small("first_columns", _build((6, 3), [1, 4, 6], [6, 2, 5], one_pool=True, layout=_first_columns), "opcheck"),
    _small("three_strided_dimensions", _build((2, 3, 4), [1, 4], [6, 2], layout=lambda p: p.transpose(1, 3))),
    Case(
        "nemotron_h_8b_64_slots",
        _build((128, 64, 128), range(64), range(64, 128), one_pool=True, slots=128),
        frozenset({"model"}),
    ),
    Case(
        "nemotron_h_8b_64_windows",
        _build((10240, 3), range(64), range(64, 128), torch.bfloat16, True, _channels_innermost, slots=128),
        frozenset({"model"}),
    ),
)
