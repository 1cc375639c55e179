"""The selective scan's prefill (Mamba1) on a GPU: ours against mamba_ssm and vLLM, all in one run.

    python benchmarks/prefill_scan.py [--out prefill_scan.csv] [--quick] [--cases NAME ...] [--sweep] [--dry]

Time of a call on the device: CUDA graphs are replayed and timed with events, contenders take turns, the median counts.
Calls go through more inputs than the cache holds. Memory is as models have it: ``conv``, where u and delta lie token
by token innermost and the gate, B and C are slices of projections; ``projection``, where all are; ``tokens``, where
none is. The peers take the last and copy the others first, which is in their time. The first case also times our
reference as torch.compile makes it.

What a contender gets wrong is measured against our float32 reference, as the norm of the difference over the norm; one
that is wrong or fails is left out, and the reason printed. ``--sweep`` times our kernel with each of many configs
instead, after ten calls of each that must be right and the same to the last bit, and prints them from the fastest on,
and then the best ones as a table of `torch_mamba_ops.tuning`. ``--dry`` needs no GPU: small arguments, the reference
alone, meaningless times.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import decode  # noqa: E402 - its clock, its table, its CSV

import torch_mamba_ops as tmo  # noqa: E402 - of this checkout
from torch_mamba_ops import tuning  # noqa: E402

BF16 = torch.bfloat16
OP = "selective_scan_fn"
TRANSPOSED = {"tokens": (), "conv": ("z", "B", "C"), "projection": ("u", "delta", "z", "B", "C")}
PARAMETERS = ("A", "D", "delta_bias")
Arguments = dict[str, Any]
Step = Callable[[Arguments], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Problem:
    """A prefill of ``batch`` sequences of ``length`` tokens."""

    name: str
    dim: int
    length: int
    memory: str = "conv"
    batch: int = 1
    state: int = 16
    reference: bool = False  # whether it is timed, compiled

    @property
    def bytes(self) -> int:
        """u, delta, z and out, B and C, the parameters, and the last state."""
        tokens = self.batch * self.length * 2 * (4 * self.dim + 2 * self.state)
        return tokens + 4 * self.dim * (self.state + 2) + 4 * self.batch * self.dim * self.state

    def arguments(self, device: torch.device) -> Arguments:
        """One call's, and what peers need of their own."""

        def tokens(name: str, channels: int) -> Tensor:
            if name in TRANSPOSED[self.memory]:
                return torch.randn(self.batch, self.length, channels, device=device, dtype=BF16).mT
            return torch.randn(self.batch, channels, self.length, device=device, dtype=BF16)

        a: Arguments = {
            "u": tokens("u", self.dim),
            "delta": tokens("delta", self.dim),
            "A": -torch.rand(self.dim, self.state, device=device) * self.state - 0.1,
            "B": tokens("B", self.state),
            "C": tokens("C", self.state),
            "D": torch.randn(self.dim, device=device),
            "z": tokens("z", self.dim),
            "delta_bias": torch.rand(self.dim, device=device) * 4 - 7,
            "out": torch.empty(0, device=device),  # nothing writes it
        }
        a["vllm_z"] = a["z"].clone()  # overwritten by the result
        a["vllm_states"] = torch.zeros(self.batch, self.dim, self.state, device=device)
        return a


PROBLEMS = (
    Problem("D8192_4k", 8192, 4096, reference=True),
    Problem("D8192_4k_projection", 8192, 4096, "projection"),
    Problem("D8192_4k_tokens", 8192, 4096, "tokens"),
    Problem("D8192_512", 8192, 512),
    Problem("D8192_32k", 8192, 32768),
    Problem("D8192_8x1k", 8192, 1024, batch=8),
    Problem("D5120_4k", 5120, 4096),
    Problem("D1536_4k", 1536, 4096),
)


def ours(backend: str | None) -> Step:
    """Our operation."""

    def step(a: Arguments) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = tmo.selective_scan_fn(
            a["u"], a["delta"], a["A"], a["B"], a["C"], a["D"], a["z"], a["delta_bias"], True, True, backend=backend
        )
        return result

    return step


def compiled_reference() -> Step:
    """Ours in torch, as Inductor compiles it for these very sizes."""
    torch._dynamo.reset()
    return torch.compile(ours("reference"), fullgraph=True, dynamic=False)


def mamba_ssm() -> Step:
    """mamba_ssm's CUDA kernel, with what its interface does around it. Only the extension need be installed."""
    forward = importlib.import_module("selective_scan_cuda").fwd

    def step(a: Arguments) -> tuple[Tensor, Tensor]:
        u, delta, z = (a[name].contiguous() for name in ("u", "delta", "z"))
        B, C = (a[name].contiguous()[:, None] for name in ("B", "C"))
        _, states, out = forward(u, delta, a["A"], B, C, a["D"], z, a["delta_bias"], True)
        return out, states[:, :, -1, 1::2]  # of each of its chunks: products of decays, states

    return step


def vllm() -> Step:
    """vLLM's descendant of that kernel. It writes over the gate and the states."""
    scan = importlib.import_module("vllm.model_executor.layers.mamba.ops.mamba_ssm").selective_scan_fn

    def step(a: Arguments) -> tuple[Tensor, Tensor]:
        out = scan(
            a["u"], a["vllm_states"], a["delta"], a["A"], a["B"][:, None], a["C"][:, None], D=a["D"], z=a["vllm_z"],
            delta_bias=a["delta_bias"], delta_softplus=True,
        )  # fmt: skip
        return out, a["vllm_states"]

    return step


def contenders(run: decode.Run) -> dict[str, Step]:
    """Ours and the peers that can be imported; prints why the others cannot."""
    if run.dry:
        return {"reference": ours("reference")}
    peers = [decode.Contender("mamba_ssm", mamba_ssm), decode.Contender("vllm", vllm)]
    return {"ours": ours("triton"), **decode.load_all(peers)}


def right(run: decode.Run, problem: Problem, steps: dict[str, Step], calls: int = 1) -> dict[str, Step]:
    """Those whose output and last state agree with the reference, and are the same at every call; prints how the others
    are not."""
    # As divisible by 16 as the problem is, for which Triton compiles anew; not by every config's tile.
    a = replace(problem, length=min(problem.length, 304)).arguments(run.device)
    wanted = ours("reference")(a)
    found = {}
    for name, step in steps.items():
        with decode._left_out(name, "failed"):
            given = [
                step(a | {"vllm_z": a["z"].clone(), "vllm_states": torch.zeros_like(a["vllm_states"])})
                for _ in range(calls)
            ]
            errors = [decode._error(got, want) for got, want in zip(given[0], wanted, strict=True)]
            if not (errors[0] <= decode.WORST[BF16] and errors[1] <= decode.WORST[torch.float32]):
                raise AssertionError(f"wrong: output off by {errors[0]:.1e}, last state by {errors[1]:.1e}")
            if not all(torch.equal(got, first) for other in given for got, first in zip(other, given[0], strict=True)):
                raise AssertionError(f"not the same at each of {calls} calls")
            found[name] = step
    return found


def configs(problem: Problem) -> list[dict[str, int]]:
    """Those that leave a thread a sensible number of a tile's values."""
    found = []
    for block_d, block_t, warps in itertools.product((8, 16, 32, 64), (4, 8, 16, 32, 64), (1, 2, 4, 8)):
        values = block_d * block_t * problem.state // (32 * warps)
        if 16 <= values <= 128 and block_d * block_t <= 512 * warps and 32 * warps <= block_d * problem.state:
            found.append({"BLOCK_D": block_d, "BLOCK_T": block_t, "num_warps": warps})
    return found


def with_config(config: dict[str, int]) -> Step:
    """Our operation with a config."""
    ours_here = ours("triton")

    def step(a: Arguments) -> tuple[Tensor, Tensor]:
        with tuning.use_config(OP, config):
            return ours_here(a)

    return step


def measure(run: decode.Run, problem: Problem) -> None:
    """Ours and the others; keeps the results."""
    steps = right(run, problem, contenders(run))
    if problem.reference and not run.dry:
        steps["reference"] = compiled_reference()
    found = decode.device_times(run, steps, argument_sets(run, problem))
    run.record("scan", problem.name, problem.batch, "bfloat16", found, problem.bytes)


def sweep(run: decode.Run, problem: Problem) -> dict[str, int] | None:
    """Times each config of ours; returns the best one."""
    steps = {json.dumps(config): with_config(config) for config in configs(problem)}
    steps |= {"as it is": ours("triton")}
    found = decode.device_times(run, right(run, problem, steps, calls=10), argument_sets(run, problem))
    fastest = sorted((name for name in found if name != "as it is"), key=found.__getitem__)
    for name in ("as it is", *fastest[:10]):
        print(f"{problem.name:<20}{found.get(name, math.nan):>10.1f} us {name}", flush=True)
    return json.loads(fastest[0]) if fastest else None


def argument_sets(run: decode.Run, problem: Problem) -> list[Arguments]:
    return decode.pools(lambda: problem.arguments(run.device), problem.bytes, PARAMETERS, run.dry)


def main() -> None:
    """Measures, writes and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "prefill_scan.csv")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--cases", nargs="*", default=[p.name for p in PROBLEMS], metavar="NAME")
    parser.add_argument("--sweep", action="store_true", help="every config of ours; nothing is written")
    parser.add_argument("--dry", action="store_true", help="no GPU: small arguments, the reference alone")
    options = parser.parse_args()
    if unknown := set(options.cases) - {p.name for p in PROBLEMS}:
        parser.error(f"no case {min(unknown)!r}; there are {', '.join(p.name for p in PROBLEMS)}")
    if not options.dry and not torch.cuda.is_available():
        parser.error("no CUDA device here; --dry runs without")
    if options.dry and options.sweep:
        parser.error("--sweep times our kernel, which --dry cannot run")
    run = decode.Run(options.quick, options.dry, False)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    if not run.dry:
        run.copy_rate = decode.copy_rate(run)
    best: dict[int, dict[str, int] | None] = {}
    for problem in (p for p in PROBLEMS if p.name in options.cases):
        decode._release(run)
        if options.sweep:
            config = sweep(run, problem)
            best.setdefault(problem.dim, config)
            continue
        measure(run, replace(problem, dim=64, length=40) if run.dry else problem)
        decode.write(options.out, run.rows)
    if options.sweep:
        entries = [[dim, config] for dim, config in sorted(best.items()) if config is not None]
        print(f"for the table: {json.dumps({OP: {'bfloat16 N16': entries}})}")
        return
    print(
        f"\n{'':<6}{'case':<20}{'batch':>5} {'dtype':<9}{'':<15}{'ours us':>9}{'best peer':>10} {'':<11}{'faster':>7}"
    )
    print("\n".join(run.table))
    for name, ratios in run.ratios.items():
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"{name}: {mean:.3f} times as fast as the best peer (geometric mean of {len(ratios)})")
    print(f"copy {run.copy_rate * 1e-12:.3f} TB/s; written to {options.out}")


if __name__ == "__main__":
    main()
