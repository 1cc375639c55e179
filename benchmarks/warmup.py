"""What the first request waits for, on Mamba2 layers of an 8B model, with and without warm-up:

    python benchmarks/warmup.py [--out warmup.csv] [--layers 24] [--batches 1000] [--quick] [--dry]

Three processes, each with CUDA started before the clock: one that warms nothing up and one that does, each with empty
caches, and one that warms up with the caches of the second. Each then serves one request (a prefill of 1000 tokens and
32 decode steps), more of them for the steady state, and mixed batches (decode steps, prefills with and without initial
states, copies of states for a prefix cache), and counts what Triton still compiles or loads. Inputs are those of the
layers after the in-projection: the matrix products of a model would hide what is measured.

Exits with 1 if a bar is missed: warm-up 20 s cold and 3 s with the cache, first request 1.2 of the steady state, no
kernel compiled over the mixed batches. ``--dry`` needs no GPU: small layers on the reference; no bar holds there.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch_mamba_ops as tmo  # noqa: E402 - of this checkout
from torch_mamba_ops.startup import Compiles, count_compiles  # noqa: E402
from torch_mamba_ops.state import MambaStateSpec, StateCopyPlan, StatePool  # noqa: E402

SLOTS, MOST_DECODES, MOST_TOKENS = 320, 256, 8192
PROMPT, NEW = 1000, 32


@dataclass(frozen=True)
class Batch:
    """What one step serves: decode steps of one token, and after them prefills.

    Attributes:
        decodes: sequences that decode.
        lengths: of the prefills.
        known: whether a prefill goes on from a state.
        copies: slots to copy for a prefix cache.
    """

    decodes: int
    lengths: tuple[int, ...] = ()
    known: tuple[bool, ...] = ()
    copies: int = 0


class Layers:
    """Mamba2 layers with their pools, from the in-projection's output on, as an engine runs them."""

    def __init__(self, spec: MambaStateSpec, count: int, slots: int, device: torch.device, dtype: torch.dtype) -> None:
        self.spec, self.device, self.dtype = spec, device, dtype
        inner = spec.heads * spec.head_dim
        self.widths = (inner, spec.conv_dim, spec.heads)
        self.inner_widths = (inner, spec.groups * spec.state_size, spec.groups * spec.state_size)

        def random_(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype)

        self.weight, self.bias = random_(spec.conv_dim, spec.conv_width), random_(spec.conv_dim)
        self.D, self.dt_bias = random_(spec.heads), random_(spec.heads) - 4
        self.A = -torch.ones(spec.heads, device=device)
        self.pool = StatePool([spec] * count, slots, device=device)
        self.plan = StateCopyPlan(self.pool)

    def projected(self, batch: Batch) -> Tensor:
        """A row for each token: z, x B C and dt."""
        return torch.randn(batch.decodes + sum(batch.lengths), sum(self.widths), device=self.device, dtype=self.dtype)

    def step(self, batch: Batch, projected: Tensor, slots: Sequence[int]) -> None:
        """Runs all layers. ``slots``: one for each sequence, and a free one for each copy."""
        n, sequences = batch.decodes, batch.decodes + len(batch.lengths)
        indices = torch.tensor(slots, dtype=torch.int32, device=self.device)
        served, free = indices[:sequences], indices[sequences:]
        known = torch.tensor([True] * n + list(batch.known), device=self.device)
        starts = [sum(batch.lengths[:i]) for i in range(len(batch.lengths) + 1)]
        cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=self.device)
        _, xbc, dt = projected.split(self.widths, -1)
        for layer in self.pool.values():
            windows, states = layer.conv_state, layer.ssm_state
            assert windows is not None and states is not None
            if n:
                self._decode(xbc[:n], dt[:n], windows, states, served[:n])
            if batch.lengths:
                initial = known[n:] if any(batch.known) else None
                self._prefill(xbc[n:], dt[n:], windows, states, served[n:], cu_seqlens, initial)
        if batch.copies:
            self.plan.copy(served[: batch.copies], free)

    def _decode(self, xbc: Tensor, dt: Tensor, windows: Tensor, states: Tensor, slots: Tensor) -> None:
        out = tmo.causal_conv1d_update(xbc, windows, self.weight, self.bias, "silu", conv_state_indices=slots)
        x, B, C = self._split(out)
        rounding: dict[str, Any] = {}
        if self.spec.stochastic_rounding:
            seed = torch.randint(2**31, (1,), device=self.device, dtype=torch.int64)
            rounding = {"rand_seed": seed, "philox_rounds": self.spec.philox_rounds}
        tmo.selective_state_update(
            states, x, dt, self.A, B, C, self.D, None, self.dt_bias, True, state_batch_indices=slots, **rounding
        )

    def _prefill(
        self, xbc: Tensor, dt: Tensor, windows: Tensor, states: Tensor, slots: Tensor, starts: Tensor, known: Any
    ) -> None:
        out = tmo.causal_conv1d_varlen_fn(
            xbc.T, self.weight, self.bias, windows, starts,
            cache_indices=slots, has_initial_state=known, activation="silu",
        )  # fmt: skip
        x, B, C = self._split(out.T)
        assert self.spec.chunk_size is not None
        tmo.mamba_chunk_scan_combined_varlen(
            x, dt, self.A, B, C, self.spec.chunk_size, starts,
            D=self.D, dt_bias=self.dt_bias, dt_softplus=True,
            states=states, state_indices=slots, has_initial_state=known,
        )  # fmt: skip

    def _split(self, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, B, C = row.split(self.inner_widths, -1)
        B, C = (each.unflatten(-1, (self.spec.groups, self.spec.state_size)) for each in (B, C))
        return x.unflatten(-1, (self.spec.heads, self.spec.head_dim)), B, C


def eight_billion(**options: Any) -> MambaStateSpec:
    """A Mamba2 layer as 8B models have it."""
    return MambaStateSpec.mamba2(128, 64, 128, groups=8, chunk_size=128, **{"conv_dtype": torch.bfloat16, **options})


def mixed(count: int, seed: int, most_decodes: int, most_tokens: int) -> list[Batch]:
    """Batches as serving makes them up: many lengths are odd, some are 1, and some batches have one part only."""
    draw, batches = random.Random(seed), []
    for _ in range(count):
        decodes = draw.choice((0, 1, 2, draw.randint(1, most_decodes), most_decodes))
        budget, lengths = most_tokens, []
        for _ in range(0 if decodes and draw.random() < 0.3 else draw.choice((1, 1, 2, 3, 8, 16, 21))):
            length = draw.choice((1, 7, 64, draw.randint(1, 300), draw.randint(1, most_tokens)))
            if length <= budget:
                lengths.append(length)
                budget -= length
        likely = draw.choice((0.0, 0.5, 1.0))
        known = tuple(draw.random() < likely for _ in lengths)
        sequences = decodes + len(lengths)
        batches.append(
            Batch(decodes, tuple(lengths), known, draw.choice((0, 0, min(sequences, 1), min(sequences, 20))))
        )
    return batches


def slots_of(batch: Batch, slots: int) -> list[int]:
    """Any slots, none twice."""
    return random.Random(batch.decodes).sample(range(slots), batch.decodes + len(batch.lengths) + batch.copies)


def serve(layers: Layers, prompt: int) -> tuple[float, float]:
    """Milliseconds of one request, and of its prefill alone."""
    prefill, decode = Batch(0, (prompt,), (False,)), Batch(1)
    projected, step = layers.projected(prefill), layers.projected(decode)
    _wait(layers.device)
    began = time.perf_counter()
    layers.step(prefill, projected, [5])
    _wait(layers.device)
    first = time.perf_counter()
    for _ in range(NEW):
        layers.step(decode, step, [5])
    _wait(layers.device)
    return (time.perf_counter() - began) * 1e3, (first - began) * 1e3


def worker(warm: bool, options: argparse.Namespace) -> dict[str, Any]:
    """What one process measures."""
    device = torch.device("cpu" if options.dry else "cuda")
    spec, most_decodes, most_tokens, slots = eight_billion(), MOST_DECODES, MOST_TOKENS, SLOTS
    if options.dry:
        spec, most_decodes, most_tokens, slots = MambaStateSpec.mamba2(4, 8, 16, chunk_size=16), 8, 256, 64
    torch.set_grad_enabled(False)
    layers = Layers(spec, options.layers, slots, device, spec.conv_dtype)
    _wait(device)
    report = None
    if warm:
        batches = [1 << n for n in range(most_decodes.bit_length())]
        report = tmo.warmup(spec, device=device, batch_sizes=batches, max_tokens=most_tokens, progress=False)
        print(report, file=sys.stderr)
    first, first_prefill = serve(layers, PROMPT)
    # Prompts differ in length, as the first one differs from what was warmed.
    others = [serve(layers, PROMPT + 1 + i) for i in range(5 if options.quick or options.dry else 30)]
    steady, steady_prefill = (statistics.median(times) for times in zip(*others, strict=True))
    with count_compiles() if not options.dry else contextlib.nullcontext(Compiles()) as compiles:
        for batch in mixed(options.batches, 0, most_decodes, most_tokens):
            layers.step(batch, layers.projected(batch), slots_of(batch, slots))
        _wait(device)
    if compiles.total:
        print(f"after warm-up: compiled {compiles.compiled}, loaded {compiles.loaded}", file=sys.stderr)
    return {
        "warmup_seconds": report.seconds if report else 0.0,
        "compiled": report.compiled if report else 0,
        "loaded": report.loaded if report else 0,
        "tuned": len(report.tuned) if report else 0,
        "memory_mib": report.memory >> 20 if report else 0,
        "first_request_ms": first,
        "steady_request_ms": steady,
        "first_over_steady": first / steady,
        "first_prefill_ms": first_prefill,
        "steady_prefill_ms": steady_prefill,
        "compiles_in_mixed_batches": compiles.total,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _machine(dry: bool) -> dict[str, str]:
    try:
        triton = str(importlib.import_module("triton").__version__)
    except ImportError:
        triton = ""
    commit = os.environ.get("BENCH_COMMIT", "")  # for a copy of the files without their history
    if not commit:
        command = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE).stdout.strip()
    return {
        "gpu": "none (dry)" if dry else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton,
        "torch_mamba_ops": tmo.__version__,
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _measured(name: str, caches: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", "none" if name == "no warm-up" else "warm"]
    command += [f"--layers={options.layers}", f"--batches={options.batches}"]
    command += ["--quick"] * options.quick + ["--dry"] * options.dry
    places = {"TRITON_CACHE_DIR": f"{caches}/triton", "TORCH_MAMBA_OPS_CACHE_DIR": f"{caches}/configs"}
    done = subprocess.run(command, env=os.environ | places, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"process": name, **found}


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """The bars that were not reached."""
    found = []
    for row, seconds in zip(rows[1:], (20, 3), strict=True):
        for field, most in (
            ("warmup_seconds", seconds),
            ("first_over_steady", 1.2),
            ("compiles_in_mixed_batches", 0),
            ("tuned", 0),
        ):
            if row[field] > most:
                found.append(f"{row['process']}: {field} {row[field]:.2f}, at most {most}")
    return found


def main() -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "warmup_h200.csv")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--batches", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="fewer repeats of the request")
    parser.add_argument("--dry", action="store_true", help="no GPU: small layers on the reference")
    parser.add_argument("--worker", choices=("none", "warm"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(options.worker == "warm", options)))
        return 0
    if not options.dry and not torch.cuda.is_available():
        parser.error("no CUDA device here; --dry runs without")
    with tempfile.TemporaryDirectory() as cold, tempfile.TemporaryDirectory() as warm:
        places = (("no warm-up", cold), ("warm-up, empty caches", warm), ("warm-up, with the caches", warm))
        rows = [_measured(name, caches, options) for name, caches in places]
    machine = _machine(options.dry)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *machine])
        writer.writeheader()
        writer.writerows(row | machine for row in rows)
    print("  ".join(f"{name}: {value}" for name, value in machine.items()))
    for field in rows[0]:
        cells = (f"{row[field]:.3f}" if isinstance(row[field], float) else str(row[field]) for row in rows)
        print(f"{field:28}" + "".join(f"{cell:>26}" for cell in cells))
    print(f"written to {options.out}")
    if options.dry:
        return 0
    for line in missed(rows):
        print(f"missed: {line}")
    return 1 if missed(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
