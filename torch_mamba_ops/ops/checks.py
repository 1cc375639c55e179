"""Checks of arguments. Each error names the argument, what was given and what is expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_mamba_ops.dispatch.mutation import check_disjoint, check_writable

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = (torch.int32, torch.int64)


def check_tensor(
    name: str,
    tensor: Any,
    shape: Sequence[int],
    meaning: str,
    device: torch.device,
    dtypes: Sequence[torch.dtype] = FLOATING,
) -> None:
    """Checks type, shape, device and dtype of a tensor; ``meaning`` names the dimensions, e.g. ``[batch, heads]``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor {meaning}")
    if not _same(tensor.shape, shape):
        raise ValueError(f"{name}: got shape {_listed(tensor.shape)}, expected {meaning} = {_listed(shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: got device {tensor.device}, expected {device}, where the other tensors are")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected one of {', '.join(map(str, dtypes))}")


def _same(shape: Sequence[int], other: Sequence[int]) -> bool:
    """By number: Dynamo inlines three functions to compare two tuples, a twentieth of its time for a model's step."""
    if len(shape) != len(other):
        return False
    for size, wanted in zip(shape, other, strict=True):  # noqa: SIM110 - a generator would be inlined, too
        if size != wanted:
            return False
    return True


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor's values can be checked: on a CPU and outside of tracing. Elsewhere they are the caller's
    contract, since a look would wait for the device."""
    return not torch.compiler.is_compiling() and tensor.device.type == "cpu" and type(tensor) is Tensor


def check_int(name: str, value: Any) -> None:
    """Checks that a number is whole."""
    if not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an int")


def check_rank(name: str, tensor: Any, ranks: Sequence[int], meaning: str) -> None:
    """Checks that ``tensor`` is a tensor of one of the ranks."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor {meaning}")
    if tensor.dim() not in ranks:
        raise ValueError(f"{name}: got shape {_listed(tensor.shape)}, expected {meaning}")


def check_dtype(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype] = FLOATING) -> None:
    """Checks the dtype."""
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected one of {', '.join(map(str, dtypes))}")


def check_groups(name: str, groups: int, count: int, what: str = "heads") -> None:
    """Checks that the groups of B or C divide the heads."""
    if groups == 0 or count % groups != 0:
        raise ValueError(f"{name}: got {groups} groups, expected a number that divides the {count} {what}")


def check_chunk_size(chunk_size: int) -> None:
    """Checks that the chunk size is a positive power of two."""
    if not isinstance(chunk_size, int):
        raise TypeError(f"chunk_size: got {type(chunk_size).__name__}, expected an int")
    if chunk_size <= 0 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size: got {chunk_size}, expected a power of two")


def canonical_activation(activation: str | bool | None) -> str | None:
    """``"silu"`` or None."""
    if activation in (None, False):
        return None
    if activation in ("silu", "swish", True):
        return "silu"
    raise ValueError(f"activation: got {activation!r}, expected None, 'silu' or 'swish'")


def check_out(out: Any, like: Tensor, inputs: dict[str, Tensor | None]) -> None:
    """Checks that ``out`` can take a result with the shape, dtype and device of ``like`` and overlaps no input."""
    check_tensor("out", out, like.shape, "the shape of the result", like.device, (like.dtype,))
    check_writable("out", out)
    check_disjoint("out", out, inputs)


def _listed(shape: Sequence[int]) -> str:
    if torch.compiler.is_compiling():  # Dynamo cannot print symbolic sizes
        return "[another]"
    return f"[{', '.join(map(str, shape))}]"


def check_scan_inputs(
    tokens: tuple[int, ...],
    x: Tensor,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    chunk_size: int,
    D: Any,
    z: Any,
    dt_bias: Any,
) -> int:
    """Checks what the state space dual scans have in common; returns the size of the state."""
    check_chunk_size(chunk_size)
    check_dtype("x", x)
    heads, head_dim = x.shape[-2:]
    device = x.device
    check_tensor("dt", dt, (*tokens, heads), "[tokens, heads]", device)
    check_tensor("A", A, (heads,), "[heads]", device)
    check_rank("B", B, (len(tokens) + 2,), "[tokens, groups, state]")
    groups, size = B.shape[-2:]
    check_tensor("B", B, (*tokens, groups, size), "[tokens, groups, state]", device)
    check_tensor("C", C, (*tokens, groups, size), "[tokens, groups, state], like B", device)
    check_groups("B", groups, heads)
    if D is not None:
        check_rank("D", D, (1, 2), "[heads] or [heads, head_dim]")
        check_tensor("D", D, (heads, head_dim)[: D.dim()], "[heads] or [heads, head_dim]", device)
    if z is not None:
        check_tensor("z", z, x.shape, "the shape of x", device)
    if dt_bias is not None:
        check_tensor("dt_bias", dt_bias, (heads,), "[heads]", device)
    return size


def finite_limits(dt_limit: tuple[float, float]) -> tuple[float | None, float | None]:
    """The limits of the step size, None where there is none: an infinite float in a graph makes an AOTInductor package
    that cannot be loaded."""
    low, high = (float(limit) for limit in dt_limit)
    if not low <= high:
        raise ValueError(f"dt_limit: got ({low}, {high}), expected (low, high) with low <= high")
    return (None if low == -math.inf else low), (None if high == math.inf else high)
