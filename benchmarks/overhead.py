"""What a call costs beyond its implementation: ``python benchmarks/overhead.py`` prints microseconds for each operation
(public function, checks, choice and dispatcher around a backend that does nothing, less that backend called directly)
and milliseconds for importing the package. Case by case: each option costs its own checks.
"""

from __future__ import annotations

import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from torch_mamba_ops import use_backend
from torch_mamba_ops.dispatch import OPS, Op
from torch_mamba_ops.testing import build, cases
from torch_mamba_ops.testing.check import operator_arguments

IMPORT = "import time, torch; began = time.perf_counter(); import torch_mamba_ops; print(time.perf_counter() - began)"


def microseconds(call: Callable[[], object], repeats: int = 7, calls: int = 400) -> float:
    """Median over repeats of the mean time of a call."""
    for _ in range(calls // 4):
        call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - began) / calls * 1e6)
    return statistics.median(times)


def overhead(op: Op, arguments: dict[str, Any]) -> float:
    """Microseconds between the public function and a backend that only returns, chosen by name for the thread."""
    tensors, options = operator_arguments(op.name, arguments)
    result = op.backends["reference"].run(*tensors, **options)
    nothing = lambda *_, **__: result  # noqa: E731
    op.add(
        dataclasses.replace(op.backends["reference"], name="nothing", key="nothing", run=nothing)
    )  # as a built-in backend is
    with use_backend(**{op.name: "nothing"}):
        public = microseconds(lambda: op.function(**arguments))
    return public - microseconds(lambda: nothing(*tensors, **options))


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread; microseconds over the implementation")
    with torch.no_grad():
        for name, op in OPS.items():
            for case in cases(name):
                if "small" in case.tags:
                    print(f"{name:34}{case.name:40}{overhead(op, build(case)):9.1f}")
    seconds = [
        float(subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, check=True).stdout) for _ in range(5)
    ]
    print(f"import torch_mamba_ops after torch: {min(seconds) * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
