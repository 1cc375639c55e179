"""The selective scan's Triton kernel: tiles of every size, any memory, one sequence's bits in every batch, its limits.

The operation's own cases run in test_triton.py (interpreted, compiled) and test_ops.py (on a GPU).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_mamba_ops as tmo
from torch_mamba_ops import tuning
from torch_mamba_ops.dispatch import OPS
from torch_mamba_ops.testing import build, cases, check
from torch_mamba_ops.testing.check import operator_arguments

pytest.importorskip("triton")

import test_triton

OP = "selective_scan_fn"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
plans = test_triton.plans


def _run(program: str, *arguments: str) -> None:
    """In a process of its own: Triton's interpreter is chosen before Triton is imported."""
    environment = dict(os.environ) | ({"TRITON_INTERPRET": "1"} if "cpu" in arguments else {})
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# --- the arithmetic ---

TILES = """
import json, sys, torch, torch_mamba_ops as tmo
from torch_mamba_ops.testing import check
from torch_mamba_ops.tuning import use_config

device, config = sys.argv[1], json.loads(sys.argv[2])
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True  # what the kernel forgets to write is NaN
tile = config["BLOCK_T"]
for length in (0, 1, tile - 1, tile, tile + 1, 3 * tile):
    for dim, size, groups in ((12, 5, 2), (9, 8, 3), (3, 1, 1)):
        torch.manual_seed(length)
        normal = lambda *shape: torch.randn(shape, device=device)
        arguments = {
            "u": normal(2, dim, length), "delta": normal(2, dim, length), "A": -normal(dim, size).abs() - 1,
            "B": normal(2, groups, size, length), "C": normal(2, size, length), "D": normal(dim),
            "z": normal(2, dim, length), "delta_bias": normal(dim) - 3, "delta_softplus": True,
            "return_last_state": True,
        }
        with use_config("selective_scan_fn", config):
            result = tmo.selective_scan_fn(**arguments, backend="triton")
        if length:
            check.assert_right("selective_scan_fn", arguments, result, check.truth("selective_scan_fn", arguments))
        else:
            assert result[0].shape == (2, dim, 0) and not result[1].any()
"""


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "config",
    [
        '{"BLOCK_D": 4, "BLOCK_T": 8, "num_warps": 1}',
        '{"BLOCK_D": 2, "BLOCK_T": 16, "num_warps": 4}',
        '{"BLOCK_D": 32, "BLOCK_T": 4, "num_warps": 1}',
    ],
)
def test_tiles_of_every_size_agree_with_the_equations(config: str, device: str) -> None:
    _run(TILES, device, config)


MEMORY = """
import sys, torch, torch_mamba_ops as tmo
from torch_mamba_ops.testing import check
device, kind = sys.argv[1:]
torch.manual_seed(0)
DIM, SIZE, LENGTH = 16, 6, 40
normal = lambda *shape: torch.randn(shape, device=device)

def far(strides):
    # Only the elements of the view are ever touched: the system gives no memory for the others.
    extent = 1 + sum((count - 1) * stride for count, stride in zip((2, DIM, LENGTH), strides))
    assert extent > 2**31, extent
    given = torch.empty(extent, device=device, dtype=torch.bfloat16).as_strided((2, DIM, LENGTH), strides)
    return given.copy_(normal(2, DIM, LENGTH))

def channels():
    return {
        "far_channels": lambda: far((64, 2**27 + 2**24, 1)),
        "far_tokens": lambda: far((64, 1, 2**26)),
        "far_batch": lambda: far((2**31 + 7, LENGTH, 1)),
        "slices": lambda: normal(2, LENGTH, 50)[..., 3 : 3 + DIM].mT,
        "every_other": lambda: normal(2, 2 * DIM, 3 * LENGTH)[:, ::2, ::3],
        "expanded": lambda: normal(1, 1, LENGTH).expand(2, DIM, LENGTH),
    }[kind]()

arguments = {
    "u": channels(), "delta": normal(2, DIM, LENGTH), "A": -normal(SIZE, DIM).abs().T - 1,
    "B": normal(2, LENGTH, 3, SIZE).permute(0, 2, 3, 1)[:, 1:2], "C": normal(1, SIZE, 1).expand(2, SIZE, LENGTH),
    "D": normal(2 * DIM)[::2], "z": normal(2, DIM, LENGTH), "delta_bias": normal(1).expand(DIM) - 3,
    "delta_softplus": True, "return_last_state": True,
}
compact = {n: v.contiguous() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
expected = check.truth("selective_scan_fn", compact)
check.assert_right(
    "selective_scan_fn", arguments, tmo.selective_scan_fn(**arguments, backend="triton"), expected
)
if not kind.startswith("far"):
    sys.exit()
for name in ("delta", "z"):
    moved = arguments | {"u": compact["u"], name: arguments["u"].copy_(arguments[name])}
    expected = check.truth("selective_scan_fn", compact | {name: moved[name].contiguous()})
    check.assert_right("selective_scan_fn", moved, tmo.selective_scan_fn(**moved, backend="triton"), expected)
"""


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["far_channels", "far_tokens", "far_batch", "slices", "every_other", "expanded"])
def test_any_memory_is_read_where_it_lies(kind: str, device: str) -> None:
    _run(MEMORY, device, kind)


ALONE = """
import contextlib, sys, torch, torch_mamba_ops as tmo
from torch_mamba_ops.tuning import use_config
device, memory = sys.argv[1:]
torch.manual_seed(0)
BATCH, DIM, SIZE, LENGTH = (3, 40, 16, 75) if device == "cuda" else (2, 6, 3, 19)
SMALL = {"BLOCK_D": 4, "BLOCK_T": 8, "num_warps": 1}  # several tiles and blocks, which the interpreter is slow with

def tokens(count):
    if memory == "tokens":
        return torch.randn(BATCH, count, LENGTH, device=device).bfloat16()
    return torch.randn(BATCH, LENGTH, count, device=device).bfloat16().mT

A, D, bias = -torch.rand(DIM, SIZE, device=device), torch.randn(DIM, device=device), torch.rand(DIM, device=device) - 4
given = [tokens(DIM), tokens(DIM), tokens(SIZE), tokens(SIZE), tokens(DIM)]

def scan(u, delta, B, C, z):
    with use_config("selective_scan_fn", SMALL) if device == "cpu" else contextlib.nullcontext():
        return tmo.selective_scan_fn(u, delta, A, B, C, D, z, bias, True, True, backend="triton")

out, states = scan(*given)
for again, other in zip(scan(*given), (out, states)):
    assert torch.equal(again, other)
for row in range(BATCH):
    alone, state = scan(*(t[row : row + 1] for t in given))
    assert torch.equal(alone[0], out[row]) and torch.equal(state[0], states[row]), row
turned, turned_states = scan(*(t.flip(0) for t in given))
assert torch.equal(turned, out.flip(0)) and torch.equal(turned_states, states.flip(0))
for length in (1, LENGTH // 2, LENGTH - 1):
    assert torch.equal(scan(*(t[..., :length] for t in given))[0], out[..., :length]), length
"""


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory", ["channels", "tokens"])
def test_a_sequence_has_the_same_bits_again_alone_in_any_batch_and_whatever_follows(device: str, memory: str) -> None:
    _run(ALONE, device, memory)


# --- how it is started ---


def _case(name: str) -> dict[str, Any]:
    return build(next(case for case in cases(OP) if case.name == name))


def test_the_batch_and_the_length_choose_no_config(plans: test_triton.Plans) -> None:
    chosen = []
    for batch, length in ((1, 1), (1, 4096), (7, 100), (256, 3)):
        shape = (batch, 1024, length)
        u, B = torch.empty(shape, device="meta"), torch.empty(batch, 16, length, device="meta")
        A = torch.empty(1024, 16, device="meta")
        (made,) = plans(OP, {"u": u, "delta": u, "A": A, "B": B, "C": B})
        chosen.append({name: made.options[name] for name in ("BLOCK_D", "BLOCK_T", "BLOCK_N", "num_warps")})
    assert all(one == chosen[0] for one in chosen), chosen


def test_one_graph_serves_every_batch_and_length() -> None:
    """Exported with fake tensors: a number that a config or a grid were chosen by would be refused as a constant."""
    with FakeTensorMode():
        arguments = {
            name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
            if isinstance(value, Tensor)
            else value
            for name, value in _case("by_token_bfloat16").items()
        }
        names = [name for name, value in arguments.items() if isinstance(value, Tensor)]

        class Call(torch.nn.Module):
            def forward(self, *tensors: Tensor) -> Any:
                return tmo.selective_scan_fn(**arguments | dict(zip(names, tensors, strict=True)))

        batch, length = torch.export.Dim("batch", min=2, max=4096), torch.export.Dim("length", min=2, max=2**20)
        sizes = {name: {0: batch, 2: length} for name in ("u", "delta", "B", "C", "z")}
        program = torch.export.export(
            Call(),
            tuple(arguments[name] for name in names),
            dynamic_shapes=(tuple(sizes.get(name) for name in names),),
            strict=False,
        ).run_decompositions({})
    (kernel,) = (node for node in program.graph.nodes if "triton_kernel_wrapper" in str(node.target))
    assert any(isinstance(size, torch.fx.Node) for grid in kernel.kwargs["grid"] for size in grid)


# --- compiled for GPUs that are not here ---


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("memory", ["channels", "tokens"])
@pytest.mark.parametrize(
    ("dim", "size", "dtype"),
    [
        (8192, 1, "bfloat16"),
        (2560, 8, "float16"),
        (8192, 24, "bfloat16"),
        (1024, 64, "float32"),
        (64, 128, "bfloat16"),
        (7, 256, "bfloat16"),
    ],
)
def test_any_size_of_state_compiles_without_spilling(
    dim: int, size: int, dtype: str, memory: str, capability: int, plans: test_triton.Plans, tmp_path: Path
) -> None:
    (made,) = plans(OP, _arguments_for(f"{dtype} N{size}", dim, memory, "meta"))
    usage = test_triton._compile(made, capability, tmp_path)
    assert "STACK:0 " in usage and "LOCAL:0 " in usage, usage


def _shipped() -> list[Any]:
    """Each config of a table, with the key it is for and the number of channels from which on it is taken."""
    return [
        pytest.param(key, dim, config, id=f"{path.stem}-{key}-{dim}")
        for path in test_triton.TABLES
        for key, entries in json.loads(path.read_text()).get(OP, {}).items()
        for dim, config in entries
    ]


def _arguments_for(key: str, dim: int, memory: str, device: str) -> dict[str, Any]:
    dtype, size = key.split()
    length, states = 304, int(size.removeprefix("N"))

    def tokens(name: str, channels: int) -> Tensor:
        by_token = memory == "channels" or (memory == "mixed" and name in "zBC")
        shape = (1, length, channels) if by_token else (1, channels, length)
        drawn = torch.randn(shape, device=device).to(getattr(torch, dtype))
        return drawn.mT if by_token else drawn

    return {
        "u": tokens("u", dim),
        "delta": tokens("delta", dim),
        "A": -torch.rand(dim, states, device=device) - 1,
        "B": tokens("B", states),
        "C": tokens("C", states),
        "D": torch.randn(dim, device=device),
        "z": tokens("z", dim),
        "delta_bias": torch.rand(dim, device=device) - 4,
        "delta_softplus": True,
        "return_last_state": True,
    }


@pytest.mark.parametrize("memory", ["channels", "tokens", "mixed"])
@pytest.mark.parametrize(("key", "dim", "config"), _shipped())
def test_every_shipped_config_compiles_without_spilling(
    key: str, dim: int, config: dict[str, Any], memory: str, plans: test_triton.Plans, tmp_path: Path
) -> None:
    with tuning.use_config(OP, config):
        (made,) = plans(OP, _arguments_for(key, dim, memory, "meta"))
    usage = test_triton._compile(made, 90, tmp_path)
    assert "STACK:0 " in usage and "LOCAL:0 " in usage, usage


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["channels", "tokens", "mixed"])
@pytest.mark.parametrize(("key", "dim", "config"), _shipped())
def test_every_shipped_config_is_right_ten_times_over(key: str, dim: int, config: dict[str, Any], memory: str) -> None:
    torch.manual_seed(0)
    arguments = _arguments_for(key, dim, memory, "cuda")
    expected = check.truth(OP, arguments)
    for _ in range(10):
        with tuning.use_config(OP, config):
            check.assert_right(OP, arguments, tmo.selective_scan_fn(**arguments, backend="triton"), expected)


# --- what it leaves to the reference ---


def _reasons(arguments: dict[str, Any]) -> str:
    tensors, options = operator_arguments(OP, arguments)
    why_not = OPS[OP].backends["triton"].why_not
    assert why_not is not None
    return "; ".join(why_not(*tensors, **options))


def test_a_large_state_is_a_reason_against_it() -> None:
    arguments = _case("plain")
    assert "numbers" not in _reasons(arguments | dict.fromkeys("ABC", torch.zeros(6, 256)))
    assert "not 257" in _reasons(arguments | dict.fromkeys("ABC", torch.zeros(6, 257)))


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["channels", "tokens"])
def test_more_than_two_to_the_31_elements(memory: str) -> None:
    dim, length, tail = 8192, 2**18 + 1024, 1024
    torch.manual_seed(0)

    def tokens(channels: int) -> Tensor:
        if memory == "tokens":
            return torch.randn(1, channels, length, device="cuda", dtype=torch.bfloat16)
        return torch.randn(1, length, channels, device="cuda", dtype=torch.bfloat16).mT

    given = {"u": tokens(dim), "delta": tokens(dim), "z": tokens(dim), "B": tokens(16), "C": tokens(16)}
    assert given["u"].numel() > 2**31
    A = -torch.rand(dim, 16, device="cuda") - 1  # 500 tokens on, nothing is left of a state
    options: dict[str, Any] = {"A": A, "delta_softplus": True, "return_last_state": True, "backend": "triton"}
    out, state = tmo.selective_scan_fn(**given, **options)
    want, want_state = tmo.selective_scan_fn(**{name: t[..., -tail:] for name, t in given.items()}, **options)
    assert torch.equal(out[..., -tail // 2 :], want[..., -tail // 2 :]) and torch.equal(state, want_state)
