"""The configs worth trying for a kernel, by the key of `key_of`. An operation that is not here is not tuned."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product

import torch

from torch_mamba_ops.tuning.ladder import Config


def space(op: str, key: str) -> tuple[Config, ...]:
    """All configs to try for an operation's key; none if it is not tuned."""
    dtype, *_ = key.split()
    sizes = {name: int(size) for name, size in re.findall(r"\b([A-Z]+)(\d+)\b", key)}
    return SPACES[op](getattr(torch, dtype), sizes) if op in SPACES else ()


def _state_update(_: torch.dtype, sizes: dict[str, int]) -> tuple[Config, ...]:
    """Blocks of channels and warps such that a warp holds a sensible part of a state."""
    block_n = max(8, _power_of_two(sizes["N"]))
    return tuple(
        {"BLOCK_P": block_p, "BLOCK_N": block_n, "num_warps": warps}
        for block_p, warps in product((4, 8, 16, 32, 64, 128), (1, 2, 4, 8))
        if block_p <= _power_of_two(sizes["P"]) and 128 <= block_p * block_n // warps <= 4096
    )


def _conv_update(_: torch.dtype, sizes: dict[str, int]) -> tuple[Config, ...]:
    """Sequences and warps of a program."""
    return tuple({"SEQUENCES": sequences, "num_warps": warps} for sequences, warps in product((1, 2, 4), (1, 2, 4, 8)))


def _conv(dtype: torch.dtype, sizes: dict[str, int]) -> tuple[Config, ...]:
    """Tokens and channels of a program, of which a thread has vectors of 16 bytes."""
    vector = 16 // dtype.itemsize
    if sizes["TI"]:
        return tuple(
            {"BLOCK_D": block_d, "BLOCK_T": 32 * vector * rows, "num_warps": warps}
            for block_d, rows, warps in product((8, 16, 32), (1, 2), (2, 4, 8))
        )
    return tuple(
        {"BLOCK_D": 32 * warps * vector, "BLOCK_T": block_t, "UNROLL": 4, "num_warps": warps}
        for block_t, warps in product((16, 32, 64, 128), (1, 2, 4))
    )


def _chunk_scan(dtype: torch.dtype, sizes: dict[str, int]) -> tuple[Config, ...]:
    """Channels of a program, stages, and whether TMA copies tiles. The tokens of a chunk are not tuned: results depend
    on them, and must not depend on the batch. One stage with tiles of 64 rows has given wrong results (Triton 3.6,
    sm_90); more have not."""
    block_n = max(16, _power_of_two(sizes["N"]))
    block_q, stages = (64, (2, 3)) if dtype is torch.bfloat16 else (32, (1, 2))
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    tma = (False, True) if dtype is torch.bfloat16 and hopper else (False,)
    return tuple(
        {"BLOCK_Q": block_q, "BLOCK_P": block_p, "BLOCK_N": block_n, "num_warps": 4, "num_stages": stage, "TMA": copied}
        for block_p, stage, copied in product((16, 32, 64), stages, tma)
        if block_p <= max(16, _power_of_two(sizes["P"]))
    )


def _selective_scan(_: torch.dtype, sizes: dict[str, int]) -> tuple[Config, ...]:
    """Channels and tokens of a program such that a thread holds 2 to 16 numbers of the state."""
    block_n = _power_of_two(sizes["N"])
    return tuple(
        {"BLOCK_D": block_d, "BLOCK_T": block_t, "num_warps": warps}
        for block_d, block_t, warps in product((8, 16, 32), (8, 16, 32), (1, 2, 4, 8))
        if 2 <= block_d * block_n // (32 * warps) <= 16
    )


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


SPACES: dict[str, Callable[[torch.dtype, dict[str, int]], tuple[Config, ...]]] = {
    "selective_state_update": _state_update,
    "causal_conv1d_update": _conv_update,
    "causal_conv1d_varlen_fn": _conv,
    "mamba_chunk_scan_combined": _chunk_scan,
    "selective_scan_fn": _selective_scan,
}
