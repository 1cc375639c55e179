"""The Triton kernels of whole texts' convolutions: blocks of every size, one text's bits in every batch, big tensors.

The operations' own cases run in test_triton.py (interpreted, compiled) and test_ops.py (on a GPU).
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_mamba_ops as tmo
from torch_mamba_ops.ops import conv_prefill
from torch_mamba_ops.ops.launch import Launch
from torch_mamba_ops.testing import build, cases

pytest.importorskip("triton")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _run(program: str, *arguments: str) -> None:
    """In a process of its own: Triton's interpreter is chosen before Triton is imported."""
    environment = dict(os.environ) | ({"TRITON_INTERPRET": "1"} if "cpu" in arguments else {})
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# --- the arithmetic ---

BLOCKS = """
import json, sys, torch
from torch_mamba_ops.dispatch import OPS
from torch_mamba_ops.testing import build, cases, check, copied
from torch_mamba_ops.tuning import use_config

op, device, tokens_innermost, config = sys.argv[1], sys.argv[2], sys.argv[3] == "tokens", json.loads(sys.argv[4])
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True  # what a kernel forgets to write is NaN
ran = 0
for case in cases(op):
    arguments = build(case, device)
    if (arguments["x"].stride(-2) != 1) != tokens_innermost:
        continue
    given, expected = copied(arguments), check.truth(op, arguments)
    check.poison_unused_rows(given, expected, op)
    with use_config("causal_conv1d_varlen_fn", config):
        check.assert_right(op, given, OPS[op].function(**given, backend="triton"), expected)
    ran += 1
assert ran > 1, ran
"""


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", ["causal_conv1d_varlen_fn", "causal_conv1d_fn"])
@pytest.mark.parametrize(
    ("innermost", "config"),
    [
        ("channels", '{"BLOCK_D": 4, "BLOCK_T": 4, "UNROLL": 4, "num_warps": 1}'),
        ("channels", '{"BLOCK_D": 16, "BLOCK_T": 8, "UNROLL": 3, "num_warps": 1}'),
        ("tokens", '{"BLOCK_D": 2, "BLOCK_T": 16, "num_warps": 1}'),
        ("tokens", '{"BLOCK_D": 8, "BLOCK_T": 64, "num_warps": 1}'),
    ],
)
def test_blocks_of_every_size_agree_with_the_equations(op: str, innermost: str, config: str, device: str) -> None:
    _run(BLOCKS, op, device, innermost, config)


ALONE = """
import sys, torch, torch_mamba_ops as tmo
device, layout = sys.argv[1:]
torch.manual_seed(0)
DIM, COLUMNS, LENGTHS = 48, 5, (3, 70, 0, 1, 34)
bounds = [sum(LENGTHS[:i]) + 2 for i in range(len(LENGTHS) + 1)]
x = torch.randn(bounds[-1] + 1, DIM, device=device).bfloat16().t()
x = x.contiguous() if layout == "tokens" else x
weight, bias = torch.randn(DIM, 4, device=device).bfloat16(), torch.randn(DIM, device=device)
pool = torch.randn(9, COLUMNS, DIM, device=device).transpose(1, 2)
slots, known = (4, 8, 0, 2, 6), (True, True, True, False, True)

def convolve(x, pool, bounds, slots, known):
    index = lambda values: torch.tensor(values, device=device, dtype=torch.int32)
    return tmo.causal_conv1d_varlen_fn(
        x, weight, bias, pool, index(bounds), cache_indices=index(slots),
        has_initial_state=torch.tensor(known, device=device), activation="silu", backend="triton",
    )

together = pool.clone()
out = convolve(x, together, bounds, slots, known)
for i, (slot, begin, end) in enumerate(zip(slots, bounds, bounds[1:])):
    if begin == end:
        assert torch.equal(together[slot], pool[slot])
        continue
    alone, own = pool.clone(), x[:, begin:end]
    assert torch.equal(convolve(own, alone, [0, end - begin], [slot], [known[i]]), out[:, begin:end]), i
    assert torch.equal(alone[slot], together[slot]), i
    before = pool[slot, :, -3:] if known[i] else torch.zeros_like(pool[slot, :, -3:])
    dense = tmo.causal_conv1d_fn(
        own[None], weight, bias, initial_states=before[None], activation="silu", backend="triton"
    )
    assert torch.equal(dense[0], out[:, begin:end]), i
"""


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["channels", "tokens"])
def test_a_text_has_the_same_bits_alone_in_a_batch_and_in_a_dense_call(device: str, layout: str) -> None:
    _run(ALONE, device, layout)


GRADIENTS = """
import sys, torch, torch_mamba_ops as tmo
from torch_mamba_ops.testing import build, cases
from torch_mamba_ops.testing.check import copied

for case in cases("causal_conv1d_fn", "grad"):
    found = []
    for backend in ("triton", "reference"):
        given = copied(build(case, sys.argv[1]))
        leaves = [t.requires_grad_() for t in given.values() if torch.is_tensor(t) and t.is_floating_point()]
        out = tmo.causal_conv1d_fn(**given, backend=backend)
        out = out if torch.is_tensor(out) else torch.cat(out, -1)
        found.append(torch.autograd.grad(out, leaves, torch.ones_like(out).cumsum(-1)))
    torch.testing.assert_close(*found)
"""


@pytest.mark.parametrize("device", DEVICES)
def test_what_the_kernels_compute_has_the_gradient_of_the_reference(device: str) -> None:
    _run(GRADIENTS, device)


# --- which kernel, on what blocks ---


def _planned(x: Tensor, **more: Any) -> Launch:
    return conv_prefill.plan(x, torch.empty_like(x), torch.empty(x.shape[-2], 4), None, None, None, **more)


def test_the_memory_of_x_chooses_the_kernel() -> None:
    wide = torch.empty(2, 64, 48)
    for x, kernel in (
        (wide[..., :32].mT, "convolve_channels"),
        (wide.mT.contiguous(), "convolve_tokens"),
        (wide.mT.contiguous()[..., ::2], "convolve_channels"),  # neither innermost
        (wide[:, :1, :1].expand(2, 9, 32).mT, "convolve_channels"),  # one value for all
    ):
        assert _planned(x).kernel.__name__ == kernel


def test_short_work_gets_short_blocks_and_a_symbolic_length_is_not_asked_for() -> None:
    def block(tokens: int) -> Any:
        return _planned(torch.empty(1, tokens, 4096, device="meta").mT).options["BLOCK_T"]

    sizes = [block(tokens) for tokens in (1, 512, 4096, 16384, 2**20)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_one_graph_serves_every_number_of_tokens_and_texts() -> None:
    """Exported with fake tensors: a number that a config or a grid were chosen by would be refused as a constant."""
    case = next(case for case in cases("causal_conv1d_varlen_fn") if case.name == "dim_innermost")
    with FakeTensorMode():
        arguments = {
            name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
            if isinstance(value, Tensor)
            else value
            for name, value in build(case).items()
        }
        names = [name for name, value in arguments.items() if isinstance(value, Tensor)]

        class Call(torch.nn.Module):
            def forward(self, *tensors: Tensor) -> Tensor:
                return tmo.causal_conv1d_varlen_fn(**arguments | dict(zip(names, tensors, strict=True)))

        texts, tokens = torch.export.Dim("texts", min=2, max=4096), torch.export.Dim("tokens", min=2, max=2**20)
        sizes = {
            "x": {1: tokens},
            "query_start_loc": {0: texts + 1},
            "cache_indices": {0: texts},
            "has_initial_state": {0: texts},
        }
        program = torch.export.export(
            Call(),
            tuple(arguments[name] for name in names),
            dynamic_shapes=(tuple(sizes.get(name) for name in names),),
            strict=False,
        ).run_decompositions({})
    (kernel,) = (node for node in program.graph.nodes if "triton_kernel_wrapper" in str(node.target))
    assert any(isinstance(size, torch.fx.Node) for grid in kernel.kwargs["grid"] for size in grid)


# --- the contract around them ---


@pytest.mark.parametrize("out", ["needs grad", "overlaps itself"])
def test_final_states_are_only_written_where_they_can_be(out: str) -> None:
    target = torch.zeros(2, 6, 1).expand(2, 6, 3) if out == "overlaps itself" else torch.zeros(2, 6, 3).requires_grad_()
    options: dict[str, Any] = {"return_final_states": True, "final_states_out": target}
    with pytest.raises(ValueError, match=r"final_states_out: (requires grad|got strides)"):
        tmo.causal_conv1d_fn(torch.randn(2, 6, 5), torch.randn(6, 4), **options)
    assert not target.any()


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["channels", "tokens"])
def test_more_than_two_to_the_31_elements(layout: str) -> None:
    dim, length = 8192, 2**18 + 1000
    shape = (length, dim) if layout == "channels" else (dim, length)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    x = x.t() if layout == "channels" else x
    weight = torch.randn(dim, 4, device="cuda", dtype=torch.bfloat16)
    pool = torch.zeros(2, 3, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    begin = length - 700
    bounds = torch.tensor([0, begin, length], device="cuda")
    out = tmo.causal_conv1d_varlen_fn(x, weight, None, pool, bounds, backend="triton")
    want = tmo.causal_conv1d_fn(x[None, :, begin:], weight, backend="triton")
    assert isinstance(want, Tensor) and torch.equal(out[:, begin:], want[0])
    assert torch.equal(pool[1], x[:, -3:]) and torch.equal(pool[0], x[:, begin - 3 : begin])
    want = tmo.causal_conv1d_fn(x[None, :, begin - 503 : begin], weight, backend="triton")
    assert isinstance(want, Tensor) and torch.equal(out[:, begin - 500 : begin], want[0, :, 3:])


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["channels", "tokens"])
def test_more_texts_than_one_look_at_their_bounds_can_tell_apart(layout: str) -> None:
    texts, dim = 20_000, 24
    lengths = torch.randint(0, 4, (texts,), device="cuda")
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)) + 3
    x = torch.randn(int(bounds[-1]) + 5, dim, device="cuda", dtype=torch.float32).t()
    x = x.contiguous() if layout == "tokens" else x
    weight, known = torch.randn(dim, 4, device="cuda"), torch.rand(texts, device="cuda") < 0.5
    pool = torch.randn(texts, dim, 3, device="cuda")
    want_pool = pool.clone()
    want = tmo.causal_conv1d_varlen_fn(x, weight, None, want_pool, bounds, has_initial_state=known, backend="reference")
    out = tmo.causal_conv1d_varlen_fn(x, weight, None, pool, bounds, has_initial_state=known, backend="triton")
    torch.testing.assert_close(out, want)
    assert torch.equal(pool, want_pool)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["channels", "tokens"])
def test_no_program_reads_a_window_that_another_one_has_written(layout: str) -> None:
    dim, lengths = 2048, (5000, 1, 3, 900)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device="cuda", dtype=torch.int32)
    x = torch.randn(sum(lengths), dim, device="cuda", dtype=torch.bfloat16).t()
    x = x.contiguous() if layout == "tokens" else x
    weight = torch.randn(dim, 4, device="cuda", dtype=torch.bfloat16)
    pool = torch.randn(4, dim, 6, device="cuda", dtype=torch.bfloat16)
    known = torch.ones(4, device="cuda", dtype=torch.bool)
    want_pool = pool.clone()
    want = tmo.causal_conv1d_varlen_fn(x, weight, None, want_pool, bounds, has_initial_state=known, backend="reference")
    for _ in range(20):
        given = pool.clone()
        out = tmo.causal_conv1d_varlen_fn(x, weight, None, given, bounds, has_initial_state=known, backend="triton")
        torch.testing.assert_close(out, want)
        assert torch.equal(given, want_pool)
