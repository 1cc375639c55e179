"""Starts Triton kernels: as they are in eager mode, as part of the graph while the compiler traces.

This module loads without Triton; kernels stand in modules of their own, imported when a call first needs them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from torch_mamba_ops.tuning import generation

# As Triton reads it, once. The interpreter runs kernels on CPU tensors, for tests.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
_INSTALLED = importlib.util.find_spec("triton") is not None


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def reasons_against_triton(tensors: Sequence[Tensor | None]) -> list[str]:
    """Why Triton kernels cannot run on these tensors, the first of which is never None."""
    found = []
    assert tensors[0] is not None
    device = tensors[0].device.type
    if not _INSTALLED:
        found.append("it needs triton, which is not installed: pip install triton")
    if INTERPRET and torch.compiler.is_compiling():
        found.append("Triton's interpreter (TRITON_INTERPRET=1) cannot be compiled")
    elif not (device == "cuda" or INTERPRET):
        found.append(f"it runs on CUDA devices, and the tensors are on {device}")
    for tensor in tensors:
        if tensor is not None and tensor.is_floating_point() and tensor.dtype not in _FLOATS:
            found.append(f"it computes in float32, and a tensor is {tensor.dtype}")
            break
    return found


@dataclass(frozen=True)
class Launch:
    """How a kernel is started for a call.

    Attributes:
        kernel: a ``triton.jit`` function.
        grid: of programs, up to three numbers; nothing is started if one is zero.
        tensors: its pointers by name. None stands for a pointer that the kernel's options leave unused.
        options: its other arguments, and ``num_warps``, ``num_stages``.
    """

    kernel: Any
    grid: tuple[Any, ...]
    tensors: dict[str, Tensor | None]
    options: dict[str, Any]


def launch(plan: Callable[..., Launch], *given: Any) -> None:
    """Starts the kernel of ``plan(*given)``.

    Working a plan out, and Triton's own reading of some seventy arguments, take ten times as long as starting the
    kernel, so what was compiled is kept by the metadata of ``given``: a plan must depend on nothing else.

    Args:
        plan: makes the `Launch`.
        *given: tensors, None, and plain values. The plan's tensors are some of these.
    """
    first = given[0]
    if isinstance(first, (FakeTensor, FunctionalTensor)):
        _trace(plan(*given))
    elif not first.is_cuda:
        made = plan(*given)
        if 0 not in made.grid:
            made.kernel[made.grid](**made.tensors, **made.options)
    elif first.device.index == torch.cuda.current_device():
        _start(plan, given)
    else:
        with torch.cuda.device(first.device):
            _start(plan, given)


def _trace(made: Launch) -> None:
    if any(isinstance(count, int) and count == 0 for count in made.grid):
        return
    # Any pointer does for one that is not used; it must not be one that is written.
    filler = next(reversed([tensor for tensor in made.tensors.values() if tensor is not None]))
    tensors = {name: filler if tensor is None else tensor for name, tensor in made.tensors.items()}
    torch.library.wrap_triton(made.kernel)[made.grid](**tensors, **made.options)


# The launcher, the function and its metadata; the grid; all arguments, and which of them are addresses of which tensor.
_Started = tuple[tuple[Any, Any, Any], tuple[int, ...], list[Any], list[tuple[int, int]]]
_started: dict[tuple[Any, ...], _Started | None] = {}
_KEPT = 4096  # plans; packed batches have ever new sizes


def _start(plan: Callable[..., Launch], given: tuple[Any, ...]) -> None:
    parts: list[Any] = [plan, generation(), given[0].device.index]
    addresses: list[int] = []
    for value in given:
        if isinstance(value, Tensor):
            address = value.data_ptr()
            parts += (value.shape, value.stride(), value.dtype, address % 16)
            addresses.append(address)
        else:
            parts.append(value)
            addresses.append(0)
    key = tuple(parts)
    if key not in _started:
        if len(_started) >= _KEPT:
            _started.clear()
        _first_start(key, plan(*given), given)
        return
    found = _started[key]
    if found is not None:
        (run, function, metadata), grid, arguments, places = found
        arguments = arguments.copy()
        for place, source in places:
            arguments[place] = addresses[source]  # numbers: Triton asks the driver about each tensor
        stream = torch._C._cuda_getCurrentRawStream(parts[2])
        run(*grid, stream, function, metadata, None, None, None, *arguments)


def _first_start(key: tuple[Any, ...], made: Launch, given: tuple[Any, ...]) -> None:
    """Starts it as Triton does, compiling if need be, and keeps what a later call changes: the addresses."""
    if 0 in made.grid:
        _started[key] = None
        return
    compiled = made.kernel[made.grid](**made.tensors, **made.options)
    tensors = [value for value in given if isinstance(value, Tensor)]
    sources = {id(value): position for position, value in enumerate(given) if isinstance(value, Tensor)}
    if len(sources) < len(tensors):
        return  # one tensor is two arguments; another call's may be two
    arguments = [made.options.get(name) for name in made.kernel.arg_names]
    places = [
        (place, sources[id(made.tensors[name])])
        for place, name in enumerate(made.kernel.arg_names)
        if made.tensors.get(name) is not None
    ]
    launcher = (compiled.run, compiled.function, compiled.packed_metadata)
    _started[key] = (launcher, (*made.grid, 1, 1)[:3], arguments, places)
