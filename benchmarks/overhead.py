"""What a call costs beyond its implementation: ``python benchmarks/overhead.py`` prints microseconds for each operation
(public function, checks, choice and dispatcher, less the reference called directly) and for importing the package.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from torch_mamba_ops.dispatch import OPS
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


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread; microseconds\n{'operation':34}{'public':>9}{'direct':>9}{'over':>7}")
    with torch.no_grad():
        for name, op in OPS.items():
            arguments = build(cases(name)[0])
            tensors, options = operator_arguments(name, arguments)
            reference = op.backends["reference"].run
            public = microseconds(lambda op=op, arguments=arguments: op.function(**arguments))
            direct = microseconds(lambda run=reference, t=tensors, o=options: run(*t, **o))
            print(f"{name:34}{public:9.1f}{direct:9.1f}{public - direct:7.1f}")
    seconds = [
        float(subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, check=True).stdout) for _ in range(5)
    ]
    print(f"import torch_mamba_ops after torch: {min(seconds) * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
