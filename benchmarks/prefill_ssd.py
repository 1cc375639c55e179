"""The state space dual scan's prefill on a GPU: ours against vLLM and mamba_ssm, all in one run.

    python benchmarks/prefill_ssd.py [--out prefill_ssd.csv] [--quick] [--cases NAME ...] [--sweep TABLE]

Time of a call on the device: CUDA graphs are replayed and timed with events, contenders take turns, the median counts.
The inputs of one call are larger than the cache. What a contender gets wrong is measured against our float32 reference,
as the norm of the difference over the norm; one that is wrong or fails is left out, and the reason printed. vLLM's
metadata of a packed batch is made beforehand and not timed; ours is made in the kernel.

``--sweep`` times our kernel with each of many configs instead, prints them from the fastest on, and writes those into a
table like the shipped one, whose other entries it keeps.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import decode  # noqa: E402 - its clock, its table, its CSV
import tune  # noqa: E402 - its way to write a table

import torch_mamba_ops as tmo  # noqa: E402 - of this checkout
from torch_mamba_ops import tuning  # noqa: E402
from torch_mamba_ops.tuning.spaces import space  # noqa: E402

BF16, F32 = torch.bfloat16, torch.float32
OP = "mamba_chunk_scan_combined"
Arguments = dict[str, Any]
Step = Callable[[Arguments], Tensor]


@dataclass(frozen=True)
class Problem:
    """A prefill of ``sequences`` of ``length`` tokens, from states and to states of a pool if ``pool``. Heads decay
    little in a chunk or, if ``steep``, as Mamba2 initialises them: some forget all within a few tokens."""

    name: str
    heads: int
    groups: int
    length: int
    sequences: int = 1
    pool: bool = False
    head_dim: int = 64
    state: int = 128
    chunk: int = 256
    steep: bool = False

    @property
    def key(self) -> str:
        """In the tables of configs."""
        return tuning.key_of(BF16, P=self.head_dim, N=self.state)

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def bytes(self) -> int:
        """x and out, B and C, dt, and the states written (and read)."""
        token = 2 * self.heads * self.head_dim * 2 + 2 * self.groups * self.state * 2 + 2 * self.heads
        states = self.sequences * self.heads * self.head_dim * self.state * 4 * (2 if self.pool else 1)
        return self.tokens * token + states

    def shortened(self) -> Problem:
        """The same for few tokens, to check results with."""
        return replace(self, length=min(self.length, 2048), sequences=min(self.sequences, 4))

    def arguments(self) -> Arguments:
        """x, B and C are slices of one projection, as models pass them."""
        inner, shared = self.heads * self.head_dim, self.groups * self.state
        row = torch.randn(self.tokens, inner + 2 * shared, device="cuda", dtype=BF16)
        x, B, C = row.split([inner, shared, shared], -1)
        starts = torch.arange(0, self.tokens + 1, self.length, device="cuda", dtype=torch.int32)
        rate, bias = torch.rand(self.heads, device="cuda") + 1, torch.rand(self.heads, device="cuda") - 4
        if self.steep:
            rate = torch.empty_like(rate).uniform_(1, 16)
            bias = decode.initial_dt_bias(bias)
        return {
            "x": x.unflatten(-1, (self.heads, self.head_dim)),
            "dt": torch.randn(self.tokens, self.heads, device="cuda", dtype=BF16),
            "A": -rate,
            "B": B.unflatten(-1, (self.groups, self.state)),
            "C": C.unflatten(-1, (self.groups, self.state)),
            "D": torch.randn(self.heads, device="cuda"),
            "dt_bias": bias,
            "cu_seqlens": starts,
            "states": torch.randn(self.sequences, self.heads, self.head_dim, self.state, device="cuda"),
            "has_initial_state": torch.full((self.sequences,), self.pool, device="cuda"),
            "out": torch.full((self.tokens, self.heads, self.head_dim), math.nan, device="cuda", dtype=BF16),
            "vllm": {chunk: self._vllm_metadata(starts, chunk) for chunk in (128, 256)},
        }

    def _vllm_metadata(self, starts: Tensor, chunk: int) -> dict[str, Tensor]:
        bounds = [s + c for s in starts[:-1].tolist() for c in range(0, self.length, chunk)] + [self.tokens]
        a_sequence = math.ceil(self.length / chunk)
        sequence = torch.arange(self.sequences, device="cuda", dtype=torch.int32)
        return {
            "cu_chunk_seqlens": torch.tensor(bounds, device="cuda", dtype=torch.int32),
            "last_chunk_indices": (sequence + 1) * a_sequence - 1,
            "seq_idx": sequence.repeat_interleave(a_sequence),
        }


PROBLEMS = (
    Problem("H128_G8_8k", 128, 8, 8192),
    Problem("H128_G8_64k", 128, 8, 65536),
    Problem("H80_G1_64k", 80, 1, 65536),
    Problem("H128_G8_16x512", 128, 8, 512, sequences=16, pool=True),
    Problem("H128_G8_8k_steep", 128, 8, 8192, steep=True),
)
WIDER = (
    Problem("H128_P80_8k", 128, 8, 8192, head_dim=80),
    Problem("H128_P80_16x512", 128, 8, 512, sequences=16, pool=True, head_dim=80),
    Problem("H24_P128_N256_8k", 24, 1, 8192, head_dim=128, state=256),
    Problem("H24_P128_N256_16x512", 24, 1, 512, sequences=16, pool=True, head_dim=128, state=256),
    Problem("H112_N64_8k", 112, 2, 8192, state=64),
    Problem("H112_N64_16x512", 112, 2, 512, sequences=16, pool=True, state=64),
    Problem("H48_G1_8k", 48, 1, 8192),
    Problem("H128_G8_4x2k", 128, 8, 2048, sequences=4, pool=True),
    Problem("H128_G8_64x128", 128, 8, 128, sequences=64, pool=True),
)


def ours(backend: str) -> Step:
    """Our operation over the pool."""

    def step(a: Arguments) -> Tensor:
        a["out"] = tmo.mamba_chunk_scan_combined_varlen(
            a["x"], a["dt"], a["A"], a["B"], a["C"], 256, a["cu_seqlens"], D=a["D"], dt_bias=a["dt_bias"],
            dt_softplus=True, states=a["states"], has_initial_state=a["has_initial_state"], backend=backend,
        )  # fmt: skip
        return a["out"]

    return step


def vllm(problem: Problem, chunk: int) -> Step:
    """vLLM's chain of kernels; it gathers initial states by slot and writes final ones there."""
    scan = importlib.import_module("vllm.model_executor.layers.mamba.ops.ssd_combined").mamba_chunk_scan_combined_varlen

    def step(a: Arguments) -> Tensor:
        out = torch.empty_like(a["x"], memory_format=torch.contiguous_format)
        states = scan(
            a["x"], a["dt"], a["A"], a["B"], a["C"], chunk, a["cu_seqlens"], **a["vllm"][chunk], out=out, D=a["D"],
            dt_bias=a["dt_bias"], initial_states=a["states"] if problem.pool else None, dt_softplus=True,
            state_dtype=F32,
        )  # fmt: skip
        a["states"].copy_(states)
        return out

    return step


def mamba_ssm(problem: Problem) -> Step:
    """mamba_ssm's, on a dense batch."""
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")._mamba_chunk_scan_combined_fwd

    def step(a: Arguments) -> Tensor:
        rows = {name: a[name].unflatten(0, (problem.sequences, -1)) for name in ("x", "dt", "B", "C")}
        out, *_, final = scan(
            rows["x"], rows["dt"], a["A"], rows["B"], rows["C"], problem.chunk, D=a["D"], dt_bias=a["dt_bias"],
            initial_states=a["states"] if problem.pool else None, dt_softplus=True,
        )  # fmt: skip
        a["states"].copy_(final)
        return out.flatten(0, 1)

    return step


def contenders(problem: Problem) -> dict[str, Step]:
    """Those that can be imported; prints why the others cannot."""
    return decode.load_all(
        [
            decode.Contender("ours", lambda: ours("triton")),
            decode.Contender("vllm", lambda: vllm(problem, 256)),
            decode.Contender("vllm_q128", lambda: vllm(problem, 128)),
            decode.Contender("mamba_ssm", lambda: mamba_ssm(problem)),
        ]
    )


def _error(given: Tensor, wanted: Tensor) -> float:
    return float((given.float() - wanted.float()).norm() / wanted.float().norm())


def right(problem: Problem, steps: dict[str, Step]) -> dict[str, Step]:
    """Those whose output and states agree with the reference; prints by how much."""
    a = problem.shortened().arguments()
    expected = a | {"states": a["states"].clone()}
    wanted = ours("reference")(expected)
    found = {}
    for name, step in steps.items():
        with decode._left_out(name, "failed"):
            given = a | {"states": a["states"].clone()}
            errors = _error(step(given), wanted), _error(given["states"], expected["states"])
            print(f"  {problem.name} {name}: output off by {errors[0]:.1e}, states by {errors[1]:.1e}")
            if not max(errors) < 1e-2:
                raise AssertionError("wrong")
            found[name] = step
    return found


def configs(problem: Problem) -> list[dict[str, Any]]:
    """Those to try; blocks of 16 channels have never won."""
    return [config for config in space(OP, problem.key) if config["BLOCK_P"] > 16]


def _tried(problem: Problem, config: dict[str, Any]) -> str:
    """Runs the kernel a few times; what is wrong with it, if anything. Compiles it for other processes, too."""
    try:
        a = problem.shortened().arguments()
        wanted = ours("reference")(a | {"states": a["states"].clone()})
        with tuning.use_config(OP, config):
            errors = [_error(ours("triton")(a | {"states": a["states"].clone()}), wanted) for _ in range(10)]
    except Exception as reason:  # shared memory, registers: not a config for this card
        return f"{type(reason).__name__}: {str(reason)[:90]}"
    return "" if max(errors) < 1e-2 else f"off by {max(errors):.1e} (at best {min(errors):.1e})"


def sweep(problems: Sequence[Problem], out: Path, workers: int = 12) -> None:
    """Our kernel with every config that fits: compiled and checked by several processes, timed by this one. The
    fastest for each amount of work goes into a table (see ``tuning.ladder``)."""
    pairs = [(problem, config) for problem in problems for config in configs(problem)]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        wrong = list(pool.map(_tried, *zip(*pairs, strict=True)))
    works: dict[str, dict[int, list[dict[str, float]]]] = {}
    for problem in problems:
        found: dict[str, float] = {}
        a = problem.arguments()
        for (of, config), reason in zip(pairs, wrong, strict=True):
            if of == problem and reason:
                print(f"  {problem.name} {config}: {reason}")
            elif of == problem:
                found[json.dumps(config)] = _seconds(config, a) * 1e6
        for config, took in sorted(found.items(), key=lambda pair: pair[1]):
            print(f"{problem.name:<18}{took:>9.1f} us {config}", flush=True)
        works.setdefault(problem.key, {}).setdefault(problem.sequences * problem.heads, []).append(found)
        del a
        torch.cuda.empty_cache()
    table = json.loads(out.read_text()) if out.exists() else {}
    table.setdefault(OP, {}).update({key: _ladder(by_work) for key, by_work in works.items()})
    out.write_text(tune.readable(table))
    print(f"written to {out}")


def _seconds(config: dict[str, Any], a: Arguments) -> float:
    step, before = ours("triton"), a["states"].clone()
    with tuning.use_config(OP, config):
        graph = decode.capture(lambda: step(a), 3)
    times = []
    for _ in range(7):
        a["states"].copy_(before)
        began, ended = decode._event(), decode._event()
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) * 1e-3 / 3)
    return statistics.median(times)


def _ladder(by_work: dict[int, list[dict[str, float]]]) -> list[tuple[int, dict[str, Any]]]:
    """The config for each amount of work that is nearest to the fastest of its problems, where it is another one."""
    entries: list[tuple[int, dict[str, Any]]] = []
    for work, problems in sorted(by_work.items()):
        shared = set.intersection(*map(set, problems))
        best = min(shared, key=lambda config: math.prod(found[config] / min(found.values()) for found in problems))
        if not entries or entries[-1][1] != json.loads(best):
            entries.append((work, json.loads(best)))
    return entries


def main() -> None:
    """Measures, writes and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "prefill_ssd.csv")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--cases", nargs="*", help="default: PROBLEMS; with --sweep, all but steep ones")
    parser.add_argument("--sweep", type=Path, metavar="TABLE", help="write a table of configs, <card>.json")
    options = parser.parse_args()
    run = decode.Run(options.quick, False, False)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    run.copy_rate = decode.copy_rate(run)
    every = (*PROBLEMS, *WIDER)
    usual = [problem for problem in every if not problem.steep] if options.sweep else PROBLEMS
    cases = options.cases or [problem.name for problem in usual]
    problems = [problem for problem in every if problem.name in cases]
    if options.sweep:
        sweep(problems, options.sweep)
        return
    for problem in problems:
        torch.cuda.empty_cache()
        steps = right(problem, contenders(problem))
        a = problem.arguments()
        found = decode.device_times(run, steps, [a])
        run.record("ssd", problem.name, problem.sequences, "bfloat16", found, problem.bytes)
        decode.write(options.out, run.rows)
    print("\n".join(run.table))
    print(f"copy {run.copy_rate * 1e-12:.3f} TB/s")


if __name__ == "__main__":
    main()
