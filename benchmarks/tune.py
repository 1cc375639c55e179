"""Finds the configs of decode kernels for the GPU at hand and writes the table that ships with the package:

    python benchmarks/tune.py --out torch_mamba_ops/tuning/tables

Every config must first give right and finite results on fresh inputs. Arguments and times are those of
``benchmarks/decode.py``: CUDA graphs over more memory than the cache holds, configs taking turns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import decode
import torch
import triton
from decode import BF16, F32, Arguments, Run, Shape, Step

from torch_mamba_ops.tuning import key_of, use_config
from torch_mamba_ops.tuning.ladder import table_name

OP = "selective_state_update"
# Of the models in ops/selective_state_update/cases.py. What counts is head_dim and state; heads only multiply the work.
SHAPES = (Shape(128, 8), Shape(128, 8, head_dim=80), Shape(24, 1, head_dim=128, state=256), Shape(112, 2, state=64))


def configs(shape: Shape) -> Iterator[dict[str, Any]]:
    """Blocks of channels and warps such that a warp holds a sensible part of a state."""
    block_n = max(8, 1 << (shape.state - 1).bit_length())
    for block_p, warps in itertools.product((4, 8, 16, 32, 64, 128), (1, 2, 4, 8)):
        if block_p <= 1 << (shape.head_dim - 1).bit_length() and 128 <= block_p * block_n // warps <= 4096:
            yield {"BLOCK_P": block_p, "BLOCK_N": block_n, "num_warps": warps}


def step_with(config: dict[str, Any], ours: Step) -> Step:
    """Our step with its config given."""

    def step(a: Arguments) -> torch.Tensor:
        with use_config(OP, config):
            return ours(a)

    return step


def tune(run: Run, shape: Shape, dtype: torch.dtype, batch: int) -> dict[str, float]:
    """Microseconds of each config, as JSON."""

    def make() -> Arguments:
        return decode.ssu_arguments(shape, batch, dtype, run.device)

    ours = decode.ssu_ours("triton")()
    steps = {json.dumps(config): step_with(config, ours) for config in configs(shape)}
    steps = decode.right(steps, make, decode.ssu_ours("reference")())
    touched = batch * shape.heads * shape.head_dim * shape.state * dtype.itemsize
    return decode.device_times(run, steps, decode.pools(make, touched, ("A", "D", "dt_bias"), dry=False))


def main() -> None:
    """Tunes, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the table")
    parser.add_argument("--first", type=int, help="only so many shapes")
    options = parser.parse_args()
    run = Run(quick=True, dry=False, reference=False)
    table: dict[str, Any] = {}
    log: list[str] = []
    for shape, dtype in itertools.product(SHAPES[: options.first], (F32, BF16)):
        entries: list[tuple[int, dict[str, Any]]] = []
        key = key_of(dtype, P=shape.head_dim, N=shape.state)
        for batch in decode.BATCHES:
            began = time.perf_counter()
            found = sorted(tune(run, shape, dtype, batch).items(), key=lambda item: item[1])
            log += [f"{key}, {batch} x {shape.heads}: {took:.2f} us {config}" for config, took in found]
            best, took = found[0]
            print(f"{key} batch {batch}: {took:.2f} us {best} ({time.perf_counter() - began:.0f} s)", flush=True)
            if not entries or entries[-1][1] != json.loads(best):
                entries.append((batch * shape.heads, json.loads(best)))
            decode._release(run)
        table[key] = entries
    made_by = f"benchmarks/tune.py, torch {torch.__version__}, triton {triton.__version__}"
    lines = [f"  {json.dumps(key)}: {json.dumps(entries)}" for key, entries in table.items()]
    text = f'{{"made_by": {json.dumps(made_by)},\n "{OP}": {{\n' + ",\n".join(lines) + "\n}}\n"
    options.out.mkdir(parents=True, exist_ok=True)
    name = table_name(torch.device("cuda"))
    (options.out / f"{name}.json").write_text(text)
    (options.out / f"{name}.log").write_text("\n".join(log) + "\n")


if __name__ == "__main__":
    main()
