"""The checks of several devices over NCCL: ``torchrun --nproc-per-node 2 benchmarks/distributed_nccl.py``.

Runs what tests/test_distributed.py runs over gloo, a row of the table each, and times states of an 8B model moved from
both GPUs to one. Ends with 1 if a check fails.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

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
        *(("operators", (name, compiled)) for name in OPS for compiled in (False, True)),
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


def reshard_bandwidth(rank: int, size: int) -> str:
    """64 slots of four layers from all GPUs to the first."""
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
    moved = plan.bytes_moved(slots, layers)
    return f"{moved / 1e6:.0f} MB in {min(times) * 1e3:.2f} ms, {moved / min(times) / 1e9:.0f} GB/s"


def main() -> None:
    """Runs all and prints the table on the first process."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device, timeout=timedelta(seconds=120))
    rank, size = dist.get_rank(), dist.get_world_size()
    workers.DEVICE = "cuda"
    integration.enable()
    failed = 0
    if rank == 0:
        print(f"torch {torch.__version__}, NCCL {torch.cuda.nccl.version()}, {size} x {torch.cuda.get_device_name()}")
        print(f"{'check':24} {'of':56} {'seconds':>7}  result")
    for name, arguments in checks():
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
        if rank == 0:
            what = " ".join(getattr(a, "kind", str(a)) for a in arguments)
            print(f"{name:24} {what:56} {seconds:7.2f}  {'FAILED' if found else 'ok'}", flush=True)
            print("".join(found), end="", flush=True)
    bandwidth = reshard_bandwidth(rank, size)
    if rank == 0:
        print(f"reshard of {size} to 1, 64 slots of 4 layers of {NEMOTRON_H_8B.heads} heads: {bandwidth}")
        print(f"{failed} failed" if failed else "all right")
    dist.destroy_process_group()
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
