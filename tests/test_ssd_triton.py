"""The state space dual scan's Triton kernels: bits that depend on a sequence alone, decays of any size, one graph.

The operations' own cases run in test_triton.py (interpreted, compiled) and test_ops.py (on a GPU).
"""

from __future__ import annotations

import contextvars
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ssd_checks
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor

import torch_mamba_ops as tmo
from torch_mamba_ops import tuning
from torch_mamba_ops.ops import launch as launching
from torch_mamba_ops.ops import ssd_launch

triton = pytest.importorskip("triton")

TABLES = list((Path(tuning.__file__).parent / "tables").glob("*.json"))
EVERYWHERE = (
    "alone_as_in_a_batch",
    "in_parts_as_in_one",
    "cut_anywhere",
    "by_tma_as_by_pointers",
    "steep_and_mild_agree_with_the_equations",
    "turned_products_agree_with_the_equations",
    "sequences_of_a_row_agree_with_the_equations",
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


def test_a_card_without_a_table_copies_by_tma_if_it_is_of_the_generation_that_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for generation, wanted in ((8, False), (9, True), (10, False)):
        monkeypatch.setattr(ssd_launch, "_card", lambda device, generation=generation: (232_448, generation))
        config = ssd_launch._config(torch.bfloat16, 4, 64, 128, 1, torch.device("cpu"))
        assert config["TMA"] is wanted


def test_a_keys_configs_share_a_chunks_length() -> None:
    assert TABLES
    for path in TABLES:
        for key, entries in json.loads(path.read_text()).get(ssd_checks.OP, {}).items():
            assert len({config["BLOCK_Q"] for _, config in entries}) == 1, f"{path.name}: {key}"


def _shipped() -> Iterator[Any]:
    for path in TABLES:
        for key, entries in json.loads(path.read_text()).get(ssd_checks.OP, {}).items():
            yield pytest.param(key, [config for _, config in entries], id=f"{path.stem} {key}")


@pytest.mark.gpu
@pytest.mark.parametrize(("key", "configs"), list(_shipped()))
def test_a_keys_configs_share_all_bits(
    key: str, configs: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which one runs depends on the batch, of which a sequence's bits must not."""
    dtype, channels, size = key.split()
    monkeypatch.setattr(ssd_checks, "Q", configs[0]["BLOCK_Q"])
    lengths = (1000, 64, 0, 333)
    arguments = ssd_checks.drawn(lengths, "cuda", getattr(torch, dtype), False, int(channels[1:]), int(size[1:]))
    pointers = configs[0] | {"TMA": False}
    for given in (arguments, arguments | {"num_computed_tokens": None}):
        found = []
        for config in (pointers, *configs):
            with tuning.use_config(ssd_checks.OP, config):
                found.append(ssd_checks.scanned(given))
        for config, (out, states) in zip(configs, found[1:], strict=True):
            assert torch.equal(out, found[0][0]) and torch.equal(states, found[0][1]), config


@pytest.mark.gpu
def test_the_same_bits_every_time() -> None:
    arguments = ssd_checks.drawn((3000, 2000, 3192), "cuda", torch.bfloat16)
    first = ssd_checks.scanned(arguments)
    for _ in range(20):
        again = ssd_checks.scanned(arguments)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def _bound(arguments: dict[str, Any], with_computed: bool = True) -> Any:
    """A call whose tensors are all that changes."""

    def call(x: Any, dt: Any, B: Any, C: Any, cu_seqlens: Any, states: Any, state_indices: Any, computed: Any) -> Any:
        computed = computed if with_computed else None
        return tmo.mamba_chunk_scan_combined_varlen(
            x, dt, arguments["A"], B, C, ssd_checks.Q, cu_seqlens, D=arguments["D"], dt_softplus=True, states=states,
            state_indices=state_indices, num_computed_tokens=computed, backend="triton",
        )  # fmt: skip

    return call


CHANGING = ("x", "dt", "B", "C", "cu_seqlens", "states", "state_indices", "num_computed_tokens")


@pytest.fixture(params=["pointers", "tma"])
def copied(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles are copied this way, in graphs too."""
    seen: dict[bool, list[bool]] = {True: [], False: []}  # by whether the call is traced
    launch = ssd_launch.launch

    def watched(plan: Any, *given: Any) -> None:
        if plan is ssd_launch._scan:
            seen[isinstance(given[0], (FakeTensor, FunctionalTensor))].append(plan(*given).descriptors)
        launch(plan, *given)

    monkeypatch.setattr(ssd_launch, "launch", watched)
    config = {"BLOCK_P": 64, "num_stages": 3, "TMA": request.param == "tma"}
    with tuning.use_config(ssd_checks.OP, ssd_checks.TINY | config):
        yield
    assert set(seen[False]) == {config["TMA"]}
    assert not seen[True] or seen[True][-1] == config["TMA"], "before, torch only asks what is written"


@pytest.mark.gpu
@pytest.mark.parametrize("with_computed", [True, False])
def test_one_graph_serves_every_number_of_tokens_and_sequences(copied: None, with_computed: bool) -> None:
    torch._dynamo.reset()
    compiled = None
    # No two sizes of the first are equal: torch would take them for one.
    for lengths in ((37, 40, 1, 6, 9), (5, 0, 100, 64), (300, 7, 9), (16,) * 33):
        arguments = ssd_checks.drawn(lengths, "cuda", torch.bfloat16)
        call = _bound(arguments, with_computed)
        if compiled is None:
            weights, compiled = call, torch.compile(call, fullgraph=True, dynamic=True)
        given = [arguments[name].clone() for name in CHANGING]
        wanted = [tensor.clone() for tensor in given]
        with torch._dynamo.config.patch(error_on_recompile=lengths != (37, 40, 1, 6, 9)):
            out = compiled(*given)
        torch.testing.assert_close(out, weights(*wanted), rtol=0, atol=0)
        torch.testing.assert_close(given[5], wanted[5], rtol=0, atol=0)


@pytest.mark.gpu
def test_a_captured_graph_takes_other_sequences(copied: None) -> None:
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


def _tiles(columns: int = 24, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """x, B and C as slices of one tensor, and an output."""
    row = torch.empty(32, 2 * columns + 2 * 16, dtype=dtype)
    x, B, C = row.split([2 * columns, 16, 16], -1)
    x = x.unflatten(-1, (2, columns))
    return {"x": x, "B": B[:, None], "C": C[:, None], "out": torch.empty(x.shape, dtype=dtype)}


def _moved(tensor: torch.Tensor) -> torch.Tensor:
    """The same two bytes further on."""
    return tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)


def test_tma_copies_slices_of_a_convolutions_output() -> None:
    assert ssd_launch.why_not_tma(**_tiles(), chunk=64, block=64) == []


@pytest.mark.parametrize(
    ("reason", "changed"),
    [
        ("a chunk has 16", {"chunk": 16}),
        ("it is for bfloat16", _tiles(dtype=torch.float32)),
        ("it is for bfloat16", {"B": torch.empty(32, 1, 16)}),
        ("x has strides", _tiles(columns=20)),  # 40 bytes a head
        ("B has strides", {"B": torch.empty(16, 1, 32, dtype=torch.bfloat16).permute(2, 1, 0)}),
        ("C has strides", {"C": torch.empty(1, 1, 16, dtype=torch.bfloat16).expand(32, 1, 16)}),
        ("x is at address", {"x": _moved(_tiles()["x"])}),
    ],
)
def test_tma_is_refused_with_the_reason(reason: str, changed: dict[str, Any]) -> None:
    given = _tiles() | {"chunk": 64, "block": 64} | changed
    assert any(reason in found for found in ssd_launch.why_not_tma(**given))


def test_a_graph_takes_tma_where_its_compiler_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        tiles = _tiles()
        sizes = {"chunk": 64, "block": 64}
        assert [reason[:20] for reason in ssd_launch.why_not_tma(**tiles, **sizes)] == ["nothing is known of "]
        monkeypatch.setattr(launching, "compiler_serves_descriptors", lambda: True)
        assert ssd_launch.why_not_tma(**tiles, **sizes) == []
        for name, tensor in tiles.items():
            for changed in (_moved(tensor), tensor[:1]):
                (reason,) = ssd_launch.why_not_tma(**tiles | {name: changed}, **sizes)
                assert reason.startswith(f"{name} may be at any address")


def test_inductors_python_wrapper_serves_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from torch._inductor.virtualized import V

    monkeypatch.delattr(CachingAutotuner, "_build_fast_launcher", raising=False)
    assert not launching.compiler_serves_descriptors()
    with V.set_fake_mode(FakeTensorMode()):
        assert launching.compiler_serves_descriptors()
        with monkeypatch.context() as newer:  # torch 2.13
            newer.setattr(CachingAutotuner, "_build_fast_launcher", None, raising=False)
            assert not launching.compiler_serves_descriptors()
        with config.patch(cpp_wrapper=True):
            assert not launching.compiler_serves_descriptors()
        with V.set_aot_compilation(True):
            assert not launching.compiler_serves_descriptors()


def test_a_launch_brings_scratch_memory_and_leaves_the_callers_allocator() -> None:
    from triton.runtime import _allocation

    def mine(size: int, alignment: int, stream: int | None) -> Any:
        raise AssertionError("not for this launch")

    def inside() -> Any:
        asked = _allocation._allocator.get()
        triton.set_allocator(asked)
        return asked

    context = contextvars.copy_context()
    context.run(triton.set_allocator, mine)
    assert context.run(launching.with_scratch, inside) is launching._scratch
    assert context.run(_allocation._allocator.get) is mine
