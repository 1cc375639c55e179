"""The configs that ``max_autotune`` compares: what the ladder has for these sizes at any batch, and what is near."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch_mamba_ops.tuning import configs_for, key_of

from .plan import Plan

_WORKS = [1 << power for power in range(25)]  # sequences x heads: entries of a table lie at least a doubling apart
_WARPS = (1, 2, 4, 8)
_THREAD_HOLDS = range(4, 129)  # numbers of a state: fewer leave it idle, more do not fit its registers


def configs(made: Plan) -> list[dict[str, Any]]:
    """Every config once, the eager kernel's own first."""
    state, (_, _, head_dim) = made.state, made.sizes
    key = key_of(state.dtype, P=head_dim, N=state.shape[-1])
    ladder = [configs_for("selective_state_update", key, work, state.device) for work in _WORKS]
    found = [made.config]
    for base in [made.config, *filter(None, ladder)]:
        found += [made.config | config for config in (base, *_near(base, head_dim))]
    return list({tuple(config.items()): config for config in found}.values())


def _near(config: dict[str, Any], head_dim: int) -> Iterator[dict[str, Any]]:
    for block in (config["BLOCK_P"] // 2, config["BLOCK_P"], config["BLOCK_P"] * 2):
        for warps in _WARPS:
            fits = 1 <= block < 2 * head_dim and block * config["BLOCK_N"] // (32 * warps) in _THREAD_HOLDS
            if fits and warps * 2 in (config["num_warps"], config["num_warps"] * 2, config["num_warps"] * 4):
                yield {**config, "BLOCK_P": block, "num_warps": warps}
