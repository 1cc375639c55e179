"""The reference state space dual scan against the torch fallbacks of transformers, on the CPU.

    python benchmarks/reference_ssd.py --newer /tmp/t523/src

where ``--newer`` is an unpacked newer transformers, whose fallback is an einsum formulation:

    pip download --no-deps transformers==5.23.0 -d /tmp/t523 && unzip -q /tmp/t523/*.whl -d /tmp/t523/src

Each implementation runs in a process of its own. Times: the processes take turns, one call a turn, so that what else
the machine does falls on all of them; the median counts. Memory: the growth of a process's resident memory to its peak
during a call (VmHWM, reset through /proc/self/clear_refs), after a warm-up, with an allocator that returns what is
freed; so the memory of compiling does not count, but that of a result does. Errors: against the recurrence in float64.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MIB = 2**20


@dataclass(frozen=True)
class Shape:
    """One call: float32, x, B and C sliced from one projection, as models pass them."""

    length: int = 2048
    groups: int = 1
    batch: int = 1
    heads: int = 8
    head_dim: int = 64
    state: int = 128
    chunk_size: int = 256


SHAPES = (Shape(), Shape(groups=2), Shape(length=2000))


@dataclass(frozen=True)
class Contender:
    """An implementation (ours, installed or newer) and how it is run: eager, compiled, or compiled for any length."""

    source: str
    mode: str


CONTENDERS = tuple(
    Contender(source, mode)
    for source, modes in (
        ("ours", ("eager", "compiled", "dynamic")),
        ("newer", ("eager", "compiled")),
        ("installed", ("eager", "compiled")),
    )
    for mode in modes
)


# --- in a process of its own ---


def work(source: str, mode: str, shape: Shape) -> None:
    """Answers ``time``, ``memory`` and ``save PATH`` on standard input, one JSON line each."""
    import torch

    torch.set_grad_enabled(False)
    function, version = _implementation(source)
    arguments = _arguments(shape)
    if mode != "eager":
        function = torch.compile(function, fullgraph=True)
    if mode == "dynamic":
        for name in ("x", "dt", "B", "C"):
            torch._dynamo.mark_dynamic(arguments[name], 1)

    def call() -> Any:
        return function(*(arguments[n] for n in ("x", "dt", "A", "B", "C")), **_options(arguments, shape))

    call()
    call()
    _say({"version": version, "torch": torch.__version__, "threads": torch.get_num_threads()})
    for line in sys.stdin:
        command, _, path = line.strip().partition(" ")
        if command == "time":
            start = time.perf_counter()
            call()
            _say(time.perf_counter() - start)
        elif command == "memory":
            _say(_peak_growth(call))
        else:
            torch.save(call(), path)
            _say(path)


def _say(answer: Any) -> None:
    print(json.dumps(answer), flush=True)


def _implementation(source: str) -> tuple[Callable[..., Any], str]:
    if source == "ours":
        sys.path.insert(0, str(HERE.parent))
        ours = importlib.import_module("torch_mamba_ops")
        return ours.mamba_chunk_scan_combined, ours.__version__
    version = importlib.import_module("transformers").__version__
    return importlib.import_module("transformers.models.mamba2.modeling_mamba2").mamba2_chunk_scan, version


def _arguments(shape: Shape) -> dict[str, Any]:
    import torch

    torch.manual_seed(0)
    inner, shared = shape.heads * shape.head_dim, shape.groups * shape.state
    x, B, C = torch.randn(shape.batch, shape.length, inner + 2 * shared).split([inner, shared, shared], -1)
    return {
        "x": x.unflatten(-1, (shape.heads, shape.head_dim)),
        "dt": torch.randn(shape.batch, shape.length, shape.heads),
        "A": -torch.rand(shape.heads) - 1,
        "B": B.unflatten(-1, (shape.groups, shape.state)),
        "C": C.unflatten(-1, (shape.groups, shape.state)),
        "D": torch.randn(shape.heads),
        "dt_bias": torch.rand(shape.heads) - 4,
    }


def _options(arguments: dict[str, Any], shape: Shape) -> dict[str, Any]:
    return {
        "chunk_size": shape.chunk_size,
        "D": arguments["D"],
        "dt_bias": arguments["dt_bias"],
        "dt_softplus": True,
        "return_final_states": True,
    }


def _peak_growth(call: Callable[[], Any]) -> int:
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _memory("VmRSS")
    call()
    return _memory("VmHWM") - before


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


# --- the parent ---


class Worker:
    """A process that runs one contender on one shape."""

    def __init__(self, contender: Contender, shape: Shape, newer: str | None, returns_memory: bool = False) -> None:
        environment = dict(os.environ)
        if contender.source == "newer":
            environment["PYTHONPATH"] = newer or ""
        if returns_memory:
            environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        command = [sys.executable, __file__, "--work", json.dumps([contender.source, contender.mode, vars(shape)])]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        self.facts: dict[str, Any] = self._answer()

    def ask(self, command: str) -> Any:
        """Sends a command and waits for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()
        self._errors.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"a worker ended with {self._process.wait()}:\n{self._errors.read()[-2000:]}")
        return json.loads(line)


def measure(shape: Shape, contenders: list[Contender], newer: str | None, rounds: int) -> list[dict[str, Any]]:
    """One row for each contender."""
    import torch

    truth = _truth(shape)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        workers = {c: Worker(c, shape, newer) for c in contenders}
        seconds: dict[Contender, list[float]] = {c: [] for c in contenders}
        for turn in range(rounds):
            for contender, worker in workers.items():
                if turn < 3 or sum(seconds[contender]) < 10:  # the slowest takes ten seconds a call
                    seconds[contender].append(worker.ask("time"))
        for contender, worker in workers.items():
            results = torch.load(worker.ask(f"save {folder}/results"))
            error = max(float((a - b.double()).abs().max()) for a, b in zip(truth, results, strict=True))
            worker.close()
            frugal = Worker(contender, shape, newer, returns_memory=True)
            peak = statistics.median(frugal.ask("memory") for _ in range(3))
            frugal.close()
            rows.append(
                {
                    "implementation": contender.source,
                    "version": worker.facts["version"],
                    "mode": contender.mode,
                    **vars(shape),
                    "milliseconds": round(1e3 * statistics.median(seconds[contender]), 2),
                    "fastest_milliseconds": round(1e3 * min(seconds[contender]), 2),
                    "calls": len(seconds[contender]),
                    "peak_mib": round(peak / MIB, 1),
                    "max_error": f"{error:.1e}",
                    "torch": worker.facts["torch"],
                    "threads": worker.facts["threads"],
                    "processor": _processor(),
                }
            )
    return rows


def _truth(shape: Shape) -> Any:
    import torch

    sys.path.insert(0, str(HERE.parent))
    oracle = importlib.import_module("torch_mamba_ops.testing.oracles.mamba_chunk_scan_combined")
    arguments = {name: tensor.double() for name, tensor in _arguments(shape).items()}
    with torch.no_grad():
        return oracle.mamba_chunk_scan_combined(**arguments | _options(arguments, shape))


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def report(shape: Shape, rows: list[dict[str, Any]]) -> None:
    """Prints one shape's table and how it stands to the bars."""
    print(
        f"\nB={shape.batch} L={shape.length} H={shape.heads} P={shape.head_dim} N={shape.state} G={shape.groups} "
        f"Q={shape.chunk_size} float32, {rows[0]['threads']} threads, {rows[0]['processor']}, torch {rows[0]['torch']}"
    )
    print(f"{'implementation':<24}{'mode':<10}{'median ms':>11}{'best ms':>10}{'peak MiB':>10}{'max error':>12}")
    for row in rows:
        name = "torch_mamba_ops" if row["implementation"] == "ours" else "transformers"
        print(
            f"{name + ' ' + row['version']:<24}{row['mode']:<10}{row['milliseconds']:>11.1f}"
            f"{row['fastest_milliseconds']:>10.1f}{row['peak_mib']:>10.1f}{row['max_error']:>12}"
        )
    found = {(row["implementation"], row["mode"]): row for row in rows}
    for ours, peer, bar in (
        (("ours", "compiled"), ("newer", "compiled"), "time and memory at most 1.00"),
        (("ours", "dynamic"), ("newer", "compiled"), "no bar"),
        (("ours", "eager"), ("installed", "eager"), "time at most 0.20, memory below 0.10"),
    ):
        if ours in found and peer in found:
            time_ratio = found[ours]["milliseconds"] / found[peer]["milliseconds"]
            memory_ratio = found[ours]["peak_mib"] / found[peer]["peak_mib"]
            print(
                f"  {' '.join(ours)} / transformers {found[peer]['version']} {peer[1]}: "
                f"time {time_ratio:.3f}, memory {memory_ratio:.3f}  (bar: {bar})"
            )


def main() -> None:
    """Measures, prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    newer = os.environ.get("TRANSFORMERS_NEWER")
    parser.add_argument("--newer", default=newer, help="folder of the newer transformers")
    parser.add_argument("--rounds", type=int, default=15, help="calls of each implementation, at most")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "reference_ssd.csv")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        source, mode, shape = json.loads(options.work)
        work(source, mode, Shape(**shape))
        return
    contenders = [c for c in CONTENDERS if c.source != "newer" or options.newer]
    if not options.newer:
        print("no --newer transformers: its einsum fallback is left out, and so is the bar against it")
    rows = []
    for shape in SHAPES:
        rows += (found := measure(shape, contenders, options.newer, options.rounds))
        report(shape, found)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"\nwritten to {options.output}")


if __name__ == "__main__":
    main()
