"""Makes calls on scratch tensors, many at once: Triton compiles outside of Python's lock."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import torch

from torch_mamba_ops.dispatch import OPS
from torch_mamba_ops.startup.calls import Call
from torch_mamba_ops.startup.scratch import Size
from torch_mamba_ops.tuning import ladder


@dataclass(frozen=True)
class Job:
    """A call to make, and the backend that makes it."""

    name: str
    call: Call
    size: Size
    backend: str


@dataclass(frozen=True)
class Done:
    """What a call took, and the configs it asked for."""

    job: Job
    seconds: float
    lookups: tuple[ladder.Lookup, ...]


def run_all(jobs: Sequence[Job], device: torch.device, workers: int, progress: bool) -> list[Done]:
    """Makes the calls in ``workers`` threads; what one raises is raised, and the calls not yet begun are not made."""
    done: list[Done] = []
    with ThreadPoolExecutor(workers) as pool:
        try:
            for future in as_completed([pool.submit(run, job, device) for job in jobs]):
                done.append(future.result())
                if progress:
                    end = "\n" if len(done) == len(jobs) else ""
                    line = f"warm-up {len(done)}/{len(jobs)} {done[-1].job.name}"
                    print(f"\r\033[K{line[:120]}", end=end, file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return done


def run(job: Job, device: torch.device) -> Done:
    """Makes one call."""
    began = time.perf_counter()
    with torch.no_grad(), torch.cuda.device(device.index if device.type == "cuda" else -1), ladder.watch() as lookups:
        OPS[job.call.op].function(**job.call.arguments(device, job.size), backend=job.backend)
    return Done(job, time.perf_counter() - began, tuple(lookups))
