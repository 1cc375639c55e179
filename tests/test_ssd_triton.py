"""The state space dual scan's Triton kernels: bits that depend on a sequence alone, decays of any size, one graph.

The operations' own cases run in test_triton.py (interpreted, compiled) and test_ops.py (on a GPU).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ssd_checks
import torch

import torch_mamba_ops as tmo
from torch_mamba_ops import tuning

pytest.importorskip("triton")

EVERYWHERE = (
    "alone_as_in_a_batch",
    "in_parts_as_in_one",
    "cut_anywhere",
    "steep_and_mild_agree_with_the_equations",
)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_in_the_interpreter(name: str) -> None:
    command = [sys.executable, ssd_checks.__file__, name, "cpu"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.gpu
# numpy's products, which the interpreter uses, have other bits for other shapes.
@pytest.mark.parametrize("name", (*EVERYWHERE, "other_blocks_and_stages"))
@pytest.mark.parametrize("block_q", (16, 64))
def test_on_a_gpu(name: str, block_q: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd_checks, "Q", block_q)
    monkeypatch.setattr(ssd_checks, "TINY", ssd_checks.TINY | {"BLOCK_Q": block_q})
    with tuning.use_config(ssd_checks.OP, ssd_checks.TINY):
        getattr(ssd_checks, name)("cuda")


def test_a_keys_configs_share_a_chunks_length() -> None:
    tables = list((Path(tuning.__file__).parent / "tables").glob("*.json"))
    assert tables
    for path in tables:
        for key, entries in json.loads(path.read_text()).get(ssd_checks.OP, {}).items():
            assert len({config["BLOCK_Q"] for _, config in entries}) == 1, f"{path.name}: {key}"


@pytest.mark.gpu
def test_the_same_bits_every_time() -> None:
    arguments = ssd_checks.drawn((3000, 2000, 3192), "cuda", torch.bfloat16)
    first = ssd_checks.scanned(arguments)
    for _ in range(20):
        again = ssd_checks.scanned(arguments)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def _bound(arguments: dict[str, Any]) -> Any:
    """A call whose tensors are all that changes."""

    def call(x: Any, dt: Any, B: Any, C: Any, cu_seqlens: Any, states: Any, state_indices: Any, computed: Any) -> Any:
        return tmo.mamba_chunk_scan_combined_varlen(
            x, dt, arguments["A"], B, C, ssd_checks.Q, cu_seqlens, D=arguments["D"], dt_softplus=True, states=states,
            state_indices=state_indices, num_computed_tokens=computed, backend="triton",
        )  # fmt: skip

    return call


CHANGING = ("x", "dt", "B", "C", "cu_seqlens", "states", "state_indices", "num_computed_tokens")


@pytest.mark.gpu
def test_one_graph_serves_every_number_of_tokens_and_sequences() -> None:
    torch._dynamo.reset()
    compiled = None
    # No two sizes of the first are equal: torch would take them for one.
    for lengths in ((37, 40, 1, 6, 9), (5, 0, 100, 64), (300, 7, 9), (16,) * 33):
        arguments = ssd_checks.drawn(lengths, "cuda", torch.bfloat16)
        call = _bound(arguments)
        if compiled is None:
            weights, compiled = call, torch.compile(call, fullgraph=True, dynamic=True)
        given = [arguments[name].clone() for name in CHANGING]
        wanted = [tensor.clone() for tensor in given]
        with torch._dynamo.config.patch(error_on_recompile=lengths != (37, 40, 1, 6, 9)):
            out = compiled(*given)
        torch.testing.assert_close(out, weights(*wanted), rtol=0, atol=0)
        torch.testing.assert_close(given[5], wanted[5], rtol=0, atol=0)


@pytest.mark.gpu
def test_a_captured_graph_takes_other_sequences() -> None:
    arguments = ssd_checks.drawn((40, 24, 36), "cuda", torch.bfloat16)
    call = _bound(arguments)
    given = [arguments[name] for name in CHANGING]
    call(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*given)
    for lengths in ((40, 24, 36), (100, 0, 0), (1, 98, 1), (33, 33, 30)):
        starts = [sum(lengths[:i]) for i in range(4)]
        arguments["cu_seqlens"].copy_(torch.tensor(starts))
        states = arguments["states"].clone()
        graph.replay()
        replayed, left = out.clone(), arguments["states"].clone()
        arguments["states"].copy_(states)
        assert torch.equal(replayed, call(*given)), lengths
        assert torch.equal(left, arguments["states"]), lengths


@pytest.mark.gpu
def test_more_elements_than_32_bits_count() -> None:
    heads, channels, tokens = 128, 64, 270_000
    assert tokens * heads * channels > 2**31
    last = 100

    def draw(*shape: int) -> Any:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    x, dt = draw(tokens, heads, channels), draw(tokens, heads)
    B, C, A = draw(tokens, 1, 128), draw(tokens, 1, 128), -torch.rand(heads, device="cuda") - 1
    starts = torch.tensor([0, tokens - last, tokens], device="cuda", dtype=torch.int32)
    out = tmo.mamba_chunk_scan_combined_varlen(x, dt, A, B, C, 256, starts, dt_softplus=True, backend="triton")
    end = slice(tokens - last, None)
    alone = tmo.mamba_chunk_scan_combined_varlen(
        x[end].clone(), dt[end].clone(), A, B[end].clone(), C[end].clone(), 256, starts[1:] - starts[1],
        dt_softplus=True, backend="triton",
    )  # fmt: skip
    assert torch.equal(out[end], alone)
