"""Every variant that serving can reach, compiled and tuned before the first request, on scratch states."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from torch_mamba_ops import settings
from torch_mamba_ops.dispatch import OPS
from torch_mamba_ops.startup.batches import Limits, sizes, sizes_of_levels
from torch_mamba_ops.startup.calls import Call, calls_of
from torch_mamba_ops.startup.compiles import Compiles, count_compiles
from torch_mamba_ops.startup.layers import Layers, layers_of
from torch_mamba_ops.startup.preparing import SAMPLE, describe, device_of, dtype_of, explained
from torch_mamba_ops.startup.running import Done, Job, run_all
from torch_mamba_ops.startup.scratch import Size
from torch_mamba_ops.startup.searching import search
from torch_mamba_ops.tuning import cache, ladder

if TYPE_CHECKING:
    from torch_mamba_ops.startup.layers import Given

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SMALL = 1024  # tokens; of larger calls fewer are made at a time, for their memory
_log = logging.getLogger("torch_mamba_ops")


@dataclass(frozen=True)
class WarmupReport:
    """What `warmup` did.

    Attributes:
        device: where.
        seconds: all of it.
        calls: (operation and variant, calls made, seconds of them in all threads).
        compiled: kernels compiled from source.
        loaded: kernels read from Triton's disk cache.
        tuned: kernels and keys whose configs were searched for, which the next process reads from ``cache_dir``.
        memory: bytes that torch took from the device for it. They are free, and torch keeps them for what comes next
            (``torch.cuda.empty_cache`` gives them back).
        cache_dir: where configs are kept.
        skipped: what was not warmed, and why.
    """

    device: str
    seconds: float = 0.0
    calls: tuple[tuple[str, int, float], ...] = ()
    compiled: int = 0
    loaded: int = 0
    tuned: tuple[str, ...] = ()
    memory: int = 0
    cache_dir: str = ""
    skipped: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """The one line that is logged."""
        count = sum(made for _, made, _ in self.calls)
        text = (
            f"warm-up on {self.device}: {count} calls in {self.seconds:.1f} s, {self.compiled} kernels compiled, "
            f"{self.loaded} from the cache, {len(self.tuned)} tuned, {self.memory / 2**20:.0f} MiB"
        )
        return text + (f"; skipped: {'; '.join(self.skipped)}" if self.skipped else "")

    def __str__(self) -> str:
        lines = [f"  {name}: {made} calls, {seconds:.2f} s" for name, made, seconds in self.calls]
        lines += [f"  tuned {name}, kept in {self.cache_dir}" for name in self.tuned]
        return "\n".join([self.summary, *lines])


def warmup(
    layers: Given,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    max_tokens: int = 8192,
    tuning: Literal["table", "search"] | None = None,
    workers: int | None = None,
    progress: bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    strict: bool = False,
) -> WarmupReport:
    """Compiles, and tunes if asked to, every variant of the operations that serving these layers can reach.

    Decode steps run at each batch size, and at those where a kernel's config changes or its numbers are compiled apart;
    prefills with and without initial states, whose final states are returned or written to a pool; copies of states.
    All run on random scratch tensors; no state of the model is touched, and random numbers drawn later are those that
    would have been drawn without. Kernels compile in parallel threads. Layers of one kind are warmed once. On a CPU
    each variant runs once.

    Args:
        layers: a model (its states dense, as Hugging Face transformers keep them), its configuration, or the
            `MambaStateSpec` of its layers (states in pools): one, several, or by index.
        device: where; None: where the model is, else the GPU if there is one.
        dtype: of activations and parameters; None: the model's, else that of the convolution's states.
        batch_sizes: sequences of a decode step; smaller ones are warmed too, larger ones not.
        max_tokens: of one prefill, all sequences together.
        tuning: ``"table"`` or ``"search"``, see `settings.Settings`; None: as set there.
        workers: threads that compile; None: one for each processor, at most 8; one on a CPU.
        progress: whether to show a bar on stderr; None: if that is a terminal.
        cache_dir: where configs found here are kept, in this process from now on; None:
            ``TORCH_MAMBA_OPS_CACHE_DIR``, else ``~/.cache/torch_mamba_ops``. One that cannot be read or written is
            warned about once.
        strict: raise for layers that are not known and for calls that no backend can run, which are otherwise
            ``skipped`` in the report.

    Returns:
        A printable report with times and memory. Its summary is the one line that is logged; without such layers
        nothing is.

    Raises:
        ValueError: a batch size, ``max_tokens`` or ``workers`` is not positive, ``tuning`` is none of the two; with
            ``strict``, what is skipped.
        TypeError: ``layers`` are none of those.
    """
    began = time.perf_counter()
    limits = Limits(batch_sizes, max_tokens)
    if workers is not None and workers < 1:
        raise ValueError(f"workers: got {workers}, expected a positive number or None")
    policy = settings.current().tuning if tuning is None else settings.Settings(tuning=tuning).tuning
    if cache_dir is not None:
        cache.use_folder(cache_dir)
        ladder.reread()
    found = layers_of(layers)
    place = device_of(found, device)
    jobs, skipped = _jobs(found, place, dtype, limits)
    if strict and skipped:
        raise ValueError("; ".join(skipped))
    report = WarmupReport(str(place), cache_dir=str(cache.folder()), skipped=skipped)
    if jobs:
        show = sys.stderr.isatty() if progress is None else progress
        report = _run(jobs, place, limits, policy, workers, show, report)
    report = replace(report, seconds=time.perf_counter() - began)
    if jobs or skipped:
        _log.info(report.summary)
    return report


def _jobs(
    layers: Layers, device: torch.device, dtype: torch.dtype | None, limits: Limits
) -> tuple[list[list[Job]], tuple[str, ...]]:
    """What there is to run, the batches of each call; and what is skipped with the reason."""
    jobs, skipped = [], [layers.unknown] if layers.unknown else []
    for spec, _ in layers.counts:
        for call in calls_of(spec, dtype_of(layers, spec, dtype), pooled=layers.pooled):
            name = f"{call.op}, {call.variant} ({describe(spec)})"
            told = explained(call, device, SAMPLE)
            if told.chosen is None:
                skipped.append(f"{name}: {told.why}")
                continue
            few = (
                layers.pooled
                and explained(call, device, replace(SAMPLE, few_slots=True), told.chosen).chosen is not None
            )
            batches = sizes(call.phase, limits, device, few_slots=few)
            jobs.append([Job(name, call, size, _backend(call, size, device) or told.chosen) for size in batches])
    return jobs, tuple(skipped)


def _backend(call: Call, size: Size, device: torch.device) -> str | None:
    """What a table's preference, which depends on the size, makes of the choice."""
    return explained(call, device, size).chosen if OPS[call.op].swayed else None


def _run(
    jobs: list[list[Job]],
    device: torch.device,
    limits: Limits,
    policy: str,
    workers: int | None,
    show: bool,
    report: WarmupReport,
) -> WarmupReport:
    """Makes each call once, to learn which configs it asks for; tunes those that nothing knows; then makes all calls,
    also at the sizes where configs change."""
    on_gpu = device.type == "cuda"
    threads = workers or (min(8, os.cpu_count() or 1) if on_gpu else 1)
    held = torch.cuda.memory_reserved(device) if on_gpu else 0
    tuned: list[str] = []
    ladder.reread()  # calls whose plans are kept would not ask for configs
    with (
        torch.cuda.device(device.index if on_gpu else -1),
        torch.random.fork_rng([device.index] if on_gpu else []),
        count_compiles() if on_gpu else contextlib.nullcontext(Compiles()) as compiles,
    ):
        smallest = [batches[0] for batches in jobs]
        done = learned = run_all(smallest, device, threads, show)
        if policy == "search":
            tuned = _search(learned, limits, device)
            if tuned:
                learned = run_all(smallest, device, threads, show)
                done = done + learned
        rest = [job for batches in jobs for job in batches[1:]]
        for each in learned:
            levels = sizes_of_levels(each.job.call.phase, limits, each.job.size, each.lookups)
            rest += [replace(each.job, size=size) for size in levels]
        # Equal sizes of different calls side by side: threads that meet the same kernel at once compile it twice.
        rest = sorted(dict.fromkeys(rest), key=lambda job: (job.size.tokens, job.size.sequences))
        small = [job for job in rest if job.size.tokens <= _SMALL]
        done = done + run_all(small, device, threads, show)
        done = done + run_all(rest[len(small) :], device, max(1, threads // 4), show)
    return replace(
        report,
        calls=_totals(done),
        compiled=len(compiles.compiled),
        loaded=len(compiles.loaded),
        tuned=tuple(tuned),
        memory=torch.cuda.memory_reserved(device) - held if on_gpu else 0,
    )


def _search(learned: list[Done], limits: Limits, device: torch.device) -> list[str]:
    """Tunes what was asked for and is not known."""
    missing = {
        (asked.op, asked.key): (each.job, asked) for each in learned for asked in each.lookups if not asked.levels
    }
    found = [search(job, asked, limits.amounts(job.call.phase)[::2], device) for job, asked in missing.values()]
    return [name for name in found if name is not None]


def _totals(done: list[Done]) -> tuple[tuple[str, int, float], ...]:
    totals: dict[str, tuple[int, float]] = {}
    for each in done:
        count, seconds = totals.get(each.job.name, (0, 0.0))
        totals[each.job.name] = (count + 1, seconds + each.seconds)
    return tuple((name, count, seconds) for name, (count, seconds) in totals.items())
