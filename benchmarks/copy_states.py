"""Copies of states on a GPU against the bandwidth of a large copy, which they cannot exceed.

    python benchmarks/copy_states.py [--out copy_states.csv] [--quick]

Time of a call on the device: CUDA graphs are replayed and timed with events, contenders take turns, the median counts.
A call moves more than the cache holds. The bar is 80% of the copy's bandwidth for 64 slots of H=128 P=64 N=128 float32.
Every contender's result is compared with plain indexing first; one that is wrong or fails is left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import decode  # noqa: E402 - its clock, its table, its CSV

import torch_mamba_ops as tmo  # noqa: E402 - of this checkout
from torch_mamba_ops.state import MambaStateSpec, StateCopyPlan, StatePool  # noqa: E402

BAR = 80.0
TOKENS = 5  # of a step with drafts


@dataclass(frozen=True)
class Problem:
    """Copies of ``copies`` slots of ``layers`` layers; ``what`` is ``"pool"``, one tensor of SSM states and no windows,
    ``"plan"``, all states of a `StatePool`, or ``"commit"``, accepted tokens' states and windows of one."""

    name: str
    what: str
    copies: int
    layers: int = 1
    heads: int = 128
    groups: int = 8
    head_dim: int = 64
    state: int = 128
    dtype: torch.dtype = torch.float32
    layout: str = "SD"

    def spec(self) -> MambaStateSpec:
        """Of a layer."""
        return MambaStateSpec.mamba2(
            self.heads, self.head_dim, self.state, groups=self.groups, conv_dtype=torch.bfloat16, ssm_dtype=self.dtype,
            conv_layout=self.layout, speculative_tokens=TOKENS - 1 if self.what == "commit" else 0,
        )  # fmt: skip


PROBLEMS = (
    Problem("bar_64_float32", "pool", 64),
    Problem("64_bfloat16", "pool", 64, dtype=torch.bfloat16),
    Problem("8_float32", "pool", 8),
    Problem("nemotron_h_8b_SD_16", "plan", 16, layers=24),
    Problem("nemotron_h_8b_DS_16", "plan", 16, layers=24, layout="DS"),
    Problem("nemotron_h_8b_1", "plan", 1, layers=24),
    Problem("accepted_SD_16", "commit", 16, layers=6),
    Problem("accepted_DS_16", "commit", 16, layers=6, layout="DS"),
)


@dataclass(frozen=True)
class Made:
    """A problem's contenders, the tensors that they write, and the bytes that a call reads and writes."""

    steps: dict[str, Callable[[], object]]
    written: list[Tensor]
    moved: int


def build(problem: Problem) -> Made:
    """Slots are drawn at random; no slot is both read and written, but by the commit, which is in place."""
    slots = torch.randperm(2 * problem.copies, device="cuda").int()
    src, dst = slots[: problem.copies].contiguous(), slots[problem.copies :].contiguous()
    if problem.what == "pool":
        states = torch.randn(2 * problem.copies, problem.heads, problem.head_dim, problem.state, device="cuda")
        states = states.to(problem.dtype)
        steps = {
            "ours": lambda: tmo.copy_states(states, states, src, dst, backend="triton"),
            "index": lambda: states.index_copy_(0, dst.long(), states[src.long()]),
        }
        return Made(steps, [states], 2 * problem.copies * states[0].nbytes)
    pool = StatePool([problem.spec()] * problem.layers, 2 * problem.copies, device="cuda")
    pool.words.random_()
    if problem.what == "plan":
        plan = StateCopyPlan(pool, backend="triton")
        steps = {
            "ours": lambda: plan.copy(src, dst),
            "index": lambda: pool.words.index_copy_(0, dst.long(), pool.words[src.long()]),
        }
        return Made(steps, [pool.words], 2 * problem.copies * pool.page_bytes)
    buffer = pool.intermediate(problem.copies, TOKENS)
    buffer.states.random_()
    accepted = torch.randint(1, TOKENS + 1, (problem.copies,), device="cuda", dtype=torch.int32)
    plans = {
        name: StateCopyPlan(pool, intermediate=buffer, backend=backend)
        for name, backend in (("ours", "triton"), ("index", "reference"))
    }
    steps = {name: (lambda plan=plan: plan.commit(src, dst, accepted)) for name, plan in plans.items()}
    assert pool.states is not None
    moved = 2 * problem.copies * (pool.states[0].nbytes + pool.windows[0].nbytes)  # all columns counted as moved
    return Made(steps, [pool.words], moved)


def right(problem: Problem, made: Made) -> dict[str, Callable[[], object]]:
    """Those that leave behind what plain indexing does."""
    before = [tensor.clone() for tensor in made.written]
    made.steps["index"]()
    wanted = [tensor.clone() for tensor in made.written]
    found = {}
    for name, step in made.steps.items():
        with decode._left_out(name, "failed"):
            for tensor, old in zip(made.written, before, strict=True):
                tensor.copy_(old)
            step()
            if not all(torch.equal(given, want) for given, want in zip(made.written, wanted, strict=True)):
                raise AssertionError(f"{problem.name}: wrong")
            found[name] = step
    return found


def device_times(run: decode.Run, steps: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Microseconds of a call on the device."""
    repeats = 4 if run.quick else 10
    graphs = {name: decode.capture(step, repeats) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(run.rounds + 2):
        for name, graph in graphs.items():
            began, ended = decode._event(), decode._event()
            began.record()
            graph.replay()
            ended.record()
            ended.synchronize()
            if turn >= 2:
                times[name].append(began.elapsed_time(ended) * 1e3 / repeats)
    return {name: sorted(found)[len(found) // 2] for name, found in times.items()}


def main() -> None:
    """Measures, writes and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "copy_states.csv")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--cases", nargs="*", default=[problem.name for problem in PROBLEMS])
    options = parser.parse_args()
    run = decode.Run(options.quick, False, False)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    run.copy_rate = decode.copy_rate(run)
    for problem in (problem for problem in PROBLEMS if problem.name in options.cases):
        torch.cuda.empty_cache()
        made = build(problem)
        steps = right(problem, made)
        found = device_times(run, steps)
        run.record(problem.what, problem.name, problem.copies, str(problem.dtype)[6:], found, made.moved)
        decode.write(options.out, run.rows)
        if problem.name.startswith("bar") and "ours" in found:
            percent = decode._percent(made.moved, found["ours"], run.copy_rate) or 0.0
            verdict = "met" if percent >= BAR else "MISSED"
            print(f"{problem.name}: {percent:.1f}% of a copy's bandwidth, bar {BAR}%: {verdict}")
        del made, steps
    print("\n".join(run.table))
    print(f"copy {run.copy_rate * 1e-12:.3f} TB/s")


if __name__ == "__main__":
    main()
