"""The checks of several devices over NCCL:

    torchrun --standalone --nproc-per-node 2 benchmarks/distributed_nccl.py [--checks NAME ...] [--part K/N | --time]
        [--out CSV]

Runs what tests/test_distributed.py runs over gloo, a row of the table each, then times states of an 8B model moved from
all GPUs to one. Ends with 1 if a check fails. Most of a run is compiling the kernels of the operators' small cases: N
runs at once, each with a ``--part`` (0/N, 1/N, ...) of the checks and none of the timing, share that.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import decode  # its columns of the machine and the commit
import distributed_workers as workers

from torch_mamba_ops.dispatch import OPS
from torch_mamba_ops.distributed import ReshardPlan
from torch_mamba_ops.integrations import transformers as integration
from torch_mamba_ops.state.spec import MambaStateSpec

SMALL = MambaStateSpec.mamba2(8, 4, 16, groups=2, conv_dtype="bfloat16", conv_layout="DS")
NEMOTRON_H_8B = MambaStateSpec.mamba2(128, 64, 128, groups=8, conv_dtype="bfloat16", conv_layout="DS")


def checks() -> list[tuple[str, tuple[Any, ...]]]:
    """Each check with its arguments."""
    differentiable = [name for name, op in OPS.items() if op.differentiable]
    mixers = sorted(workers._SIZES)
    return [
        *(("operators", (name, compiled)) for compiled in (False, True) for name in OPS),
        *(("gradients", (name,)) for name in differentiable),
        ("two_dimensions", ()),
        ("states_are_never_moved", ()),
        *(("mixer", (name, groups, False, {})) for name in mixers for groups in (1, 2)),
        *(("mixer", ("bamba", groups, True, {})) for groups in (1, 2)),
        *(("model", (name,)) for name in mixers),
        *(("mixer_gradients", ("bamba", groups)) for groups in (1, 2)),
        *(("reshard", (SMALL, [0, 1], [1], layouts)) for layouts in ("DS DS", "SD DS")),
        *(("reshard", (SMALL, [1], [0, 1], layouts)) for layouts in ("SD SD", "DS SD")),
        *(("prefill_then_decode", (groups, "SD")) for groups in (1, 4)),
    ]


def reshard_time(rank: int, size: int) -> tuple[int, float]:
    """Bytes moved and seconds: 64 slots of four layers from all GPUs to the first."""
    slots, layers, device = 64, 4, workers.DEVICE
    part = MambaStateSpec.mamba2(128, 64, 128, groups=8, conv_dtype="bfloat16", tensor_parallel_size=size)

    def pools(spec: MambaStateSpec) -> list[tuple[torch.Tensor, torch.Tensor]]:
        assert spec.ssm_shape is not None
        return [
            (
                torch.randn(slots, *spec.conv_shape, device=device).to(spec.conv_dtype),
                torch.randn(slots, *spec.ssm_shape, device=device),
            )
            for _ in range(layers)
        ]

    plan = ReshardPlan(NEMOTRON_H_8B, tuple(range(size)), (0,))
    everything = torch.arange(slots, device=device)
    given: dict[str, Any] = {"source": pools(part), "source_slots": everything}
    if rank == 0:
        given |= {"target": pools(NEMOTRON_H_8B), "target_slots": everything}
    times = []
    for _ in range(6):
        dist.barrier()
        torch.cuda.synchronize()
        began = time.perf_counter()
        plan.run(**given)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return plan.bytes_moved(slots, layers), min(times)


def main() -> None:
    """Runs all and prints the table on the first process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", nargs="*", metavar="NAME", help="such as gradients; default: all")
    less = parser.add_mutually_exclusive_group()
    less.add_argument("--part", help="K/N: the K-th of N parts of the checks, and no timing")
    less.add_argument("--time", action="store_true", help="no checks")
    parser.add_argument("--out", type=Path, help="a CSV that gets the rows")
    given = parser.parse_args()
    part, parts = map(int, (given.part or "0/1").split("/"))
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device, timeout=timedelta(seconds=120))
    rank, size = dist.get_rank(), dist.get_world_size()
    workers.DEVICE, workers.BACKEND = "cuda", "triton"
    integration.enable()
    rows: list[dict[str, str]] = []

    def tell(check: str, of: str, seconds: float, result: str) -> None:
        if rank == 0:
            print(f"{check:24} {of:56} {seconds:8.3f}  {result}", flush=True)
            rows.append({"check": check, "of": of, "seconds": f"{seconds:.4f}", "result": result.partition("\n")[0]})

    failed = 0
    if rank == 0:
        print(f"torch {torch.__version__}, NCCL {torch.cuda.nccl.version()}, {size} x {torch.cuda.get_device_name()}")
        print(f"{'check':24} {'of':56} {'seconds':>8}  result")
    wanted = [check for check in checks() if given.checks is None or check[0] in given.checks]
    for name, arguments in () if given.time else wanted[part::parts]:
        began, wrong = time.perf_counter(), ""
        try:
            getattr(workers, name)(rank, size, *arguments)
        except Exception:
            wrong = traceback.format_exc()
        seconds = time.perf_counter() - began
        told: list[str] = [""] * size
        dist.all_gather_object(told, wrong)
        found = [text for text in told if text]
        failed += bool(found)
        what = " ".join(getattr(a, "kind", str(a)) for a in arguments)
        tell(name, what, seconds, "FAILED\n" + "".join(found) if found else "ok")
    if not given.part:
        moved, seconds = reshard_time(rank, size)
        what = f"{size} devices to 1, 64 slots of 4 layers of {NEMOTRON_H_8B.heads} heads"
        tell("reshard_time", what, seconds, f"{moved / 1e6:.0f} MB, {moved / seconds / 1e9:.0f} GB/s")
    if rank == 0:
        print(f"{failed} failed" if failed else "all right")
    if rows and given.out:
        machine = {**decode._machine(device), "devices": size, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
        with given.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *machine, "commit"])
            writer.writeheader()
            writer.writerows({**row, **machine, "commit": decode._commit()} for row in rows)
    dist.destroy_process_group()
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
