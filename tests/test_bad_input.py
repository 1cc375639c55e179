"""What the state update, the copy, the gated norm and the selective scan refuse: named, and nothing is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import torch_mamba_ops as tmo
from torch_mamba_ops.dispatch import OPS
from torch_mamba_ops.testing import build, cases, copied

Arguments = dict[str, Any]
Bad = tuple[str, Arguments, type[Exception], str]  # case, changes to its arguments, error, start of its message

F16, I16, I32 = torch.float16, torch.int16, torch.int32


def _ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=I32)


def _zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="meta")


def _base(op: str, case: str) -> Arguments:
    return copied(build(next(c for c in cases(op) if c.name == case)))


def _bits(arguments: Arguments, op: str) -> dict[str, Tensor]:
    """What the call may write, as bytes."""
    names = [OPS[op].tensors[i] for i in OPS[op].mutated] + ["out"]
    tensors = {name: arguments[name] for name in names if isinstance(arguments.get(name), Tensor)}
    return {
        name: t.detach().clone().contiguous().flatten().view(torch.uint8)
        for name, t in tensors.items()
        if t.device.type == "cpu"
    }


# In the case mamba2: state [3, 4, 6, 5], x and z [3, 4, 6], dt [3, 4], A and dt_bias [4], B and C [3, 2, 5], D [4, 6].
STATE: list[Bad] = [
    ("mamba2", {"state": None}, TypeError, r"state: got NoneType, expected a tensor \[slots, dim, state\]"),
    ("mamba2", {"state": _zeros(4, 6)}, ValueError, r"state: got shape \[4, 6\], expected \[slots, dim, state\]"),
    ("mamba2", {"state": _zeros(3, 4, 6, 5, dtype=I32)}, TypeError, "state: got dtype torch.int32, .*float32"),
    ("mamba2", {"state": _zeros(2, 4, 6, 5)}, ValueError, "state: got 2 slots, expected 3, .*state_batch_indices"),
    ("mamba2", {"state": _zeros(3, 4, 6, 5, requires_grad=True)}, ValueError, "state: requires grad, .* in place"),
    ("mamba2", {"state": _meta(3, 4, 6, 5)}, ValueError, "x: got device cpu, expected meta"),
    ("mamba2", {"x": [1.0]}, TypeError, r"x: got list, expected a tensor \[batch, heads, head_dim\]"),
    ("mamba2", {"x": _zeros(3, 4)}, ValueError, r"x: got shape \[3, 4\], expected \[batch, heads, head_dim\]"),
    ("mamba2", {"x": _zeros(3, 4, 5)}, ValueError, r"x: got shape \[3, 4, 5\], .*= \[3, 4, 6\]"),
    ("mamba2", {"x": _zeros(3, 4, 6, dtype=I32)}, TypeError, "x: got dtype torch.int32, .*float32"),
    ("mamba2", {"x": _meta(3, 4, 6)}, ValueError, "x: got device meta, expected cpu"),
    ("mamba2", {"dt": None}, TypeError, r"dt: got NoneType, expected a tensor \[tokens, heads\]"),
    ("mamba2", {"dt": _zeros(3, 4, 6)}, ValueError, r"dt: got shape \[3, 4, 6\], .*\[tokens, heads\] = \[3, 4\]"),
    ("mamba2", {"dt": _zeros(3, 4, dtype=torch.bool)}, TypeError, "dt: got dtype torch.bool, .*float32"),
    ("mamba2", {"dt": _meta(3, 4)}, ValueError, "dt: got device meta, expected cpu"),
    ("mamba2", {"state": _zeros(1, 4, 6, 5).expand(3, -1, -1, -1)}, ValueError, "state: got strides .*share memory"),
    ("mamba2", {"x": _zeros(3, 4, 6, requires_grad=True)}, ValueError, "x: requires grad, .*no_grad"),
    ("mamba2", {"out": _zeros(3, 4, 6, requires_grad=True)}, ValueError, "out: requires grad"),
    ("mamba2", {"out": _zeros(4, 6).expand(3, -1, -1)}, ValueError, "out: got strides .*share memory"),
    ("mamba2", {"A": None}, TypeError, r"A: got NoneType, expected a tensor \[heads\]"),
    ("mamba2", {"A": _zeros(1, 4)}, ValueError, r"A: got shape \[1, 4\], expected \[heads\]"),
    ("mamba2", {"D": [1.0]}, TypeError, r"D: got list, expected a tensor \[heads\]"),
    ("mamba2", {"pad_slot_id": "a"}, TypeError, "pad_slot_id: got str, expected an int"),
    ("mamba2", {"A": _zeros(3)}, ValueError, r"A: got shape \[3\], expected \[heads\] = \[4\]"),
    ("mamba2", {"A": _zeros(4, dtype=torch.complex64)}, TypeError, "A: got dtype torch.complex64, .*float32"),
    ("mamba2", {"A": _meta(4)}, ValueError, "A: got device meta, expected cpu"),
    ("mamba1", {"A": _zeros(10, 4)}, ValueError, r"A: got shape \[10, 4\], .*= \[10, 5\]"),
    ("mamba2", {"B": 1.0}, TypeError, r"B: got float, expected a tensor \[tokens, groups, state\]"),
    ("mamba2", {"B": _zeros(3, 5)}, ValueError, r"B: got shape \[3, 5\], expected \[tokens, groups, state\]"),
    ("mamba2", {"B": _zeros(3, 2, 4)}, ValueError, r"B: got shape \[3, 2, 4\], .*= \[3, 2, 5\]"),
    ("mamba2", {"B": _zeros(3, 2, 5, dtype=I32)}, TypeError, "B: got dtype torch.int32, .*float32"),
    ("mamba2", {"B": _meta(3, 2, 5)}, ValueError, "B: got device meta, expected cpu"),
    ("mamba2", {"C": _zeros(3, 4, 5)}, ValueError, r"C: got shape \[3, 4, 5\], .*like B = \[3, 2, 5\]"),
    ("mamba2", {"C": _zeros(3, 2, 5, dtype=I32)}, TypeError, "C: got dtype torch.int32, .*float32"),
    ("mamba2", {"C": _meta(3, 2, 5)}, ValueError, "C: got device meta, expected cpu"),
    ("mamba2", {"B": _zeros(3, 3, 5), "C": _zeros(3, 3, 5)}, ValueError, "B: got 3 groups, .*divides the 4 heads"),
    ("mamba2", {"B": _zeros(3, 0, 5), "C": _zeros(3, 0, 5)}, ValueError, "B: got 0 groups, .*divides the 4 heads"),
    ("mamba2", {"D": _zeros(6)}, ValueError, r"D: got shape \[6\], expected \[heads\] or \[heads, head_dim\] = \[4\]"),
    ("mamba2", {"D": _zeros(4, 5)}, ValueError, r"D: got shape \[4, 5\], .*= \[4, 6\]"),
    ("mamba2", {"D": _zeros(4, dtype=I32)}, TypeError, "D: got dtype torch.int32, .*float32"),
    ("mamba2", {"D": _meta(4)}, ValueError, "D: got device meta, expected cpu"),
    ("mamba2", {"z": _zeros(3, 4)}, ValueError, r"z: got shape \[3, 4\], expected the shape of x = \[3, 4, 6\]"),
    ("mamba2", {"z": _zeros(3, 4, 6, dtype=I32)}, TypeError, "z: got dtype torch.int32, .*float32"),
    ("mamba2", {"z": _meta(3, 4, 6)}, ValueError, "z: got device meta, expected cpu"),
    ("mamba2", {"dt_bias": _zeros(4, 6)}, ValueError, r"dt_bias: got shape \[4, 6\], expected \[heads\] = \[4\]"),
    ("mamba2", {"dt_bias": _zeros(4, dtype=I32)}, TypeError, "dt_bias: got dtype torch.int32, .*float32"),
    ("mamba2", {"dt_bias": _meta(4)}, ValueError, "dt_bias: got device meta, expected cpu"),
    ("mamba2", {"out": [1.0]}, TypeError, "out: got list, expected a tensor the shape of the result"),
    ("mamba2", {"out": _zeros(3, 4)}, ValueError, r"out: got shape \[3, 4\], .*= \[3, 4, 6\]"),
    ("mamba2", {"out": _zeros(3, 4, 6, dtype=F16)}, TypeError, "out: got dtype torch.float16, .*float32"),
    ("mamba2", {"out": _meta(3, 4, 6)}, ValueError, "out: got device meta, expected cpu"),
    ("mamba2", {"max_seqlen": 3}, ValueError, "max_seqlen: got 3 without cu_seqlens, expected both"),
    (
        "mamba2",
        {"backend": "referense"},
        tmo.BackendError,
        "selective_state_update: unknown backend 'referense'; did you mean 'reference'",
    ),
    ("destination_slots", {"state_batch_indices": None}, ValueError, "state: got 9 slots, expected 3, .*_indices"),
    (
        "destination_slots",
        {"state_batch_indices": None, "state": _zeros(3, 4, 6, 5)},
        ValueError,
        "dst_state_batch_indices: given without state_batch_indices, expected both",
    ),
    ("accepted_tokens", {"num_accepted_tokens": [1, 2, 0]}, TypeError, r"num_accepted_tokens: got list, .*\[batch\]"),
    ("accepted_tokens", {"num_accepted_tokens": _ints(1, 2)}, ValueError, r"num_accepted_tokens: .*\[2\], .*= \[3\]"),
    ("accepted_tokens", {"num_accepted_tokens": _zeros(3)}, TypeError, "num_accepted_tokens: .*float32, .*int32"),
    (
        "accepted_tokens",
        {"num_accepted_tokens": _meta(3, dtype=I32)},
        ValueError,
        "num_accepted_tokens: got device meta, .*cpu",
    ),
    (
        "several_tokens",
        {"num_accepted_tokens": _ints(1, 1, 1)},
        ValueError,
        r"state_batch_indices: got \[batch\], expected \[batch, columns\] with num_accepted_tokens",
    ),
    (
        "several_tokens_no_slots",
        {"num_accepted_tokens": _ints(1, 1, 1)},
        ValueError,
        "num_accepted_tokens: given without state_batch_indices, expected both",
    ),
    ("bfloat16", {"rand_seed": torch.tensor([1.0])}, TypeError, "rand_seed: got dtype torch.float32, .*int64"),
    ("bfloat16", {"rand_seed": _ints(1)}, TypeError, "rand_seed: got dtype torch.int32, expected .*int64"),
    ("bfloat16", {"rand_seed": torch.tensor([1, 2])}, ValueError, r"rand_seed: got shape \[2\], .*one element"),
    ("bfloat16", {"rand_seed": torch.tensor([]).long()}, ValueError, r"rand_seed: got shape \[0\], .*one element"),
    ("bfloat16", {"rand_seed": _meta(1, dtype=torch.int64)}, ValueError, "rand_seed: got device meta, expected cpu"),
    (
        "bfloat16",
        {"rand_seed": torch.tensor(1), "philox_rounds": 0},
        ValueError,
        "philox_rounds: got 0, expected at least 1",
    ),
    (
        "mamba2",
        {"rand_seed": torch.tensor(1)},
        TypeError,
        r"state \(with rand_seed\): got dtype torch.float32, .*float16, torch.bfloat16",
    ),
    ("packed", {"x": _zeros(1, 6, 4, 6)}, ValueError, r"x: got shape \[1, 6, 4, 6\], .*total_tokens.* with cu_seqlens"),
    ("packed", {"cu_seqlens": [0, 2, 2, 5]}, TypeError, r"cu_seqlens: got list, expected a tensor \[sequences \+ 1\]"),
    (
        "packed",
        {"cu_seqlens": _zeros(2, 2).int()},
        ValueError,
        r"cu_seqlens: got shape \[2, 2\], .*\[sequences \+ 1\]",
    ),
    ("packed", {"cu_seqlens": _ints(0, 4, 2, 5)}, ValueError, r"cu_seqlens: got \[0, 4, 2, 5\], expected ascending"),
    ("packed", {"cu_seqlens": _ints(0, 2, 2, 50)}, ValueError, r"cu_seqlens: got \[0, 2, 2, 50\], .* from 0 to 6"),
    ("packed", {"cu_seqlens": _ints(-3, 2, 2, 5)}, ValueError, r"cu_seqlens: got \[-3, 2, 2, 5\], .* from 0 to 6"),
    ("packed", {"cu_seqlens": _ints()}, ValueError, "cu_seqlens: got no element"),
    ("packed", {"max_seqlen": 2}, ValueError, "cu_seqlens: got a sequence of 3 tokens, expected at most 2"),
    ("packed", {"max_seqlen": 0}, ValueError, "max_seqlen: got 0, expected at least 1"),
    ("packed", {"max_seqlen": 2.5}, TypeError, "max_seqlen: got float, expected an int"),
    ("packed", {"cu_seqlens": _zeros(4)}, TypeError, "cu_seqlens: got dtype torch.float32, .*int32"),
    ("packed", {"cu_seqlens": _meta(4, dtype=I32)}, ValueError, "cu_seqlens: got device meta, expected cpu"),
    ("packed", {"cu_seqlens": _ints(0, 2, 5)}, ValueError, r"state_batch_indices: got shape \[3\], .*= \[2\]"),
    ("packed", {"max_seqlen": None}, ValueError, "max_seqlen: got None with cu_seqlens, expected a bound"),
]

# In its case the buffer is [9, 4, 4, 6, 5] for three sequences of three tokens.
BUFFER, ROWS = "intermediate_states_buffer", "intermediate_state_indices"
STATE += [
    ("intermediate_states", changes, error, message)
    for changes, error, message in (
        ({BUFFER: [1.0]}, TypeError, f"{BUFFER}: got list, expected a tensor"),
        ({BUFFER: None}, ValueError, f"{ROWS}: given without {BUFFER}, expected both"),
        ({BUFFER: _zeros(9, 4, 6, 5)}, ValueError, rf"{BUFFER}: got shape \[9, 4, 6, 5\], .*\[rows, length, heads"),
        ({BUFFER: _zeros(9, 4, 4, 6, 4)}, ValueError, rf"{BUFFER}: got shape .*= \[9, 4, 4, 6, 5\]"),
        ({BUFFER: _zeros(9, 2, 4, 6, 5)}, ValueError, f"{BUFFER}: got 2 steps a row, expected at least 3"),
        ({BUFFER: _zeros(9, 4, 4, 6, 5, dtype=I32)}, TypeError, f"{BUFFER}: got dtype torch.int32, .*float32"),
        ({BUFFER: _meta(9, 4, 4, 6, 5)}, ValueError, f"{BUFFER}: got device meta, expected cpu"),
        ({BUFFER: _zeros(9, 4, 4, 6, 5, requires_grad=True)}, ValueError, f"{BUFFER}: requires grad, .*in place"),
        ({ROWS: _ints(4, -1, 9)}, ValueError, f"{ROWS}: got slot 9, expected 0 to 8, or -1 for padding"),
        ({ROWS: _ints(4, -2, 0)}, ValueError, f"{ROWS}: got slot -2, expected 0 to 8"),
        ({ROWS: _ints(4)}, ValueError, rf"{ROWS}: got shape \[1\], expected \[batch\] = \[3\]"),
        ({ROWS: _zeros(3)}, TypeError, f"{ROWS}: got dtype torch.float32, .*int32"),
        ({ROWS: _meta(3, dtype=I32)}, ValueError, f"{ROWS}: got device meta, expected cpu"),
    )
]
STATE += [
    ("destination_slots", {name: given}, error, f"{name}: {message}")
    for name in ("state_batch_indices", "dst_state_batch_indices")
    for given, error, message in (
        ([7, 2, 5], TypeError, r"got list, expected a tensor \[batch\] or \[batch, columns\]"),
        (_ints(7, 2), ValueError, r"got shape \[2\], expected \[batch\] or \[batch, columns\] = \[3\]"),
        (_ints(7, 2, 5).view(3, 1, 1), ValueError, r"got shape \[3, 1, 1\], expected \[batch\] or \[batch, columns\]"),
        (_ints(7, 2, 9), ValueError, "got slot 9, expected 0 to 8, or -1 for padding"),
        (_ints(7, -2, 5), ValueError, "got slot -2, expected 0 to 8, or -1 for padding"),
        (_zeros(3), TypeError, "got dtype torch.float32, expected .*int32"),
        (_ints(7, 2, 5).to(I16), TypeError, "got dtype torch.int16, expected .*int32"),
        (_meta(3, dtype=I32), ValueError, "got device meta, expected cpu"),
    )
]
STATE += [
    ("destination_slots", {"dst_state_batch_indices": _ints(7, 7, 5)}, ValueError, "dst.*: got slot 7 twice"),
    ("other_pad_slot", {"state_batch_indices": _ints(7, -1, 5)}, ValueError, ".*got slot -1, .* or 0 for padding"),
]

MANY = torch.arange(9).repeat(20)
# In the case two_pools: both pools [8, 3, 4, 5], three copies.
COPY: list[Bad] = [
    ("two_pools", {"dst_pool": None}, TypeError, r"dst_pool: got NoneType, expected a tensor \[slots, ...\]"),
    ("two_pools", {"src_pool": None}, TypeError, r"src_pool: got NoneType, expected a tensor \[slots, ...\]"),
    ("two_pools", {"dst_pool": _zeros(1, 3, 4, 5).expand(8, -1, -1, -1)}, ValueError, "dst_pool: got strides"),
    ("two_pools", {"dst_indices": _ints(1, 2, 1)}, ValueError, "dst_indices: got slot 1 twice"),
    ("two_pools", {"dst_pool": torch.tensor(1.0)}, ValueError, r"dst_pool: got shape \[\], expected \[slots, ...\]"),
    ("two_pools", {"dst_pool": _zeros(8, 3, 4, 5, dtype=F16)}, TypeError, "src_pool: got dtype .*float32, .*float16"),
    ("two_pools", {"dst_pool": _zeros(8, 3, 4, 5, requires_grad=True)}, ValueError, "dst_pool: requires grad, .*place"),
    ("two_pools", {"dst_pool": _meta(8, 3, 4, 5)}, ValueError, "src_pool: got device cpu, expected meta"),
    ("two_pools", {"src_pool": _zeros(8, 3, 4)}, ValueError, r"src_pool: got shape \[8, 3, 4\], .*= \[8, 3, 4, 5\]"),
    ("two_pools", {"src_pool": _zeros(8, 3, 4, 6)}, ValueError, r"src_pool: got shape .*6\], .*= \[8, 3, 4, 5\]"),
    ("two_pools", {"src_pool": _zeros(8, 3, 4, 5, dtype=F16)}, TypeError, "src_pool: got dtype .*float16, .*float32"),
    ("two_pools", {"src_pool": _meta(8, 3, 4, 5)}, ValueError, "src_pool: got device meta, expected cpu"),
    (
        "two_pools",
        {"src_indices": _ints(1, 2)},
        ValueError,
        r"dst_indices: got shape \[3\], .*like src_indices = \[2\]",
    ),
    (
        "two_pools",
        {"dst_indices": _ints(1, 2)},
        ValueError,
        r"dst_indices: got shape \[2\], .*like src_indices = \[3\]",
    ),
    ("two_pools", {"src_indices": MANY, "dst_indices": MANY}, ValueError, "src_indices: got slot 8, expected 0 to 7"),
    ("two_pools", {"backend": "referense"}, tmo.BackendError, "copy_states: unknown .*did you mean 'reference'"),
]
COPY += [
    ("two_pools", {name: given}, error, f"{name}: {message}")
    for name in ("src_indices", "dst_indices")
    for given, error, message in (
        ([1, 2, 3], TypeError, r"got list, expected a tensor \[copies\]"),
        (_ints(1, 2, 3).view(3, 1), ValueError, r"got shape \[3, 1\], expected \[copies\]"),
        (_ints(1, 2, 8), ValueError, "got slot 8, expected 0 to 7, or -1 for padding"),
        (_ints(1, 2, -2), ValueError, "got slot -2, expected 0 to 7, or -1 for padding"),
        (_zeros(3), TypeError, "got dtype torch.float32, expected .*int32"),
        (_zeros(3, dtype=torch.bool), TypeError, "got dtype torch.bool, expected .*int32"),
        (_meta(3, dtype=I32), ValueError, "got device meta, expected cpu"),
    )
]

# In the case norm_before_gate: x and z [2, 5, 48].
NORM: list[Bad] = [
    ("norm_before_gate", changes, error, message)
    for changes, error, message in (
        ({"x": _zeros(2, 5, 48, dtype=I32)}, TypeError, "x: got dtype torch.int32, expected .*float32"),
        ({"x": _zeros(2, 5, 40)}, ValueError, r"weight: got shape \[48\], expected \[channels\] = \[40\]"),
        ({"x": _meta(2, 5, 48)}, ValueError, "weight: got device cpu, expected meta"),
        ({"weight": None}, TypeError, r"weight: got NoneType, expected a tensor \[channels\]"),
        ({"weight": _zeros(1, 48)}, ValueError, r"weight: got shape \[1, 48\], expected \[channels\] = \[48\]"),
        ({"weight": _zeros(48, dtype=I32)}, TypeError, "weight: got dtype torch.int32, expected .*float32"),
        ({"weight": _meta(48)}, ValueError, "weight: got device meta, expected cpu"),
        ({"bias": 1.0}, TypeError, r"bias: got float, expected a tensor \[channels\]"),
        ({"bias": _zeros(47)}, ValueError, r"bias: got shape \[47\], expected \[channels\] = \[48\]"),
        ({"bias": _zeros(48, dtype=I32)}, TypeError, "bias: got dtype torch.int32, expected .*float32"),
        ({"bias": _meta(48)}, ValueError, "bias: got device meta, expected cpu"),
        ({"z": _zeros(5, 48)}, ValueError, r"z: got shape \[5, 48\], expected the shape of x = \[2, 5, 48\]"),
        ({"z": _zeros(2, 5, 48, dtype=I32)}, TypeError, "z: got dtype torch.int32, expected .*float32"),
        ({"z": _meta(2, 5, 48)}, ValueError, "z: got device meta, expected cpu"),
        ({"group_size": 0}, ValueError, "group_size: got 0, expected a number that divides the 48 channels"),
        ({"group_size": -4}, ValueError, "group_size: got -4, expected a number that divides the 48 channels"),
        ({"group_size": 7}, ValueError, "group_size: got 7, expected a number that divides the 48 channels"),
        ({"group_size": 96}, ValueError, "group_size: got 96, expected a number that divides the 48 channels"),
        ({"backend": "referense"}, tmo.BackendError, "rms_norm_gated: unknown .*did you mean 'reference'"),
    )
]

# In the case plain: u, delta and z [2, 6, 21], A [6, 5], B and C [2, 5, 21], D and delta_bias [6].
SCAN: list[Bad] = [
    ("plain", {"u": None}, TypeError, r"u: got NoneType, expected a tensor \[batch, dim, length\]"),
    ("plain", {"u": _zeros(6, 21)}, ValueError, r"u: got shape \[6, 21\], expected \[batch, dim, length\]"),
    ("plain", {"u": _zeros(2, 6, 21, dtype=I32)}, TypeError, "u: got dtype torch.int32, expected .*float32"),
    ("plain", {"u": _meta(2, 6, 21)}, ValueError, "delta: got device cpu, expected meta"),
    ("plain", {"delta": _zeros(2, 6, 20)}, ValueError, r"delta: got shape .*20\], .*of u = \[2, 6, 21\]"),
    ("plain", {"delta": _zeros(2, 6, 21, dtype=I32)}, TypeError, "delta: got dtype torch.int32, .*float32"),
    ("plain", {"delta": _meta(2, 6, 21)}, ValueError, "delta: got device meta, expected cpu"),
    ("plain", {"A": _zeros(6)}, ValueError, r"A: got shape \[6\], expected \[dim, state\]"),
    ("plain", {"A": _zeros(7, 5)}, ValueError, r"A: got shape \[7, 5\], expected \[dim, state\] = \[6, 5\]"),
    ("plain", {"A": _zeros(6, 5, dtype=torch.complex64)}, TypeError, "A: got dtype torch.complex64, .*float32"),
    ("plain", {"A": _meta(6, 5)}, ValueError, "A: got device meta, expected cpu"),
    ("plain", {"z": _zeros(2, 6)}, ValueError, r"z: got shape \[2, 6\], expected the shape of u = \[2, 6, 21\]"),
    ("plain", {"z": _zeros(2, 6, 21, dtype=I32)}, TypeError, "z: got dtype torch.int32, expected .*float32"),
    ("plain", {"z": _meta(2, 6, 21)}, ValueError, "z: got device meta, expected cpu"),
    ("groups", {"B": _zeros(2, 4, 5, 21)}, ValueError, "B: got 4 groups, expected a number that divides the 6"),
    ("groups", {"B": _zeros(2, 0, 5, 21)}, ValueError, "B: got 0 groups, expected a number that divides the 6"),
    ("plain", {"backend": "referense"}, tmo.BackendError, "selective_scan_fn: unknown .*did you mean 'reference'"),
]
SCAN += [
    ("plain", {name: given}, error, f"{name}: {message}")
    for name in ("B", "C")
    for given, error, message in (
        ([1.0], TypeError, r"got list, expected a tensor \[dim, state\], \[batch, state, length\] or"),
        (_zeros(5), ValueError, r"got shape \[5\], expected \[dim, state\], \[batch, state, length\] or"),
        (_zeros(5, 5), ValueError, r"got shape \[5, 5\], expected \[dim, state\] = \[6, 5\]"),
        (_zeros(2, 5, 20), ValueError, r"got shape \[2, 5, 20\], .*\[batch, state, length\] = \[2, 5, 21\]"),
        (_zeros(2, 2, 4, 21), ValueError, r"got shape \[2, 2, 4, 21\], .*= \[2, 2, 5, 21\]"),
        (_zeros(2, 5, 21, dtype=I32), TypeError, "got dtype torch.int32, expected .*float32"),
        (_meta(2, 5, 21), ValueError, "got device meta, expected cpu"),
    )
]
SCAN += [
    ("plain", {name: given}, error, f"{name}: {message}")
    for name in ("D", "delta_bias")
    for given, error, message in (
        (1.0, TypeError, r"got float, expected a tensor \[dim\]"),
        (_zeros(6, 1), ValueError, r"got shape \[6, 1\], expected \[dim\] = \[6\]"),
        (_zeros(6, dtype=I32), TypeError, "got dtype torch.int32, expected .*float32"),
        (_meta(6), ValueError, "got device meta, expected cpu"),
    )
]

BAD = {"selective_state_update": STATE, "copy_states": COPY, "rms_norm_gated": NORM, "selective_scan_fn": SCAN}
EVERY = [
    pytest.param(op, *bad, id=f"{op}-{bad[0]}-{'-'.join(bad[1])}-{i}")
    for op, table in BAD.items()
    for i, bad in enumerate(table)
]


@pytest.mark.parametrize(("op", "case", "changes", "error", "message"), EVERY)
def test_bad_input_is_named_and_nothing_is_written(
    op: str, case: str, changes: Arguments, error: type[Exception], message: str
) -> None:
    arguments = _base(op, case) | changes
    before = _bits(arguments, op)
    with pytest.raises(error, match=f"^{message}"):
        getattr(tmo, op)(**arguments)
    after = _bits(arguments, op)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(("op", "case"), sorted({(op, bad[0]) for op, table in BAD.items() for bad in table}))
def test_without_the_change_the_call_is_accepted_and_writes(op: str, case: str) -> None:
    arguments = _base(op, case)
    before = _bits(arguments, op)
    getattr(tmo, op)(**arguments)
    after = _bits(arguments, op)
    assert not before or any(not torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("name", ["state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "intermediate_states_buffer"])
def test_out_must_not_share_memory_with_an_input(name: str) -> None:
    arguments = _base("selective_state_update", "intermediate_states")
    shared, out = arguments[name], torch.empty_like(arguments["x"])
    memory = torch.randn(shared.numel() + out.numel() - 1)  # the last place of the one is the first of the other
    arguments[name] = memory[: shared.numel()].view(shared.shape)
    before, bits = memory.clone(), _bits(arguments, "selective_state_update")
    with pytest.raises(ValueError, match=f"^out: shares memory with {name}, expected a tensor of its own"):
        tmo.selective_state_update(**arguments, out=memory[shared.numel() - 1 :].view(out.shape))
    after = _bits(arguments, "selective_state_update")
    assert torch.equal(memory, before) and all(torch.equal(after[n], bits[n]) for n in bits)


def test_pools_may_share_an_allocation_but_no_element() -> None:
    arguments = _base("copy_states", "two_pools")
    want = arguments["dst_pool"].clone()
    tmo.copy_states(**arguments | {"dst_pool": want})
    pages = torch.zeros(8, 2, *arguments["src_pool"].shape[1:])
    pages[:, 0], pages[:, 1] = arguments["src_pool"], arguments["dst_pool"]
    tmo.copy_states(**arguments | {"src_pool": pages[:, 0], "dst_pool": pages[:, 1]})
    assert torch.equal(pages[:, 1], want) and torch.equal(pages[:, 0], arguments["src_pool"])
    memory = torch.zeros(9, 3, 4, 5)
    with pytest.raises(ValueError, match="dst_pool: shares memory with src_pool"):
        tmo.copy_states(**arguments | {"src_pool": memory[:8], "dst_pool": memory[1:]})
    assert not memory.any()


def test_a_state_and_the_buffer_of_its_steps_share_no_element() -> None:
    arguments = _base("selective_state_update", "intermediate_states")
    memory = torch.zeros(9, 4, *arguments["state"].shape[1:])
    with pytest.raises(ValueError, match="intermediate_states_buffer: shares memory with state"):
        tmo.selective_state_update(**arguments | {"state": memory[:, 0], "intermediate_states_buffer": memory})
    assert not memory.any()
