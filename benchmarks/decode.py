"""Decode steps on a GPU: ours against FlashInfer, vLLM and mamba_ssm, all in one run.

    python benchmarks/decode.py [ssu] [conv] [eager] [layer] [--out decode.csv] [--quick] [--reference] [--dry]

ssu     The selective state update. Time of a call on the device: CUDA graphs of a chain of calls are replayed and timed
        with events; contenders take turns, so that what else the machine does falls on all of them; the median counts.
        A chain goes through as many pools as it takes to touch four times the cache before it comes back to the first.
conv    The causal convolution's step, likewise, with the channels (SD) or the columns (DS) innermost in the pool, and
        once more with a single pool ("warm"), which stays in the cache where it fits.
eager   What a call costs the host, for one sequence: the clock around many calls that do little, without waiting.
layer   A Mamba2 layer's step after its in-projection (convolution, state update, gated norm), of 16 layers in one
        graph, which share nothing, lest the compiler join them: ours compiled with CUDA graphs by torch.compile, also
        with kernels that overlap (``pdl``, Inductor's ``triton.enable_pdl``); vLLM's kernels captured by hand. Each
        step gets other slots; the new indices are copied into the graph's, as CUDA graphs by torch.compile do
        themselves. The time on the device, and that of a loop on the host ("loop"), which hides nothing: the compiled
        step's guards and checks take longer than 16 small layers. In a model they pass while its matrices are read.

A peer that cannot be imported, fails or is wrong is left out, and the reason printed. What is wrong is measured on
fresh inputs against our reference, as the norm of the difference over the norm. ``--dry`` needs no GPU: it builds the
arguments small, runs the reference alone and writes its (meaningless) times.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch_mamba_ops as tmo  # noqa: E402 - of this checkout

MIB = 2**20
ROTATION = 200 * MIB  # four times the cache
BF16, F32 = torch.bfloat16, torch.float32
BATCHES = (1, 4, 16, 64, 128, 256, 512)
CONV_DIM, WIDTH = 10240, 4
WORST = {F32: 1e-3, BF16: 1e-2, torch.float16: 5e-3}  # norm of an error, in results of that dtype

Arguments = dict[str, Any]
Step = Callable[[Arguments], Tensor]


@dataclass(frozen=True)
class Shape:
    """Heads and sizes of a Mamba2 layer."""

    heads: int
    groups: int
    head_dim: int = 64
    state: int = 128

    def __str__(self) -> str:
        return f"H{self.heads} P{self.head_dim} N{self.state} G{self.groups}"


SHAPES = (Shape(128, 8), Shape(48, 1))
LAYERS = 16  # in a graph


@dataclass(frozen=True)
class Contender:
    """An implementation: how to get the function that makes one step of these arguments."""

    name: str
    load: Callable[[], Step]


@dataclass
class Run:
    """What was asked for, and what was found."""

    quick: bool
    dry: bool
    reference: bool
    copy_rate: float = math.nan  # bytes a second, read and written
    rows: list[dict[str, Any]] = field(default_factory=list)
    ratios: dict[str, list[float]] = field(default_factory=dict)
    table: list[str] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def batches(self) -> tuple[int, ...]:
        return (2,) if self.dry else (1, 16, 128) if self.quick else BATCHES

    @property
    def rounds(self) -> int:
        return 1 if self.dry else 7 if self.quick else 21

    def record(
        self, benchmark: str, case: str, batch: int, dtype: str, found: dict[str, float], moved: int | None = None
    ) -> None:
        """Keeps the microseconds of each contender, and a line that compares ours with the best peer."""
        for name, microseconds in found.items():
            percent = _percent(moved, microseconds, self.copy_rate)
            self.rows.append(
                {
                    "benchmark": benchmark,
                    "case": case,
                    "batch": batch,
                    "dtype": dtype,
                    "contender": name,
                    "microseconds": f"{microseconds:.3f}",
                    "bytes": "" if moved is None else moved,
                    "percent_of_copy": "" if percent is None else f"{percent:.1f}",
                    **_machine(self.device),
                    "contender_version": _version(name),
                    "commit": _commit(),
                    "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                }
            )
        ours = {name: took for name, took in found.items() if name.startswith("ours")}
        peers = {name: took for name, took in found.items() if name not in ours and name != "reference"}
        for name, microseconds in (ours or {"": math.nan}).items():
            best = min(peers, key=peers.__getitem__) if peers else "-"
            ratio = peers[best] / microseconds if peers else math.nan
            if not math.isnan(ratio):
                self.ratios.setdefault(f"{benchmark}, {name}", []).append(ratio)
            percent = _percent(moved, microseconds, self.copy_rate)
            self.table.append(
                f"{benchmark:<6}{case:<20}{batch:>5} {dtype:<9}{name:<15}{microseconds:>9.2f}"
                f"{peers.get(best, math.nan):>10.2f} {best:<11}{ratio:>7.3f}"
                + ("" if percent is None else f"{percent:>8.1f}%")
            )
        print(
            f"{benchmark} {case} b={batch} {dtype}: " + ", ".join(f"{n} {t:.2f}" for n, t in found.items()), flush=True
        )


def _percent(moved: int | None, microseconds: float, rate: float) -> float | None:
    if moved is None or math.isnan(rate) or math.isnan(microseconds):
        return None
    return 100 * moved / (microseconds * 1e-6) / rate


# --- contenders ---


def _ours(backend: str, op: str) -> Callable[[], Any]:
    def load() -> Any:
        if backend not in tmo.backends(op):
            raise RuntimeError(f"torch_mamba_ops has no backend {backend!r} of {op} yet")
        return getattr(tmo, op)

    return load


def ssu_ours(backend: str, compiled: bool = False) -> Callable[[], Step]:
    """Our operation, given one value a head where there is one."""

    def load() -> Step:
        update = _ours(backend, "selective_state_update")()

        def step(a: Arguments) -> Tensor:
            result: Tensor = update(
                a["state"], a["x"], a["dt"], a["A"], a["B"], a["C"], a["D"], a["z"], a["dt_bias"], True, a["slots"],
                backend=backend,
            )  # fmt: skip
            return result

        return torch.compile(step, fullgraph=True) if compiled else step

    return load


def ssu_flashinfer() -> Step:
    update = importlib.import_module("flashinfer.mamba").selective_state_update

    def step(a: Arguments) -> Tensor:
        return update(
            a["state"], a["x"], a["dt_full"], a["A_full"], a["B"], a["C"], a["D_full"], z=a["z"],
            dt_bias=a["dt_bias_full"], dt_softplus=True, state_batch_indices=a["slots"], pad_slot_id=-1, out=a["out"],
        )  # fmt: skip

    return step


def ssu_vllm() -> Step:
    update = importlib.import_module("vllm.model_executor.layers.mamba.ops.mamba_ssm").selective_state_update

    def step(a: Arguments) -> Tensor:
        update(
            a["state"], a["x"], a["dt_full"], a["A_full"], a["B"], a["C"], a["D_full"], a["dt_bias_full"], z=a["z"],
            dt_softplus=True, state_batch_indices=a["slots"], null_block_id=-1, out=a["out"],
        )  # fmt: skip
        return a["out"]

    return step


def ssu_mamba_ssm() -> Step:
    update = importlib.import_module("mamba_ssm.ops.triton.selective_state_update").selective_state_update

    def step(a: Arguments) -> Tensor:
        return update(
            a["state"], a["x"], a["dt_full"], a["A_full"], a["B"], a["C"], a["D_full"], z=a["z"],
            dt_bias=a["dt_bias_full"], dt_softplus=True, state_batch_indices=a["slots"],
        )  # fmt: skip

    return step


def conv_ours(backend: str, compiled: bool = False) -> Callable[[], Step]:
    """Our operation."""

    def load() -> Step:
        update = _ours(backend, "causal_conv1d_update")()

        def step(a: Arguments) -> Tensor:
            result: Tensor = update(
                a["x"], a["state"], a["weight"], a["bias"], "silu", None, a["slots"], backend=backend
            )
            return result

        return torch.compile(step, fullgraph=True) if compiled else step

    return load


def conv_vllm() -> Step:
    update = importlib.import_module("vllm.model_executor.layers.mamba.ops.causal_conv1d").causal_conv1d_update

    def step(a: Arguments) -> Tensor:
        return update(
            a["x"], a["state"], a["weight"], a["bias"], "silu", conv_state_indices=a["slots"], null_block_id=-1,
            out=a["out"],
        )  # fmt: skip

    return step


SSU_PEERS = (
    Contender("flashinfer", ssu_flashinfer),
    Contender("vllm", ssu_vllm),
    Contender("mamba_ssm", ssu_mamba_ssm),
)


def _contenders(run: Run, ours: Callable[..., Callable[[], Step]], peers: Iterable[Contender]) -> list[Contender]:
    if run.dry:
        return [Contender("reference", ours("reference"))]
    found = [Contender("ours", ours("triton")), *peers]
    return [*found, Contender("reference", ours("reference", True))] if run.reference else found


def load_all(contenders: list[Contender]) -> dict[str, Step]:
    """Those that can be imported; prints why the others cannot."""
    found = {}
    for contender in contenders:
        with _left_out(contender.name, "cannot be loaded"):
            found[contender.name] = contender.load()
    return found


@contextmanager
def _left_out(name: str, why: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or "no message").splitlines()
        print(f"  left out: {name} {why}: {type(error).__name__}: {' | '.join(reason)[:400]}", flush=True)


# --- arguments ---


def ssu_arguments(shape: Shape, batch: int, state_dtype: torch.dtype, device: torch.device) -> Arguments:
    """One call's: slots drawn from a pool that is larger than the batch."""
    heads, head_dim, state, groups = shape.heads, shape.head_dim, shape.state, shape.groups

    def normal(*size: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    pool = batch + max(1, batch // 4)
    a: Arguments = {
        "state": normal(pool, heads, head_dim, state, dtype=state_dtype),
        "x": normal(batch, heads, head_dim),
        "z": normal(batch, heads, head_dim),
        "B": normal(batch, groups, state),
        "C": normal(batch, groups, state),
        "dt": normal(batch, heads, dtype=F32),
        "A": -torch.rand(heads, device=device) - 1,
        "D": normal(heads, dtype=F32),
        "dt_bias": torch.rand(heads, device=device) - 4,
        "slots": torch.randperm(pool, device=device)[:batch].to(torch.int32),
        "out": torch.full((batch, heads, head_dim), math.nan, device=device, dtype=BF16),
    }
    a["dt_full"] = a["dt"][:, :, None].expand(batch, heads, head_dim)
    a["A_full"] = a["A"][:, None, None].expand(heads, head_dim, state)
    a["D_full"] = a["D"][:, None].expand(heads, head_dim)
    a["dt_bias_full"] = a["dt_bias"][:, None].expand(heads, head_dim)
    return a


def ssu_bytes(shape: Shape, batch: int, state_dtype: torch.dtype) -> int:
    """States read and written, x, z and out, B and C, dt and slots, and what there is once a head."""
    channels = shape.heads * shape.head_dim
    states = 2 * channels * shape.state * state_dtype.itemsize
    tokens = 3 * channels * 2 + 2 * shape.groups * shape.state * 2 + shape.heads * 4 + 4
    return batch * (states + tokens) + 3 * shape.heads * 4


def conv_arguments(batch: int, layout: str, device: torch.device, dim: int = CONV_DIM) -> Arguments:
    """One call's. SD: the channels are innermost in a slot; DS: the columns are."""
    pool = batch + max(1, batch // 4)
    columns = WIDTH - 1
    if layout == "SD":
        state = torch.randn(pool, columns, dim, device=device, dtype=BF16).transpose(1, 2)
    else:
        state = torch.randn(pool, dim, columns, device=device, dtype=BF16)
    return {
        "state": state,
        "x": torch.randn(batch, dim, device=device, dtype=BF16),
        "weight": torch.randn(dim, WIDTH, device=device, dtype=BF16),
        "bias": torch.randn(dim, device=device, dtype=BF16),
        "slots": torch.randperm(pool, device=device)[:batch].to(torch.int32),
        "out": torch.full((batch, dim), math.nan, device=device, dtype=BF16),
    }


def conv_bytes(batch: int, dim: int = CONV_DIM) -> int:
    """Windows read and written, x and out, slots, and the filter once."""
    return batch * (dim * 2 * (2 * (WIDTH - 1) + 2) + 4) + dim * 2 * (WIDTH + 1)


def pools(make: Callable[[], Arguments], touched: int, shared: Iterable[str], dry: bool) -> list[Arguments]:
    """As many sets of arguments as it takes to touch more than the cache holds; the parameters stay the same."""
    first = make()
    count = 1 if dry else max(1, math.ceil(ROTATION / touched))
    return [first, *(make() | {name: first[name] for name in shared} for _ in range(count - 1))]


# --- checks ---


def _copied(a: Arguments) -> Arguments:
    kept = dict(a)
    state = a["state"]
    kept["state"] = torch.empty_strided(state.shape, state.stride(), dtype=state.dtype, device=state.device)
    kept["state"].copy_(state)
    kept["out"] = torch.full_like(a["out"], math.nan)
    return kept


def right(steps: dict[str, Step], make: Callable[[], Arguments], reference: Step) -> dict[str, Step]:
    """Those whose output and states agree with the reference on fresh inputs; prints why the others do not."""
    a = make()
    expected = _copied(a)
    batch = a["x"].shape[0]
    truth = []
    for start in range(0, batch, 64):  # the reference holds a float32 state for each token several times
        part = slice(start, min(start + 64, batch))
        rows = {name: value[part] for name, value in expected.items() if name in ("x", "z", "B", "C", "dt", "slots")}
        truth.append(reference(expected | rows))
    wanted = torch.cat(truth)
    found = {}
    for name, step in steps.items():
        with _left_out(name, "failed"):
            given = _copied(a)
            out = step(given)
            errors = {"output": (out, wanted), "states": (given["state"], expected["state"])}
            wrong = [
                f"{what} off by {error:.1e}"
                for what, (ours, theirs) in errors.items()
                if not (error := _error(ours, theirs)) <= WORST[theirs.dtype]
            ]
            if wrong:
                raise AssertionError("wrong: " + ", ".join(wrong))
            found[name] = step
    return found


def _error(given: Tensor, wanted: Tensor) -> float:
    difference, size = 0.0, 0.0
    for ours, theirs in zip(given, wanted, strict=True):  # row by row: a copy in float64 of a pool would not fit
        difference += float((ours.double() - theirs.double()).square().sum())
        size += float(theirs.double().square().sum())
    return math.sqrt(difference / size)


# --- times ---


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def copy_rate(run: Run) -> float:
    """Bytes a second that a large copy on the device reads and writes."""
    source = torch.randn(MIB * (256 if run.quick else 1024), device=run.device)
    target = torch.empty_like(source)
    times = []
    until = time.perf_counter() + 0.3  # a device that was idle is slower by up to an eighth
    while time.perf_counter() < until or len(times) < 20:
        began, ended = _event(), _event()
        began.record()
        target.copy_(source)
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) * 1e-3)
    return 2 * source.nbytes / statistics.median(times[-10:])


def initial_dt_bias(like: Tensor) -> Tensor:
    """As Mamba initialises it, in float32: steps from a thousandth to a tenth, by the inverse of softplus."""
    step = torch.empty_like(like, dtype=torch.float32).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    return step + torch.log(-torch.expm1(-step))


def device_times(run: Run, steps: dict[str, Step], sets: list[Arguments]) -> dict[str, float]:
    """Microseconds of a call on the device, in a chain that goes through all sets of arguments."""
    if run.dry:
        return {name: _clock(lambda step=step: step(sets[0])) * 1e6 for name, step in steps.items()}
    around = max(1, math.ceil((8 if run.quick else 20) / len(sets)))
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name, step in steps.items():
        with _left_out(name, "cannot be captured"):
            graph = capture(lambda step=step: [step(a) for a in sets], around)
            for a in sets:
                a["out"].fill_(math.nan)
            graph.replay()
            torch.cuda.synchronize()
            graphs[name] = graph
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(run.rounds + 2):
        for name, graph in graphs.items():
            began, ended = _event(), _event()
            began.record()
            graph.replay()
            ended.record()
            ended.synchronize()
            if turn >= 2:
                times[name].append(began.elapsed_time(ended) * 1e3 / (around * len(sets)))
    return {name: statistics.median(found) for name, found in times.items()}


def capture(call: Callable[[], object], repeats: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of some calls, after two that build and load what they need."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph


def _clock(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


# --- benchmarks ---


def ssu(run: Run) -> None:
    """The state update, by shape, batch and dtype of the states."""
    contenders = load_all(_contenders(run, ssu_ours, SSU_PEERS))
    reference = ssu_ours("reference")()
    for shape in SHAPES:
        for state_dtype in (BF16, F32):
            for batch in run.batches:

                def make(shape: Shape = shape, batch: int = batch, dtype: torch.dtype = state_dtype) -> Arguments:
                    return ssu_arguments(shape, batch, dtype, run.device)

                steps = right(contenders, make, reference)
                touched = batch * shape.heads * shape.head_dim * shape.state * state_dtype.itemsize
                sets = pools(make, touched, ("A", "A_full", "D", "D_full", "dt_bias", "dt_bias_full"), run.dry)
                found = device_times(run, steps, sets)
                moved = ssu_bytes(shape, batch, state_dtype)
                run.record("ssu", str(shape), batch, _name(state_dtype), found, moved)
                del sets
                _release(run)


def conv(run: Run) -> None:
    """The convolution's step, by layout and batch."""
    contenders = load_all(_contenders(run, conv_ours, (Contender("vllm", conv_vllm),)))
    reference = conv_ours("reference")()
    for layout in ("SD", "DS"):
        for batch in run.batches:

            def make(batch: int = batch, layout: str = layout) -> Arguments:
                return conv_arguments(batch, layout, run.device)

            steps = right(contenders, make, reference)
            touched = batch * CONV_DIM * 2 * (WIDTH - 1 + 2)  # with x and out: windows are small beside them
            cold = pools(make, touched, ("weight", "bias"), run.dry)
            for case, arguments in (("", cold), (" warm", cold[:1])):
                found = device_times(run, steps, arguments)
                name = f"{layout} D{CONV_DIM} W{WIDTH}{case}"
                run.record("conv", name, batch, _name(BF16), found, None if case else conv_bytes(batch))
            del cold, arguments
            _release(run)


def eager(run: Run) -> None:
    """Host time of a call. Short bursts, so that the queue of the device never fills up."""
    shape = Shape(heads=8, groups=1)
    for what, contenders, make in (
        (
            f"ssu {shape}",
            _contenders(run, ssu_ours, SSU_PEERS),
            lambda: ssu_arguments(shape, 1, F32, run.device),
        ),
        (
            "conv SD D512",
            _contenders(run, conv_ours, (Contender("vllm", conv_vllm),)),
            lambda: conv_arguments(1, "SD", run.device, dim=512),
        ),
    ):
        reference = (ssu_ours if what.startswith("ssu") else conv_ours)("reference")()
        steps = right(load_all(contenders), make, reference)
        arguments = make()
        times: dict[str, list[float]] = {name: [] for name in steps}
        burst = 10 if run.dry else 200
        for turn in range(run.rounds + 2):
            for name, step in steps.items():
                _wait(run)
                began = time.perf_counter()
                for _ in range(burst):
                    step(arguments)
                took = time.perf_counter() - began
                if turn >= 2 or run.dry:
                    times[name].append(took / burst * 1e6)
        run.record("eager", what, 1, "host", {name: statistics.median(found) for name, found in times.items()})


class Layer(torch.nn.Module):
    """What a Mamba2 layer does at each token after its in-projection, by our public functions."""

    def __init__(self, shape: Shape, sequences: int, slots: int, device: torch.device) -> None:
        super().__init__()
        self.shape = shape
        self.inner, self.shared = shape.heads * shape.head_dim, shape.groups * shape.state
        dim = self.inner + 2 * self.shared

        def normal(*size: int, dtype: torch.dtype = BF16) -> Tensor:
            return torch.randn(size, device=device, dtype=dtype)

        for name, tensor in {
            "conv_state": normal(slots, WIDTH - 1, dim).transpose(1, 2),
            "ssm_state": normal(slots, shape.heads, shape.head_dim, shape.state),
            "conv_weight": normal(dim, WIDTH) / 2,
            "conv_bias": normal(dim),
            "A": -torch.rand(shape.heads, device=device) - 1,
            "D": normal(shape.heads, dtype=F32),
            "dt_bias": torch.rand(shape.heads, device=device) - 4,
            "norm_weight": normal(self.inner),
            "output": normal(sequences, shape.groups, self.inner // shape.groups),
            "projected": normal(sequences, 2 * self.inner + 2 * self.shared + shape.heads),
        }.items():
            self.register_buffer(name, tensor)

    def split(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gate, what goes through the convolution, and the step size."""
        gate, mixed, dt = self.projected.split([self.inner, self.inner + 2 * self.shared, self.shape.heads], -1)
        return gate, mixed, dt

    def split_mixed(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, B and C by head and group."""
        x, B, C = mixed.split([self.inner, self.shared, self.shared], -1)
        groups = (self.shape.groups, self.shape.state)
        return (
            x.unflatten(-1, (self.shape.heads, self.shape.head_dim)),
            B.unflatten(-1, groups),
            C.unflatten(-1, groups),
        )

    def forward(self, slots: Tensor) -> None:
        """Writes the output, [batch, groups, inner / groups], where it stays: a model's layers do not return it to the
        host either."""
        gate, mixed, dt = self.split()
        mixed = tmo.causal_conv1d_update(mixed, self.conv_state, self.conv_weight, self.conv_bias, "silu", None, slots)
        x, B, C = self.split_mixed(mixed)
        y = tmo.selective_state_update(self.ssm_state, x, dt, self.A, B, C, self.D, None, self.dt_bias, True, slots)
        normed = tmo.rms_norm_gated(
            y.flatten(1), self.norm_weight, z=gate, group_size=self.inner // self.shape.groups, norm_before_gate=False
        )
        self.output.copy_(normed.view_as(self.output))


class Stack(torch.nn.Module):
    """Layers without what stands between them in a model."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, slots: Tensor) -> None:
        """Writes the output of each."""
        for layer in self.layers:
            layer(slots)


LayerStep = Callable[[Tensor], None]


def layers_vllm(model: Stack) -> LayerStep:
    """The same steps by vLLM's kernels."""
    steps = [_layer_vllm(layer) for layer in model.layers]

    def all_steps(slots: Tensor) -> None:
        for step in steps:
            step(slots)

    return all_steps


def _layer_vllm(layer: Layer) -> LayerStep:
    """The same step by vLLM's kernels, on the same pools and parameters."""
    folder = "vllm.model_executor.layers.mamba.ops"
    update_conv = importlib.import_module(f"{folder}.causal_conv1d").causal_conv1d_update
    update_state = importlib.import_module(f"{folder}.mamba_ssm").selective_state_update
    norm = importlib.import_module(f"{folder}.layernorm_gated")._layer_norm_fwd  # what rms_norm_gated calls
    shape = layer.shape
    channels = (shape.heads, shape.head_dim)
    A = layer.A[:, None, None].expand(*channels, shape.state)
    D, dt_bias = (parameter[:, None].expand(channels) for parameter in (layer.D, layer.dt_bias))

    def step(slots: Tensor) -> None:
        gate, mixed, dt = layer.split()
        mixed = update_conv(
            mixed, layer.conv_state, layer.conv_weight, layer.conv_bias, "silu", conv_state_indices=slots,
            null_block_id=-1, out=torch.empty_like(mixed, memory_format=torch.contiguous_format),
        )  # fmt: skip
        x, B, C = layer.split_mixed(mixed)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        update_state(
            layer.ssm_state, x, dt[:, :, None].expand(-1, *channels), A, B, C, D, dt_bias, dt_softplus=True,
            state_batch_indices=slots, null_block_id=-1, out=y,
        )  # fmt: skip
        norm(
            y.flatten(1), layer.norm_weight, None, 1e-6, z=gate, out=layer.output.flatten(1),
            group_size=layer.inner // shape.groups, norm_before_gate=False, is_rms_norm=True,
        )  # fmt: skip

    return step


def layer(run: Run) -> None:
    """A layer's step: its time on the device, and that of a loop on the host, which may be what limits it."""
    shape = Shape(8, 2) if run.dry else SHAPES[0]
    layers = 2 if run.dry else LAYERS
    for batch in (2,) if run.dry else (1, 16, 64):
        torch._dynamo.reset()
        touched = layers * batch * shape.heads * shape.head_dim * shape.state * 2
        turns = 2 if run.dry else max(2, math.ceil(ROTATION / touched))
        model = Stack(Layer(shape, batch, batch * turns, run.device) for _ in range(layers))
        order = torch.randperm(batch * turns, device=run.device).to(torch.int32)
        slots = list(order.view(turns, batch))
        steps = _layer_steps(run, model, slots)
        device: dict[str, list[float]] = {name: [] for name in steps}
        loop: dict[str, list[float]] = {name: [] for name in steps}
        given = [slots[i % turns] for i in range(2 if run.dry else 30)]
        for turn in range(run.rounds + 2):
            for name, step in steps.items():
                _wait(run)
                began = time.perf_counter()
                _each(step, given)
                _wait(run)
                took = time.perf_counter() - began
                if turn >= 2 or run.dry:
                    loop[name].append(took / len(given) / layers * 1e6)
                    if not run.dry:
                        device[name].append(_on_device(step, given, took) / len(given) / layers * 1e6)
        if not run.dry:
            found = {name: statistics.median(took) for name, took in device.items()}
            run.record("layer", str(shape), batch, _name(BF16), found)
        found = {name: statistics.median(took) for name, took in loop.items()}
        run.record("layer", f"{shape} loop", batch, _name(BF16), found)
        del model, steps
        _release(run)


def _each(step: LayerStep, given: list[Tensor]) -> None:
    for slots in given:
        step(slots)


def _on_device(step: LayerStep, given: list[Tensor], seconds: float) -> float:
    """Seconds on the device of steps that take the host no more than ``seconds``: the device waits meanwhile."""
    began, ended = _event(), _event()
    torch.cuda._sleep(int(4e9 * seconds))  # cycles; some twice as long
    began.record()
    _each(step, given)
    if began.query():
        raise AssertionError("the device did not wait for the host")
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1e3


def _layer_steps(run: Run, model: Stack, slots: list[Tensor]) -> dict[str, LayerStep]:
    """What is right of: compiled with CUDA graphs, with kernels that overlap as well, vLLM's captured by hand."""
    pools_before = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("state")}

    def restore() -> None:
        for name, tensor in pools_before.items():
            model.get_buffer(name).copy_(tensor)

    def reference(slots: Tensor) -> None:
        with tmo.use_backend("reference"):
            model(slots)

    def outputs(step: LayerStep, slots: Tensor) -> Tensor:
        restore()
        step(slots)
        return torch.stack([layer.output for layer in model.layers])

    if run.dry:
        return {"reference": reference}
    candidates: dict[str, Callable[[], LayerStep]] = {
        "ours": lambda: torch.compile(model, mode="reduce-overhead", fullgraph=True),
        "ours-pdl": lambda: torch.compile(
            model, options={"triton.cudagraphs": True, "triton.enable_pdl": True}, fullgraph=True
        ),
        "vllm": lambda: _captured(layers_vllm(model), slots[0]),
    }
    found = {}
    for name, prepare in candidates.items():
        with _left_out(name, "failed"):
            restore()
            step = prepare()
            for _ in range(3):  # compiles, warms up, captures
                step(slots[0])
            for turn in (slots[0], slots[1]):  # the second: other slots must be taken
                if not (error := _error(outputs(step, turn), outputs(reference, turn))) <= 2 * WORST[BF16]:
                    raise AssertionError(f"wrong: output off by {error:.1e}")
            found[name] = step
    return found


def _captured(call: LayerStep, slots: Tensor) -> LayerStep:
    """Replays a CUDA graph of the call. Like torch.compile's it has its own indices, and takes the rest where it is."""
    kept = slots.clone()
    graph = capture(lambda: call(kept))

    def step(slots: Tensor) -> None:
        kept.copy_(slots)
        graph.replay()

    return step


# --- the rest ---


def _wait(run: Run) -> None:
    if not run.dry:
        torch.cuda.synchronize()


def _release(run: Run) -> None:
    if not run.dry:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _machine(device: torch.device) -> dict[str, str]:
    try:
        triton = str(importlib.import_module("triton").__version__)
    except ImportError:
        triton = ""
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "none (dry)"
    return {"gpu": gpu, "torch": torch.__version__, "triton": triton}


def _version(contender: str) -> str:
    module = "torch_mamba_ops" if contender.startswith("ours") or contender == "reference" else contender
    return str(getattr(sys.modules.get(module), "__version__", ""))


def _commit() -> str:
    if given := os.environ.get("BENCH_COMMIT"):  # for a copy of the files without their history
        return given
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


FIELDS = (
    "benchmark", "case", "batch", "dtype", "contender", "microseconds", "bytes", "percent_of_copy", "gpu", "torch",
    "triton", "contender_version", "commit", "date",
)  # fmt: skip
BENCHMARKS = {"ssu": ssu, "conv": conv, "eager": eager, "layer": layer}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the results; called after each benchmark, so that a later failure loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Measures, writes and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", nargs="*", metavar="benchmark", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "decode.csv")
    parser.add_argument("--quick", action="store_true", help="three batches, fewer repeats")
    parser.add_argument("--reference", action="store_true", help="time our compiled reference too")
    parser.add_argument("--dry", action="store_true", help="no GPU: build arguments, run the reference alone")
    options = parser.parse_args()
    chosen = options.benchmarks or list(BENCHMARKS)
    if unknown := [name for name in chosen if name not in BENCHMARKS]:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    if not options.dry and not torch.cuda.is_available():
        parser.error("no CUDA device here; --dry runs without")
    run = Run(options.quick, options.dry, options.reference)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    if run.dry:
        for contenders in (SSU_PEERS, (Contender("vllm", conv_vllm),)):
            print("peers that can be imported: " + ", ".join(load_all(list(contenders))))
    else:
        run.copy_rate = copy_rate(run)
        print(f"{torch.cuda.get_device_name()}: a copy moves {run.copy_rate * 1e-12:.3f} TB/s, read and written")
        _release(run)
    for name in chosen:
        with _left_out(f"benchmark {name}", "stopped"):
            BENCHMARKS[name](run)
        write(options.out, run.rows)
    print(
        f"\n{'':<6}{'case':<20}{'batch':>5} {'dtype':<9}{'':<15}{'ours us':>9}{'best peer':>10} {'':<11}{'faster':>7}"
    )
    print("\n".join(run.table))
    for name, ratios in run.ratios.items():
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        print(f"{name}: {mean:.3f} times as fast as the best peer (geometric mean of {len(ratios)})")
    print(f"copy {run.copy_rate * 1e-12:.3f} TB/s; written to {options.out}")


if __name__ == "__main__":
    main()
