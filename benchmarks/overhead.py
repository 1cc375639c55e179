"""What a call costs the host beyond its implementation: ``python benchmarks/overhead.py [steps] [cases] [import]``.

steps   The two decode steps at batch 1 (8 heads; 512 channels), as ``decode.py eager`` calls them, piece by piece: the
        long way of a first call, and the short way of one like an earlier one. On a GPU by the backend that is chosen
        there, elsewhere around a backend that does nothing.
cases   Microseconds of each operation, case by case since each option costs its own checks: the public function around
        a backend that does nothing, less that backend called directly. Once the long way, and as repeated calls are.
import  Milliseconds for importing the package.

All are the best of many bursts: what else the machine does can only add.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from decode import F32, Shape, conv_arguments, ssu_arguments

from torch_mamba_ops import use_backend
from torch_mamba_ops.dispatch import OPS, Op
from torch_mamba_ops.ops import launch
from torch_mamba_ops.testing import build, cases
from torch_mamba_ops.testing.check import operator_arguments

IMPORT = "import time, torch; began = time.perf_counter(); import torch_mamba_ops; print(time.perf_counter() - began)"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def microseconds(call: Callable[[], object], bursts: int = 60, calls: int = 100) -> float:
    """Mean time of a call in the best burst. Bursts are short, so that the queue of a GPU never fills up."""
    best = float("inf")
    for _ in range(bursts):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, time.perf_counter() - began)
    return best / calls * 1e6


def overhead(op: Op, arguments: dict[str, Any]) -> tuple[float, float]:
    """Microseconds between the public function and a backend that only returns, chosen by name for the thread: the long
    way, and as repeated calls are."""
    tensors, options = operator_arguments(op.name, arguments)
    nothing = add_nothing(op, tensors, options)
    with use_backend(**{op.name: "nothing"}):
        repeated = microseconds(lambda: op.function(**arguments))
        whole = microseconds(lambda: long_way(op)(**arguments))
    nothing_itself = microseconds(lambda: nothing(*tensors, **options))
    return whole - nothing_itself, repeated - nothing_itself


def add_nothing(op: Op, tensors: tuple[Any, ...], options: dict[str, Any]) -> Callable[..., Any]:
    """A backend that returns what it returned before, registered as a built-in one is."""
    result = op.backends["reference"].run(*tensors, **options)
    nothing = lambda *_, **__: result  # noqa: E731
    op.add(dataclasses.replace(op.backends["reference"], name="nothing", key="nothing", run=nothing))
    return nothing


def long_way(op: Op) -> Callable[..., Any]:
    """The public function without the memory of earlier calls, where it has one."""
    return getattr(op.function, "__wrapped__", op.function)


def decode_steps() -> dict[str, dict[str, Any]]:
    """Arguments of one call of each."""
    state = ssu_arguments(Shape(heads=8, groups=1), 1, F32, DEVICE)
    window = conv_arguments(1, "SD", DEVICE, dim=512)
    return {
        "selective_state_update": {
            **{name: state[name] for name in ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")},
            "dt_softplus": True,
            "state_batch_indices": state["slots"],
        },
        "causal_conv1d_update": {
            **{name: window[name] for name in ("x", "weight", "bias")},
            "conv_state": window["state"],
            "activation": "silu",
            "conv_state_indices": window["slots"],
        },
    }


def pieces(op: Op, arguments: dict[str, Any]) -> dict[str, float]:
    """Microseconds of the parts of a call, and of the whole call by either way."""
    tensors, options = operator_arguments(op.name, arguments)
    nothing = add_nothing(op, tensors, options)
    nothing_itself = microseconds(lambda: nothing(*tensors, **options))
    with use_backend(**{op.name: "nothing"}):
        called = microseconds(lambda: op.overload(*tensors, **options, backend="nothing"))
        by_name = microseconds(lambda: op.choose(None, tensors, options))
        whole = microseconds(lambda: long_way(op)(**arguments))
    found = {
        "checks": whole - by_name - called,
        "choice": microseconds(lambda: op.choose(None, tensors, options)),
        "dispatcher": called - nothing_itself,
    }
    name = op.choose(None, tensors, options).partition("@")[0] if DEVICE.type == "cuda" else "nothing"
    with use_backend(**{op.name: name}):
        found[f"backend {name}"] = microseconds(lambda: op.backends[name].run(*tensors, **options))
        found["long way"] = microseconds(lambda: long_way(op)(**arguments))
        found["short way"] = microseconds(lambda: op.function(**arguments))
    if kept := list(launch._started.values()):
        out = torch.empty_like(arguments["x"])
        addresses = [tensor.data_ptr() for tensor in (*tensors, out) if tensor is not None]
        found["output, in both"] = microseconds(lambda: torch.empty_like(out))
        found["launcher, in both"] = microseconds(lambda: kept[-1].start(out.device.index, addresses))
    return found


def main() -> None:
    """Prints what was asked for, or all."""
    asked = sys.argv[1:] or ["steps", "cases", "import"]
    torch.set_num_threads(1)
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {where}, one thread; microseconds")
    with torch.no_grad():
        for name, arguments in decode_steps().items() if "steps" in asked else ():
            print(name)
            for piece, took in pieces(OPS[name], arguments).items():
                print(f"  {piece:32}{took:9.1f}")
        if "cases" in asked:
            print(f"{'over the implementation':74}{'first':>9}{'repeated':>9}")
        for name, op in OPS.items() if "cases" in asked else ():
            for case in cases(name):
                first, repeated = overhead(op, build(case))
                print(f"{name:34}{case.name:40}{first:9.1f}{repeated:9.1f}")
    if "import" in asked:
        command = [sys.executable, "-c", IMPORT]
        seconds = [float(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(5)]
        print(f"import torch_mamba_ops after torch: {min(seconds) * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
