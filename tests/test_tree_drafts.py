"""Drafts that are a tree: what comes out along an accepted path is what plain decoding gives, and the states go on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import torch_mamba_ops as tmo
from torch_mamba_ops.dispatch import OPS
from torch_mamba_ops.inductor import rule
from torch_mamba_ops.ops.tokens import RaggedTokens
from torch_mamba_ops.ops.tree import parents_of, tree_scan
from torch_mamba_ops.state import MambaStateSpec, StateCopyPlan, StatePool
from torch_mamba_ops.testing import build, cases, check, copied

LAYOUTS = ["SD", "DS"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SSU, CONV = "selective_state_update", "causal_conv1d_update"
HEADS, HEAD_DIM, STATE, GROUPS, WIDTH = 4, 6, 8, 2, 4
INNER = HEADS * HEAD_DIM
DIM = INNER + 2 * GROUPS * STATE

Arguments = dict[str, Any]


def _index(values: Any, device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _random_parents(batch: int, length: int, generator: torch.Generator) -> list[list[int]]:
    """Trees, not forests alone: most tokens follow one of the last few, some nothing."""

    def parent(token: int) -> int:
        back = int(torch.randint(1, 5, (), generator=generator))
        return max(-1, token - back)

    return [[parent(token) for token in range(length)] for _ in range(batch)]


def _path(parents: list[int], token: int) -> list[int]:
    """From a root down to the token."""
    found = []
    while token >= 0:
        found.append(token)
        token = parents[token]
    return found[::-1]


# --- accepted, committed, decoded on ---


class Layer:
    """A Mamba2 mixer without its projections: a token is what goes into the convolution."""

    def __init__(self, device: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        self.filter = {"weight": normal(DIM, WIDTH), "bias": normal(DIM), "activation": "silu"}
        self.A, self.D, self.dt = -normal(HEADS).abs(), normal(HEADS), 0.1 + normal(HEADS).abs()

    def __call__(self, states: Any, tokens: Tensor, conv: Arguments, ssm: Arguments) -> Tensor:
        """``tokens`` ``[*tokens, DIM]``."""
        y = tmo.causal_conv1d_update(
            tokens.transpose(1, 2) if tokens.dim() == 3 else tokens, states.conv_state, **self.filter, **conv
        )
        y = y.transpose(1, 2) if tokens.dim() == 3 else y
        x, B, C = y.split([INNER, GROUPS * STATE, GROUPS * STATE], -1)
        B, C = (t.unflatten(-1, (GROUPS, STATE)) for t in (B, C))
        dt = self.dt.expand(*tokens.shape[:-1], -1)
        return tmo.selective_state_update(
            states.ssm_state, x.unflatten(-1, (HEADS, HEAD_DIM)), dt, self.A, B, C, self.D, **ssm
        )


def serve(layout: str, device: str = "cpu", packed: bool = False, by_slots: bool = False) -> Tensor:
    """Four steps of drafted trees, of each of which a path is accepted, against the accepted tokens one by one.

    Returns:
        How far the outputs and states are off, relative to their norms, in float32's last places.
    """
    batch, length = 3, 6
    generator = torch.Generator().manual_seed(5)
    layer = Layer(device, seed=2)

    def pool(drafts: int) -> StatePool:
        spec = MambaStateSpec.mamba2(
            HEADS, HEAD_DIM, STATE, groups=GROUPS, conv_width=WIDTH, conv_layout=layout, speculative_tokens=drafts
        )
        return StatePool([spec], 25, device=device)

    drafted, plain = pool(length - 1), pool(0)
    steps = None if by_slots else drafted.intermediate(batch, length)
    plan = StateCopyPlan(drafted, intermediate=steps)
    at = _index([7, 2, 9], device)
    # A sequence's first token leaves its state where the state before the step was.
    of_tokens = _index(
        [[slot, *range(first, first + length - 1)] for slot, first in ((7, 10), (2, 15), (9, 20))], device
    )
    draws = torch.Generator().manual_seed(9)
    state = torch.randn(batch, HEADS, HEAD_DIM, STATE, generator=draws).to(device)
    window = torch.randn(batch, DIM, WIDTH - 1, generator=draws).to(device)
    for states in (drafted[0], plain[0]):
        states.ssm_state[at.long()] = state
        states.conv_state[at.long(), :, : WIDTH - 1] = window

    apart = []

    def compare(found: Tensor, wanted: Tensor) -> None:
        apart.append((found - wanted).norm() / wanted.norm() / torch.finfo(torch.float32).eps)

    for _ in range(4):
        parents = _random_parents(batch, length, generator)
        accepted = torch.randint(length, (batch,), generator=generator).tolist()
        tokens = torch.randn(batch, length, DIM, generator=generator).to(device)
        tree = _index(parents, device)
        conv: Arguments = {"conv_state_indices": at, "num_accepted_tokens": torch.ones_like(at), "parents": tree}
        ssm: Arguments = {"state_batch_indices": at, "parents": tree}
        if steps is None:
            ssm["dst_state_batch_indices"] = of_tokens
        else:
            ssm |= {"intermediate_states_buffer": steps[0].ssm_state, "disable_state_update": True}
        if packed:
            starts = _index(range(0, batch * length + 1, length), device)
            conv |= {"parents": tree.flatten(), "query_start_loc": starts, "max_query_len": length}
            ssm |= {"parents": tree.flatten(), "cu_seqlens": starts, "max_seqlen": length}
            found = layer(drafted[0], tokens.flatten(0, 1), conv, ssm).unflatten(0, (batch, length))
        else:
            found = layer(drafted[0], tokens, conv, ssm)
        source = of_tokens if steps is None else None
        plan.commit(source, at, accepted_index=_index(accepted, device), parents=tree)

        for row, token in enumerate(accepted):
            slot = at[row : row + 1]
            for node in _path(parents[row], token):
                one = tokens[row : row + 1, node]
                wanted = layer(plain[0], one, {"conv_state_indices": slot}, {"state_batch_indices": slot})
                compare(found[row, node], wanted[0])
        compare(drafted[0].ssm_state[at.long()], plain[0].ssm_state[at.long()])
        assert torch.equal(drafted[0].conv_state[at.long(), :, : WIDTH - 1], plain[0].conv_state[at.long()])
    return torch.stack(apart)


WAYS = [{}, {"packed": True}, {"by_slots": True}]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS, ids=["dense", "packed", "slots_by_token"])
def test_an_accepted_path_is_what_plain_decoding_gives(layout: str, way: Arguments, device: str) -> None:
    assert serve(layout, device, **way).max() < check.ERROR_BUDGET


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_give_the_bits_of_plain_decoding(layout: str) -> None:
    """In Triton's interpreter; a tree's kernel computes each path anew as the kernel for one token does."""
    program = (
        "import test_tree_drafts as t, torch_mamba_ops as tmo\n"
        f"with tmo.use_backend(**dict.fromkeys((t.SSU, t.CONV, 'commit_states'), 'triton')):\n"
        f"    assert all(t.serve({layout!r}, **way).max() == 0.0 for way in t.WAYS)"
    )
    _interpret(program)


def _interpret(program: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment, capture_output=True, text=True, check=False, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# --- any tree ---


def _with_tree(op: str, length: int, parents: list[list[int]], **changes: Any) -> Arguments:
    """The operation's case of a dense tree, for other trees, of three sequences."""
    found = next(case for case in cases(op) if case.name == "tree")
    shape: Any = found.build
    changes = {"columns": length + 4} | changes if op == CONV else changes
    return build(replace(found, build=replace(shape, length=length, parents=parents, **changes)))


@pytest.mark.parametrize("length", [1, 2, 9, 37])
@pytest.mark.parametrize("op", [SSU, CONV])
def test_random_trees_and_rows_agree_with_the_equations(op: str, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    row = list(range(-1, length - 1))
    arguments = _with_tree(op, length, [row, *_random_parents(2, length, generator)])
    given = copied(arguments)
    check.assert_right(op, given, OPS[op].function(**given, backend="reference"), check.truth(op, arguments))


def test_a_tree_of_one_branch_is_a_row() -> None:
    for op in (SSU, CONV):
        arguments = _with_tree(op, 7, [list(range(-1, 6))] * 3)
        want = check.truth(op, arguments | {"parents": None})
        check.assert_right(op, arguments, OPS[op].function(**arguments), want)


OUT_OF_ORDER = [[-1, 0, 5, 3, -9], [2, -1, 1, 9, 2], [-1, 1, 0, 2**31 - 1, 4]]
IN_ORDER = [[-1, 0, 1, 2, -1], [-1, -1, 1, 2, 2], [-1, 0, 0, 2, 3]]


def unchecked(backend: str, device: str = "cpu") -> None:
    """Parents out of order, which cannot be seen on a GPU, are taken for the nearest that are in order: walks end, and
    nothing is read outside."""
    for op in (SSU, CONV):
        tensors, options = check.operator_arguments(op, _with_tree(op, 5, IN_ORDER))
        place = OPS[op].tensors.index("parents")
        results = []
        for parents in (IN_ORDER, OUT_OF_ORDER):
            given = [t.to(device, copy=True) if isinstance(t, Tensor) else t for t in tensors]
            given[place] = _index(parents, device)
            results.append((OPS[op].backends[backend].run(*given, **options), *(given[i] for i in OPS[op].mutated)))
        for one, other in zip(*results, strict=True):
            assert other is None or torch.equal(one, other)


def test_parents_out_of_order_end_somewhere() -> None:
    unchecked("reference")
    _interpret("import test_tree_drafts as t; t.unchecked('triton')")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_parents_out_of_order_end_somewhere_on_a_gpu(backend: str) -> None:
    unchecked(backend, "cuda")


# --- compiled ---


@pytest.mark.parametrize("op", [SSU, CONV])
def test_trees_of_many_sizes_make_at_most_two_graphs(op: str) -> None:
    generator = torch.Generator().manual_seed(0)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(lambda given: OPS[op].function(**given), backend=counter, fullgraph=True)
    for length in (2, 3, 5, 8, 16, 17):
        arguments = _with_tree(op, length, _random_parents(3, length, generator))
        given = copied(arguments)
        check.assert_right(op, given, compiled(given), check.truth(op, arguments))
    assert counter.frame_count <= 2


def test_a_scan_of_symbolic_length_follows_long_paths() -> None:
    """With rounds that do not depend on the length."""
    torch._dynamo.reset()
    scan = torch.compile(tree_scan, dynamic=True, fullgraph=True, backend="eager")
    row = torch.arange(-1, 999)[None]
    found = scan(torch.zeros(1, 1000), torch.ones(1, 1000), row)
    assert found.tolist() == [list(range(1, 1001))]


# --- refused ---


REFUSED: list[tuple[str, str, Callable[[Arguments], Arguments], str]] = [
    (SSU, "tree", lambda a: {"disable_state_update": False}, r"parents: given with one state to write for each .*"),
    (SSU, "tree", lambda a: {"parents": a["parents"][:, :4]}, r"parents: got shape \[3, 4\], .*length\] = \[3, 5\]"),
    (SSU, "tree", lambda a: {"parents": a["parents"].float()}, "parents: got dtype torch.float32, expected .*int32"),
    (SSU, "tree", lambda a: {"parents": a["parents"].tolist()}, r"parents: got list, expected a tensor \[batch"),
    (SSU, "tree", lambda a: {"parents": a["parents"].to("meta")}, "parents: got device meta, expected cpu"),
    (SSU, "tree", lambda a: {"parents": a["parents"] + 1}, "parents: got 0 for token 0, expected -1 or a token before"),
    (
        SSU,
        "tree",
        lambda a: {"parents": a["parents"] - 1},
        "parents: got -2 for token 0, expected -1 or a token before",
    ),
    (SSU, "tree_packed", lambda a: {"parents": a["parents"].roll(1)}, "parents: got 9 for token 0"),
    (SSU, "tree_packed", lambda a: {"parents": a["parents"][:-1]}, r"parents: got .*\[total_tokens\] = \[8\]"),
    (
        SSU,
        "mamba2",
        lambda a: {"parents": _index([-1] * 3), "disable_state_update": True},
        "parents: given with one token",
    ),
    (
        CONV,
        "tree",
        lambda a: {"num_accepted_tokens": None},
        "parents: given without num_accepted_tokens, expected both",
    ),
    (CONV, "tree", lambda a: {"cache_seqlens": _index([1] * 3)}, "cache_seqlens: given with num_accepted_tokens"),
    (CONV, "tree", lambda a: {"parents": a["parents"].t()}, r"parents: got shape \[6, 3\], expected .* = \[3, 6\]"),
    (
        CONV,
        "tree",
        lambda a: {"parents": a["parents"] + 1},
        "parents: got 0 for token 0, expected -1 or a token before",
    ),
    (CONV, "tree_packed", lambda a: {"parents": a["parents"].roll(1)}, "parents: got 9 for token 0"),
    (CONV, "tree_packed", lambda a: {"parents": a["parents"][:-1]}, r"parents: got .*\[total_tokens\] = \[9\]"),
    (CONV, "tree", lambda a: {"x": a["x"][..., 0], "parents": _index([-1] * 3)}, "parents: given with one token a seq"),
]


@pytest.mark.parametrize(
    ("op", "case", "changes", "message"), [pytest.param(*bad, id=f"{bad[0]}-{i}") for i, bad in enumerate(REFUSED)]
)
def test_bad_trees_are_named_and_nothing_is_written(
    op: str, case: str, changes: Callable[[Arguments], Arguments], message: str
) -> None:
    arguments = build(next(c for c in cases(op) if c.name == case))
    arguments |= changes(arguments)
    pools = {name: arguments[name] for i in OPS[op].mutated if (name := OPS[op].tensors[i]) in arguments}
    before = copied(pools)
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        OPS[op].function(**arguments)
    assert all(torch.equal(pools[name], before[name]) for name in pools)


@pytest.mark.parametrize("case", ["tree", "tree_packed"])
@pytest.mark.parametrize("op", [SSU, CONV])
def test_repeated_calls_still_check_the_order(op: str, case: str) -> None:
    arguments = build(next(c for c in cases(op) if c.name == case))
    for _ in range(4):
        OPS[op].function(**arguments)
    arguments["parents"][..., 0] = 1
    with pytest.raises(ValueError, match=r"^parents: got 1 for token 0"):
        OPS[op].function(**arguments)


def test_what_cannot_run_a_tree_says_so() -> None:
    arguments = build(next(c for c in cases(SSU) if c.name == "tree_slots_by_token"))
    assert any("parents make them a tree" in reason for reason in check.why_not(OPS[SSU], "flashinfer", arguments))
    tensors, options = check.operator_arguments(SSU, arguments)
    reasons = rule.RULES[SSU]("triton", OPS[SSU].named(tensors, options))
    assert "it is for one token a sequence, without parents" in reasons


def test_tokens_that_do_not_exist_have_parents_in_order_too() -> None:
    x, starts = torch.zeros(4, 2), _index([0, 3, 3, 4])
    rows = parents_of(RaggedTokens(x, 1, starts, 3), _index([-1, 0, 0, -1]))
    assert bool((rows < torch.arange(3)).all()) and rows[0].tolist() == [-1, 0, 0]
