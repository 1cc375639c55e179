"""What holds for the state space dual scan's kernels on any device: ``python tests/ssd_checks.py NAME DEVICE``.

A process of its own, since Triton's interpreter is chosen before Triton is imported.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import torch_mamba_ops as tmo
from torch_mamba_ops.ops import ssd_launch
from torch_mamba_ops.testing import check
from torch_mamba_ops.tuning import use_config

Arguments = dict[str, Any]
OP = "mamba_chunk_scan_combined"
Q = 16  # tokens of a chunk
TINY = {"BLOCK_Q": Q, "BLOCK_P": 16, "num_warps": 4, "num_stages": 2}


def drawn(
    lengths: Sequence[int],
    device: str,
    dtype: torch.dtype = torch.float32,
    steep: bool = False,
    channels: int = 24,
    size: int = 16,
    heads: int = 4,
) -> Arguments:
    """A packed batch with a pool, whose sequences start from states; ``steep``: nothing is left after a few tokens."""
    generator = torch.Generator().manual_seed(sum(lengths))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tokens = sum(lengths)
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    arguments = {
        "x": normal(tokens, heads, channels).to(dtype),
        "dt": normal(tokens, heads).to(dtype) + (6 if steep else 0),
        "A": -normal(heads).abs() - 1,
        "B": normal(tokens, 2, size).to(dtype),
        "C": normal(tokens, 2, size).to(dtype),
        "D": normal(heads),
        "dt_bias": normal(heads) - 2,
        "states": normal(len(lengths) + 3, heads, channels, size),
        "state_indices": torch.arange(len(lengths), 0, -1, dtype=torch.int32),
        "has_initial_state": torch.ones(len(lengths), dtype=torch.bool),
        "num_computed_tokens": torch.zeros(len(lengths), dtype=torch.int32),
        "cu_seqlens": torch.tensor(starts, dtype=torch.int32),
    }
    return {name: value.to(device) for name, value in arguments.items()}


def scanned(arguments: Arguments, **more: Any) -> tuple[Tensor, Tensor]:
    """Outputs, and the pool after it."""
    given = check.copied(arguments | more)
    out = tmo.mamba_chunk_scan_combined_varlen(chunk_size=Q, dt_softplus=True, backend="triton", **given)
    return out, given["states"]


def part(arguments: Arguments, begin: int, end: int, states: Tensor, slot: int, computed: int = 0) -> Arguments:
    """Some tokens as a batch of one sequence."""
    device = states.device
    return {name: arguments[name][begin:end] for name in ("x", "dt", "B", "C")} | {
        **{name: arguments[name] for name in ("A", "D", "dt_bias")},
        "states": states,
        "state_indices": torch.tensor([slot], dtype=torch.int32, device=device),
        "has_initial_state": torch.ones(1, dtype=torch.bool, device=device),
        "num_computed_tokens": torch.tensor([computed], dtype=torch.int32, device=device),
        "cu_seqlens": torch.tensor([0, end - begin], dtype=torch.int32, device=device),
    }


def alone_as_in_a_batch(device: str) -> None:
    """A sequence's bits depend on nothing else in the batch."""
    lengths = (37, 1, 0, 16, 50)
    for dtype, steep in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
        together = drawn(lengths, device, dtype, steep)
        out, states = scanned(together)
        for nth, length in enumerate(lengths):
            begin = sum(lengths[:nth])
            slot = len(lengths) - nth
            own, own_states = scanned(part(together, begin, begin + length, together["states"], slot))
            assert torch.equal(own, out[begin : begin + length]), (dtype, steep, nth)
            assert torch.equal(own_states[slot], states[slot]), (dtype, steep, nth)


def in_parts_as_in_one(device: str) -> None:
    """A sequence has the same bits whether or not it is cut between two chunks: some steep, some mild."""
    for dtype in (torch.float32, torch.bfloat16):
        for change in (_steeper, _steeper_without_inputs, _decaying_at_the_ends):
            whole = change(drawn((5 * Q + 3,), device, dtype))
            out, states = scanned(whole)
            for size in (Q, 2 * Q):
                pool, parts = whole["states"], []
                for begin in range(0, 5 * Q + 3, size):
                    found, pool = scanned(part(whole, begin, min(begin + size, 5 * Q + 3), pool, 1, begin))
                    parts.append(found)
                assert torch.equal(torch.cat(parts), out), (dtype, change, size)
                assert torch.equal(pool, states), (dtype, change, size)


def _steeper(arguments: Arguments) -> Arguments:
    """In the second chunk, by much."""
    arguments["dt"][Q : 2 * Q] += 8
    return arguments


def _steeper_without_inputs(arguments: Arguments) -> Arguments:
    """In the second chunk, by little: what is left of the state has all its digits, and no input hides it."""
    arguments["dt"][Q : 2 * Q] += 1
    arguments["x"][Q:] = 0
    return arguments | {"A": arguments["A"] * (16 / Q)}


def _decaying_at_the_ends(arguments: Arguments) -> Arguments:
    """By more than 2^140 at the first token of the first chunk and the last of the second, by half of it in other
    heads: a state is read undiminished between them, and 2^-140 has few digits."""
    arguments["dt"][:] = -20
    arguments["dt"][0] = arguments["dt"][2 * Q - 1] = 20
    bits = torch.tensor([70.4, 140.4, 70.6, 140.6], device=arguments["dt"].device)
    return arguments | {"A": -bits * math.log(2) / F.softplus(20 + arguments["dt_bias"])}


def cut_anywhere(device: str) -> None:
    """Cut inside a chunk it is the same within rounding, and later chunks lie where they did."""
    whole = drawn((4 * Q,), device)
    out, states = scanned(whole)
    for cut in (1, Q - 1, Q + 5, 3 * Q + 1):
        first, pool = scanned(part(whole, 0, cut, whole["states"], 1))
        second, pool = scanned(part(whole, cut, 4 * Q, pool, 1, cut))
        torch.testing.assert_close(torch.cat([first, second]), out, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pool, states, rtol=1e-4, atol=1e-4)


def other_blocks_and_stages(device: str) -> None:
    """Configs of different work share a chunk's length, and then all bits."""
    arguments = drawn((37, 16), device, torch.bfloat16)
    expected = scanned(arguments)
    others = [{"BLOCK_P": 32}, {"num_stages": 1}, {"num_stages": 3}, {"BLOCK_P": 64}]
    others += [{"BLOCK_P": block, "num_stages": stages, "TMA": True} for block in (16, 32, 64) for stages in (2, 3)]
    for config in others:
        with use_config(OP, TINY | config):
            for given, wanted in zip(scanned(arguments), expected, strict=True):
                assert torch.equal(given, wanted), config


def by_tma_as_by_pointers(device: str) -> None:
    """Tiles have the same bits however they are copied: cut and empty sequences, blocks that are not full, x, B and C
    as slices of one tensor, where all that is not a sequence's is not a number."""
    tma: list[bool] = []
    launch = ssd_launch.launch

    def watched(plan: Any, *given: Any) -> None:
        tma.append(plan(*given).options.get("TMA", False))
        launch(plan, *given)

    ssd_launch.launch = watched
    try:
        for lengths in ((0, 37, 1, 0, 16, 50, 0), (4 * Q,), (3,)):
            for channels, size, steep in ((24, 16, False), (16, 24, True), (40, 40, False)):
                arguments = drawn(lengths, device, torch.bfloat16, steep, channels, size)
                if channels == 24:
                    arguments["dt"][Q : 2 * Q] += 8  # a sequence with chunks of both kinds
                arguments |= _among_no_numbers(arguments)
                numbers = [(7 * nth + 5) % Q for nth in range(len(lengths))]
                counted = torch.tensor(numbers, dtype=torch.int32, device=device)
                for computed in (None, counted) if channels == 24 else (counted,):
                    found = []
                    for config in (TINY, TINY | {"TMA": True}):
                        given = arguments | {"states": arguments["states"].clone(), "num_computed_tokens": computed}
                        with use_config(OP, config):
                            out = tmo.mamba_chunk_scan_combined_varlen(
                                chunk_size=Q, dt_softplus=True, backend="triton", **given
                            )
                        assert out.isfinite().all()
                        found.append((out, given["states"]))
                    assert tma[-3:] == [False, False, True], "prepare, scan, prepare, scan"
                    for pointers, copied in zip(*found, strict=True):
                        assert torch.equal(pointers, copied), (lengths, channels, size, computed)
    finally:
        ssd_launch.launch = launch


def _among_no_numbers(arguments: Arguments) -> Arguments:
    """x, B and C in one tensor, with tokens of no sequence before and after."""
    names = ("x", "B", "C")
    row = torch.cat([arguments[name].flatten(1) for name in names], -1)
    row = F.pad(row, (8, 8, Q, Q), value=float("nan"))
    sizes = [arguments[name].shape[1:] for name in names]
    cut = row.split([8, *(size.numel() for size in sizes), 8], -1)[1:-1]
    views = {name: part.unflatten(1, size) for name, part, size in zip(names, cut, sizes, strict=True)}
    return views | {"dt": F.pad(arguments["dt"], (0, 0, Q, Q)), "cu_seqlens": arguments["cu_seqlens"] + Q}


def turned_products_agree_with_the_equations(device: str) -> None:
    """With 64 channels and more by TMA, products are computed transposed."""
    with use_config(OP, TINY | {"BLOCK_P": 64, "TMA": True}):
        steep_and_mild_agree_with_the_equations(device)


def steep_and_mild_agree_with_the_equations(device: str) -> None:
    """Decays from none to more than float32 has exponents for; more heads in a group than are prepared together."""
    for shift, heads in ((-9.0, 4), (0.5, 20), (2.0, 4), (6.0, 20), (30.0, 4), (100.0, 4)):
        for dtype in (torch.float32, torch.bfloat16):
            arguments = drawn((37, 50), device, dtype, heads=heads)
            arguments["dt"] = (arguments["dt"].float() + shift).to(dtype)
            arguments |= {"chunk_size": Q, "dt_softplus": True}
            given = check.copied(arguments)
            out = tmo.mamba_chunk_scan_combined_varlen(**given, backend="triton")
            op = "mamba_chunk_scan_combined_varlen"
            check.assert_right(op, given, out, check.truth(op, arguments, "triton"))


def sequences_of_a_row_agree_with_the_equations(device: str) -> None:
    """Begun within a chunk, at its end, and of more than one; after the state of the first, steep and mild."""
    for shift in (-9.0, 0.5, 6.0, 30.0):
        for dtype in (torch.float32, torch.bfloat16):
            row = drawn((4 * Q + 3,), device, dtype)
            arguments = {name: row[name][None] for name in ("x", "dt", "B", "C")}
            arguments["dt"] = (arguments["dt"].float() + shift).to(dtype)
            arguments |= {name: row[name] for name in ("A", "D", "dt_bias")}
            bounds = torch.tensor([Q + 5, 3 * Q, 3 * Q + 2], device=device)
            owner = torch.bucketize(torch.arange(4 * Q + 3, device=device), bounds, right=True)
            arguments |= {"seq_idx": owner[None].int(), "initial_states": row["states"][:1]}
            arguments |= {"chunk_size": Q, "dt_softplus": True, "return_final_states": True}
            out = tmo.mamba_chunk_scan_combined(**arguments, backend="triton")
            check.assert_right(OP, arguments, out, check.truth(OP, arguments, "triton"))


if __name__ == "__main__":
    with use_config(OP, TINY):
        globals()[sys.argv[1]](sys.argv[2])
