"""The prefill of the causal convolution on a GPU: ours, vLLM's, causal_conv1d's, the compiled reference, in one run.

    python benchmarks/prefill_conv.py [--out prefill_conv.csv] [--quick] [--cases NAME ...] [--sweep]

Time of a call on the device: CUDA graphs of a chain of calls are replayed and timed with events; contenders take turns,
the median counts. A chain goes through as many sets of inputs as it takes to touch four times the cache. What a
contender gets wrong is measured against our float32 reference, as the norm of the difference over the norm; one that is
wrong or fails is left out, and the reason printed. vLLM's table of programs is made beforehand and not timed; ours
needs none. causal_conv1d knows no packed sequences: it gets them as a dense batch, since here they are equally long.

``--sweep`` times our kernel with each of many configs instead, and prints them from the fastest on.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import decode  # noqa: E402 - its clock, its table, its CSV

import torch_mamba_ops as tmo  # noqa: E402 - of this checkout
from torch_mamba_ops import tuning  # noqa: E402

BF16 = torch.bfloat16
WIDTH = 4
WORST = 1e-2  # norm of an error
Arguments = dict[str, Any]
Step = Callable[[Arguments], Tensor]


@dataclass(frozen=True)
class Problem:
    """``sequences`` of ``length`` tokens each.

    Packed in one row of tokens, with a pool of windows that is read and written; or ``dense``: a batch with the tokens
    innermost and no windows. ``row``: x is a slice of rows of so many channels, as of a projection. ``DS``: the pool's
    columns are innermost, not its channels.
    """

    name: str
    length: int
    sequences: int
    dim: int = 10240
    row: int = 0
    dense: bool = False
    DS: bool = False

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def bytes(self) -> int:
        """x and out, the windows read and written, and the filter."""
        windows = 0 if self.dense else 2 * self.sequences * (WIDTH - 1)
        return 2 * self.dim * (2 * self.tokens + windows + WIDTH + 1)

    def arguments(self, device: str = "cuda") -> Arguments:
        """One call's, with room for what vLLM wants to know of the batch."""

        def normal(*size: int) -> Tensor:
            return torch.randn(size, device=device, dtype=BF16)

        filters = {"weight": normal(self.dim, WIDTH), "bias": normal(self.dim)}
        if self.dense:
            x = normal(self.sequences, self.dim, self.length)
            return {**filters, "x": x, "out": torch.full_like(x, math.nan)}
        x = normal(self.tokens, self.row or self.dim)[:, : self.dim].t()
        states = normal(self.sequences, WIDTH - 1, self.dim).transpose(1, 2)
        return {
            **filters,
            "x": x,
            "states": states.contiguous() if self.DS else states,
            "starts": torch.arange(0, self.tokens + 1, self.length, device=device, dtype=torch.int32),
            "slots": torch.arange(self.sequences, device=device, dtype=torch.int32),
            "known": torch.ones(self.sequences, device=device, dtype=torch.bool),
            "vllm": self._vllm_metadata(device),
            "out": torch.full_like(x, math.nan),
        }

    def _vllm_metadata(self, device: str, block: int = 8) -> Any:
        """The sequence of each program and the block of 8 tokens it has there."""
        blocks = math.ceil(self.length / block)
        program = torch.arange(self.sequences * blocks, device=device, dtype=torch.int32)
        sequence, offset = program // blocks, program % blocks
        table = {
            "tot": len(program),
            "mlist": sequence,
            "mlist_len": len(program),
            "offsetlist": offset,
            "batch_ptr": sequence,
            "token_chunk_offset_ptr": offset,
        }
        return SimpleNamespace(nums_dict={block: table}, batch_ptr=sequence, token_chunk_offset_ptr=offset)


PROBLEMS = (
    Problem("4x16k", 16384, 4),
    Problem("1x8k", 8192, 1),
    Problem("16x512", 512, 16),
    Problem("dense_4x16k", 16384, 4, dense=True),
)
WIDER = (
    Problem("256x32", 32, 256),
    Problem("1x512", 512, 1),
    Problem("4x16k_DS", 16384, 4, DS=True),
    Problem("4x8k_of_16768", 8192, 4, dim=8448, row=16768),
    Problem("D3584_4x8k", 8192, 4, dim=3584),
    Problem("dense_8x2k", 2048, 8, dense=True),
)


def ours(problem: Problem, backend: str, compiled: bool = False) -> Step:
    """Our operation."""

    def dense(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return tmo.causal_conv1d_fn(x, weight, bias, activation="silu", backend=backend)

    def packed(
        x: Tensor, weight: Tensor, bias: Tensor, states: Tensor, starts: Tensor, slots: Tensor, known: Tensor
    ) -> Any:
        return tmo.causal_conv1d_varlen_fn(
            x, weight, bias, states, starts, cache_indices=slots, has_initial_state=known, activation="silu",
            backend=backend,
        )  # fmt: skip

    names = ("x", "weight", "bias") if problem.dense else ("x", "weight", "bias", "states", "starts", "slots", "known")
    call: Any = dense if problem.dense else packed
    if compiled:
        call = torch.compile(call, fullgraph=True, dynamic=False)

    def step(a: Arguments) -> Tensor:
        a["out"] = call(*(a[name] for name in names))
        result: Tensor = a["out"]
        return result

    return step


def vllm(problem: Problem) -> Step:
    """vLLM's, which knows packed sequences alone."""
    convolve = importlib.import_module("vllm.model_executor.layers.mamba.ops.causal_conv1d").causal_conv1d_fn
    if problem.dense:
        raise RuntimeError("it takes packed sequences, with the channels innermost")

    def step(a: Arguments) -> Tensor:
        a["out"] = convolve(
            a["x"], a["weight"], a["bias"], a["states"], a["starts"], cache_indices=a["slots"],
            has_initial_state=a["known"], activation="silu", null_block_id=-1, metadata=a["vllm"],
        )  # fmt: skip
        result: Tensor = a["out"]
        return result

    return step


def causal_conv1d(problem: Problem) -> Step:
    """The CUDA kernels of the package of that name."""
    convolve = importlib.import_module("causal_conv1d").causal_conv1d_fn

    def dense(a: Arguments) -> Tensor:
        a["out"] = convolve(a["x"], a["weight"], a["bias"], activation="silu")
        result: Tensor = a["out"]
        return result

    def packed(a: Arguments) -> Tensor:
        rows = a["x"].t().unflatten(0, (problem.sequences, -1)).transpose(1, 2)
        out, final = convolve(
            rows, a["weight"], a["bias"], initial_states=a["states"], return_final_states=True, activation="silu"
        )
        a["states"].copy_(final)
        a["out"] = out.transpose(1, 2).flatten(0, 1).t()
        result: Tensor = a["out"]
        return result

    return dense if problem.dense else packed


def contenders(problem: Problem) -> dict[str, Step]:
    """Those that can be imported; prints why the others cannot."""
    return decode.load_all(
        [
            decode.Contender("ours", lambda: ours(problem, "triton")),
            decode.Contender("vllm", lambda: vllm(problem)),
            decode.Contender("causal_conv1d", lambda: causal_conv1d(problem)),
            decode.Contender("reference", lambda: ours(problem, "reference", compiled=True)),
        ]
    )


def checked(problem: Problem, device: str = "cuda") -> tuple[Callable[[], Arguments], Arguments]:
    """A short problem of the same kind: a maker of fresh copies of its arguments, and what must come of them."""
    a = replace(problem, length=min(problem.length, 2000)).arguments(device)

    def fresh() -> Arguments:
        return a if problem.dense else a | {"states": _copied(a["states"])}

    expected = dict(fresh())
    ours(problem, "reference")(expected)
    return fresh, expected


def _copied(states: Tensor) -> Tensor:
    return torch.empty_strided(states.shape, states.stride(), dtype=states.dtype, device=states.device).copy_(states)


RESULTS = ("out", "states")  # those of them that there are


def errors(given: Arguments, wanted: Arguments) -> list[float]:
    """Of the results, as norms."""
    pairs = [(given[name].float(), wanted[name].float()) for name in RESULTS if name in wanted]
    return [float((one - other).norm() / other.norm()) for one, other in pairs]


def right(problem: Problem, steps: dict[str, Step], device: str = "cuda") -> dict[str, Step]:
    """Those that agree with the reference; prints by how much."""
    fresh, wanted = checked(problem, device)
    found = {}
    for name, step in steps.items():
        with decode._left_out(name, "failed"):
            given = dict(fresh())
            step(given)
            off = errors(given, wanted)
            print(f"  {problem.name} {name}: off by {', '.join(f'{error:.1e}' for error in off)}")
            if not max(off) <= WORST:
                raise AssertionError("wrong")
            found[name] = step
    return found


def configs(problem: Problem) -> Iterator[dict[str, Any]]:
    """Those worth trying for 16-bit numbers: 8 or 4 channels a thread, or some channels' vectors of 8 tokens."""
    if problem.dense:
        for channels, vectors, warps in itertools.product((1, 2, 4, 8, 16, 32), (16, 32, 64, 128), (2, 4, 8)):
            if 1 <= channels * vectors / (32 * warps) <= 4:
                yield {"BLOCK_D": channels, "BLOCK_T": 8 * vectors, "num_warps": warps}
        return
    for (vector, unroll), warps, tokens in itertools.product(
        ((8, 2), (8, 4), (4, 2), (4, 4), (4, 8)), (1, 2, 4, 8), (32, 64, 128, 256)
    ):
        yield {"BLOCK_D": 32 * warps * vector, "BLOCK_T": tokens, "UNROLL": unroll, "num_warps": warps}


def sweep(problem: Problem) -> None:
    """Our kernel with every config that is right and has the same bits ten times over."""
    fresh, wanted = checked(problem)
    sets = decode.pools(problem.arguments, problem.bytes, ("weight", "bias"), False)
    step = ours(problem, "triton")
    found: list[tuple[float, dict[str, Any]]] = []
    for config in configs(problem):
        try:
            with tuning.use_config("causal_conv1d_varlen_fn", config):
                repeat(step, fresh, wanted)
                found.append((time_of(step, sets), config))
        except Exception as reason:  # wrong, or more registers or shared memory than there are
            print(f"  {config}: {type(reason).__name__}: {str(reason)[:90]}")
    for took, config in sorted(found, key=lambda pair: pair[0])[:12]:
        print(f"{problem.name:<16}{took:>9.1f} us {config}", flush=True)


def repeat(step: Step, fresh: Callable[[], Arguments], wanted: Arguments) -> None:
    """Raises an AssertionError unless ten calls are right and give the same bits."""
    first: Arguments = {}
    for _ in range(10):
        given = dict(fresh())
        step(given)
        first = first or given
        if not max(errors(given, wanted)) <= WORST:
            raise AssertionError(f"off by {errors(given, wanted)}")
        if not all(torch.equal(given[name], first[name]) for name in RESULTS if name in given):
            raise AssertionError("other bits than before")


def time_of(step: Step, sets: list[Arguments]) -> float:
    """Microseconds of a call in a chain that goes through all sets."""
    graph = decode.capture(lambda: [step(a) for a in sets], 2)
    times = []
    for _ in range(9):
        began, ended = decode._event(), decode._event()
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) * 1e3 / (2 * len(sets)))
    return statistics.median(times[2:])


def main() -> None:
    """Measures, writes and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "prefill_conv.csv")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--cases", nargs="*", default=[p.name for p in PROBLEMS])
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    known = {problem.name: problem for problem in (*PROBLEMS, *WIDER)}
    if unknown := [name for name in options.cases if name not in known]:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(map(repr, known))}")
    run = decode.Run(options.quick, False, False)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    run.copy_rate = decode.copy_rate(run)
    print(f"{torch.cuda.get_device_name()}: a copy moves {run.copy_rate * 1e-12:.3f} TB/s, read and written")
    for name in options.cases:
        problem = known[name]
        torch._dynamo.reset()
        decode._release(run)
        if options.sweep:
            sweep(problem)
            continue
        steps = right(problem, contenders(problem))
        sets = decode.pools(problem.arguments, problem.bytes, ("weight", "bias"), False)
        found = decode.device_times(run, steps, sets)
        run.record("conv", problem.name, problem.sequences, "bfloat16", found, problem.bytes)
        decode.write(options.out, run.rows)
    print("\n".join(run.table))
    print(f"copy {run.copy_rate * 1e-12:.3f} TB/s")


if __name__ == "__main__":
    main()
