"""Finds the configs of decode kernels for the GPU at hand and writes the table that ships with the package:

    python benchmarks/tune.py --out torch_mamba_ops/tuning/tables

Every config must first give right and finite results on fresh inputs. Arguments and times are those of
``benchmarks/decode.py``: CUDA graphs over more memory than the cache holds, configs taking turns.

    python benchmarks/tune.py --backends benchmarks/results/decode_h200.csv --out torch_mamba_ops/tuning/tables

writes which backend is the fastest into the table of the GPU that the CSV, of ``benchmarks/decode.py``, is from, and
needs none. `auto` tries that backend first.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import decode
import torch
import triton
from decode import BF16, CONV_DIM, F32, WIDTH, Arguments, Run, Shape, Step

from torch_mamba_ops.dispatch import OPS
from torch_mamba_ops.tuning import key_of, use_config
from torch_mamba_ops.tuning.files import spelled, table_name
from torch_mamba_ops.tuning.spaces import space

# Of the models in ops/selective_state_update/cases.py. What counts is head_dim and state; heads only multiply the work.
SHAPES = (Shape(128, 8), Shape(128, 8, head_dim=80), Shape(24, 1, head_dim=128, state=256), Shape(112, 2, state=64))


@dataclass(frozen=True)
class Problem:
    """What one entry of a table is for.

    Attributes:
        op: the operation.
        key: of the entry.
        work: of one sequence.
        make: draws a call's arguments for a batch.
        touched: bytes of one sequence that a call reads or writes.
        shared: arguments that all calls share.
        ours: our steps by backend.
    """

    op: str
    key: str
    work: int
    make: Callable[[int], Arguments]
    touched: int
    shared: tuple[str, ...]
    ours: Callable[[str], Callable[[], Step]]


def state_updates() -> Iterator[Problem]:
    """The state update with states of both dtypes."""
    for shape, dtype in itertools.product(SHAPES, (F32, BF16)):
        yield Problem(
            op="selective_state_update",
            key=key_of(dtype, P=shape.head_dim, N=shape.state),
            work=shape.heads,
            make=lambda batch, shape=shape, dtype=dtype: decode.ssu_arguments(
                shape, batch, dtype, torch.device("cuda")
            ),
            touched=shape.heads * shape.head_dim * shape.state * dtype.itemsize,
            shared=("A", "D", "dt_bias"),
            ours=decode.ssu_ours,
        )


def convolutions() -> Iterator[Problem]:
    """The convolution step in both layouts of the pool."""
    for layout in ("SD", "DS"):
        yield Problem(
            op="causal_conv1d_update",
            key=key_of(BF16, W=WIDTH, K=WIDTH - 1, DS=int(layout == "DS")),
            work=CONV_DIM,
            make=lambda batch, layout=layout: decode.conv_arguments(batch, layout, torch.device("cuda")),
            touched=CONV_DIM * 2 * (WIDTH - 1 + 2),
            shared=("weight", "bias"),
            ours=decode.conv_ours,
        )


def tune(run: Run, problem: Problem, batch: int) -> dict[str, float]:
    """Microseconds of each right config, as JSON."""

    def make() -> Arguments:
        return problem.make(batch)

    ours = problem.ours("triton")()
    steps = {json.dumps(config): _step_with(problem.op, config, ours) for config in space(problem.op, problem.key)}
    steps = decode.right(steps, make, problem.ours("reference")())
    return decode.device_times(run, steps, decode.pools(make, batch * problem.touched, problem.shared, dry=False))


def _step_with(op: str, config: dict[str, Any], ours: Step) -> Step:
    def step(a: Arguments) -> torch.Tensor:
        with use_config(op, config):
            return ours(a)

    return step


AHEAD = 1.01  # how much faster than the first of the fixed order: runs differ by less
MEASURED = {"ssu": "selective_state_update"}  # by decode.py, of operations with several backends for a GPU


def fastest(rows: Iterable[Mapping[str, str]]) -> dict[str, dict[str, list[tuple[int, str]]]]:
    """What a table says of backends, by operation and key: amounts of work, and the fastest backend from each on.

    One that is not the first of the fixed order must be ahead by more than 1% in every row of that key and work.

    Args:
        rows: of the CSV of decode.py. "ours" is the first of the fixed order; other contenders count if a backend has
            that name. They are timed without what their backend adds around them, so none is entered that is slower.
    """
    calls: dict[tuple[str, str, int], dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["benchmark"] not in MEASURED:
            continue
        op = OPS[MEASURED[row["benchmark"]]]
        sizes = {name: int(size) for name, size in re.findall(r"([A-Z])(\d+)", row["case"])}
        key = key_of(getattr(torch, row["dtype"]), P=sizes["P"], N=sizes["N"])
        backend = op.auto[0] if row["contender"] == "ours" else row["contender"]
        if backend in op.backends:
            times = calls.setdefault((op.name, key, int(row["batch"]) * sizes["H"]), {}).setdefault(row["case"], {})
            times[backend] = float(row["microseconds"])
    found: dict[str, dict[str, list[tuple[int, str]]]] = {}
    for (name, key, work), cases in sorted(calls.items()):
        best = _fastest(list(cases.values()), OPS[name].auto[0])
        entries = found.setdefault(name, {}).setdefault(key, [])
        if not entries or entries[-1][1] != best:
            entries.append((work, best))
    return found


def _fastest(cases: list[dict[str, float]], default: str) -> str:
    measured = set.intersection(*map(set, cases)) - {default}
    ahead = {name: min(times[default] / times[name] for times in cases) for name in sorted(measured)}
    best = max(ahead, key=ahead.__getitem__, default=default)
    return best if ahead.get(best, 0.0) > AHEAD else default


def write_backends(measured: Path, out: Path) -> None:
    """Writes what `fastest` says of a CSV."""
    with measured.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["benchmark"] in MEASURED]
    (gpu,) = {row["gpu"] for row in rows}
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    path = out / f"{spelled(gpu)}.json"
    table: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    table["backends"] = {"made_by": f"benchmarks/tune.py --backends {measured}, of commit {commits}", **fastest(rows)}
    path.write_text(readable(table))


PROBLEMS = {"selective_state_update": state_updates, "causal_conv1d_update": convolutions}


def main() -> None:
    """Tunes, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", help=f"of {', '.join(PROBLEMS)}; others keep what the table has")
    parser.add_argument("--out", type=Path, required=True, help="folder of the table")
    parser.add_argument("--backends", type=Path, metavar="CSV", help="write which backends are the fastest")
    options = parser.parse_args()
    if options.backends is not None:
        if options.ops:
            parser.error(f"ops: got {', '.join(options.ops)} with --backends, which takes all that the CSV has")
        write_backends(options.backends, options.out)
        return
    run = Run(quick=True, dry=False, reference=False)
    path = options.out / f"{table_name(torch.device('cuda'))}.json"
    table: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    table["made_by"] = f"benchmarks/tune.py, torch {torch.__version__}, triton {triton.__version__}"
    log: list[str] = []
    for problem in itertools.chain.from_iterable(PROBLEMS[op]() for op in options.ops or PROBLEMS):
        entries: list[tuple[int, dict[str, Any]]] = []
        for batch in decode.BATCHES:
            began = time.perf_counter()
            found = sorted(tune(run, problem, batch).items(), key=lambda item: item[1])
            log += [f"{problem.op} {problem.key}, {batch}: {took:.2f} us {config}" for config, took in found]
            best, took = found[0]
            print(
                f"{problem.key} batch {batch}: {took:.2f} us {best} ({time.perf_counter() - began:.0f} s)", flush=True
            )
            if not entries or entries[-1][1] != json.loads(best):
                entries.append((batch * problem.work, json.loads(best)))
            decode._release(run)
        table.setdefault(problem.op, {})[problem.key] = entries
    options.out.mkdir(parents=True, exist_ok=True)
    path.write_text(readable(table))
    path.with_suffix(".log").write_text("\n".join(log) + "\n")


def readable(table: dict[str, Any]) -> str:
    """JSON with a line for each key."""
    parts = []
    for name, part in table.items():
        text = json.dumps(part)
        if isinstance(part, dict):
            lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entries)}" for key, entries in part.items())
            text = f"{{\n{lines}\n}}"
        parts.append(f"{json.dumps(name)}: {text}")
    return "{" + ",\n".join(parts) + "}\n"


if __name__ == "__main__":
    main()
