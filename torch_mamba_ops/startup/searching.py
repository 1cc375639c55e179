"""Times the configs of kernels that no table knows, on scratch states, and keeps the best for this card."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torch_mamba_ops import tuning
from torch_mamba_ops.dispatch import OPS
from torch_mamba_ops.startup.running import Job, run
from torch_mamba_ops.startup.scratch import Size
from torch_mamba_ops.tuning import ladder
from torch_mamba_ops.tuning.spaces import space


def search(job: Job, asked: ladder.Lookup, sizes: Sequence[int], device: torch.device) -> str | None:
    """Finds the best configs of a call's kernel, and keeps them.

    Args:
        job: a call of the kernel.
        asked: what it asked for and nothing knew.
        sizes: of batches to time: sequences of a decode step, tokens of one sequence of a prefill.
        device: where it runs.

    Returns:
        What was tuned, or None if there is nothing to choose from.
    """
    configs = space(asked.op, asked.key)
    best: dict[int, dict[str, Any]] = {}
    for size in sorted(sizes, reverse=True) if configs else ():
        sequences = size if job.call.phase == "decode" else 1
        sized = replace(job, size=Size(sequences, size))
        ladder.reread()  # else a call like an earlier one does not ask
        work = next(each.work for each in run(sized, device).lookups if (each.op, each.key) == (asked.op, asked.key))
        if work in best:  # a kernel whose config must not depend on the batch
            continue
        found = _best(sized, asked.op, device, configs)
        if found is not None:
            best[work] = found
    if not best:
        return None
    steps = sorted(best.items())
    entries = [step for i, step in enumerate(steps) if i == 0 or step[1] != steps[i - 1][1]]
    ladder.keep(asked.op, asked.key, device, entries)
    return f"{asked.op} {asked.key}"


def _best(job: Job, op: str, device: torch.device, configs: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest config that is as right as the rule of thumb, ten times over: on sm_90 some configs race."""
    given = job.call.arguments(device, job.size)

    def results(backend: str) -> list[Tensor]:
        """What is returned and what is written."""
        arguments = _copied(given)
        returned = OPS[job.call.op].function(**arguments, backend=backend)
        tensors = (*(returned if isinstance(returned, tuple) else (returned,)), *arguments.values())
        return [tensor.float() for tensor in tensors if isinstance(tensor, Tensor) and tensor.is_floating_point()]

    expected = results("reference")

    def errors() -> list[float]:
        return [float((found - right).norm()) for found, right in zip(results(job.backend), expected, strict=True)]

    allowed = errors()
    scratch = _copied(given)
    times: list[tuple[float, dict[str, Any]]] = []
    for config in configs:
        with tuning.use_config(op, config):
            tries = (errors() for _ in range(10))
            if all(
                error <= 2 * most for found in tries for error, most in zip(found, allowed, strict=True)
            ):  # NaN is not
                times.append((_time(lambda: OPS[job.call.op].function(**scratch, backend=job.backend)), config))
    return min(times, key=lambda timed: timed[0])[1] if times else None


def _copied(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def _time(step: Callable[[], Any]) -> float:
    """Milliseconds on the device, from memory that the cache does not hold."""
    return float(importlib.import_module("triton.testing").do_bench(step, warmup=5, rep=20, return_mode="median"))
