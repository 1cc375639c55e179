"""Starts Triton kernels: as they are in eager mode, as part of the graph while the compiler traces.

This module loads without Triton; kernels stand in modules of their own, imported when a call first needs them.
"""

from __future__ import annotations

import contextvars
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from torch_mamba_ops.dispatch import repeat
from torch_mamba_ops.ops import written

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


def _no_compiler_does() -> bool:
    return False


# Whether the compiler that is tracing gives kernels scratch memory, and moves inputs that it took to be aligned and are
# not. Set by what knows that compiler, see `inductor.rule`.
compiler_serves_descriptors: Callable[[], bool] = _no_compiler_does


def why_not_descriptors(tensors: dict[str, Tensor]) -> list[str]:
    """Why a kernel cannot make descriptors of these tensors, which are of ``[..., tokens, rows, columns]``.

    Addresses, and all strides but the last, have to be multiples of 16 bytes. Of a fake tensor the place in its storage
    is known, which a compiler that serves descriptors aligns. It may put an intermediate into another's buffer (that of
    a `cat`); with its strides kept it then begins a whole number of tokens in, if it has more than one.
    """
    reasons = []
    for name, tensor in tensors.items():
        *outer, rows, columns = zip(tensor.shape, tensor.stride(), strict=True)
        token = outer.pop()[1]
        steps = [token, *(stride for size, stride in (*outer, rows) if not _known(size == 1))]
        if columns[1] != 1 or _known(token == 0) or not all(_known(step * tensor.itemsize % 16 == 0) for step in steps):
            reasons.append(f"{name} has strides {tuple(tensor.stride())}, expected multiples of 16 bytes, the last 1")
        if not isinstance(tensor, (FakeTensor, FunctionalTensor)):
            if tensor.data_ptr() % 16:
                reasons.append(f"{name} is at address {tensor.data_ptr():#x}, expected a multiple of 16")
        elif not compiler_serves_descriptors():
            reasons.append("nothing is known of its compiler: kernels may get no scratch memory, inputs lie anywhere")
        elif not _known(tensor.storage_offset() * tensor.itemsize % 16 == 0) or not _known(tensor.shape[-3] > 1):
            reasons.append(f"{name} may be at any address, expected a multiple of 16")
    return list(dict.fromkeys(reasons))


def _known(condition: Any) -> bool:
    """Without a guard, where sizes are symbols."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


@dataclass(frozen=True)
class Launch:
    """How a kernel is started for a call.

    Attributes:
        kernel: a ``triton.jit`` function.
        grid: of programs, up to three numbers; nothing is started if one is zero.
        tensors: its pointers by name. None stands for a pointer that the kernel's options leave unused.
        options: its other arguments, and ``num_warps``, ``num_stages``.
        descriptors: whether it makes descriptors of tensors, see `why_not_descriptors`.
    """

    kernel: Any
    grid: tuple[Any, ...]
    tensors: dict[str, Tensor | None]
    options: dict[str, Any]
    descriptors: bool = False


def launch(plan: Callable[..., Launch], *given: Any, result: Tensor | None = None) -> None:
    """Starts the kernel of ``plan(*given)``.

    Working a plan out, and Triton's own reading of some seventy arguments, take ten times as long as starting the
    kernel, so what was compiled is kept by the metadata of ``given``: a plan must depend on nothing else.

    Args:
        plan: makes the `Launch`.
        *given: tensors, None, and plain values. The plan's tensors are some of these.
        result: for a backend that does no more than allocate this one of the tensors, start this kernel, which writes
            all of it, and return it: calls like this one then start from addresses alone, see `repeat.offer`.
    """
    first = given[0]
    if isinstance(first, (FakeTensor, FunctionalTensor)):
        _trace(plan(*given))
    elif not first.is_cuda:
        made = plan(*given)
        if 0 not in made.grid:
            made.kernel[made.grid](**made.tensors, **made.options)
    elif first.device.index == torch.cuda.current_device():
        _start(plan, given, result)
    else:
        with torch.cuda.device(first.device):
            _start(plan, given, None)


def _trace(made: Launch) -> None:
    if any(isinstance(count, int) and count == 0 for count in made.grid):
        return
    written.remember()
    torch.library.wrap_triton(made.kernel)[made.grid](**filled(made.tensors), **made.options)


def filled(tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Any pointer does for one that is not used; it must not be one that is written, as the last one never is."""
    filler = next(reversed([tensor for tensor in tensors.values() if tensor is not None]))
    return {name: filler if tensor is None else tensor for name, tensor in tensors.items()}


def with_scratch(start: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Calls ``start``, which starts a kernel that makes descriptors: Triton has the memory for them from an allocator,
    which belongs to the context. The caller's is left as it is."""
    from triton import set_allocator

    context = contextvars.copy_context()
    context.run(set_allocator, _scratch)
    return context.run(start, *arguments, **options)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Of the stream that is current, as that is the one kernels are started on."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


@dataclass(frozen=True)
class _Kept:
    """A compiled kernel, ready to be started again.

    Attributes:
        run: Triton's launcher. Its arguments are the grid, the stream, the function, then the kernel's.
        head: picks them, to the last that changes, from the addresses of the tensors that were given, the stream and
            ``fixed``.
        fixed: those among them that never change.
        tail: the others, which never change.
    """

    run: Callable[..., None]
    head: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    fixed: tuple[Any, ...]
    tail: tuple[Any, ...]

    def start(self, device: int, addresses: Sequence[int]) -> None:
        """Addresses are numbers: Triton asks the driver about each tensor."""
        stream = torch._C._cuda_getCurrentRawStream(device)
        self.run(*self.head((*addresses, stream, *self.fixed)), *self.tail)


_started: dict[tuple[Any, ...], _Kept | None] = {}
_KEPT = 4096  # plans; packed batches have ever new sizes


def _start(plan: Callable[..., Launch], given: tuple[Any, ...], result: Tensor | None) -> None:
    device, tables = given[0].device.index, repeat.generation()
    parts: list[Any] = [plan, tables, device]
    addresses: list[int] = []
    for value in given:
        if isinstance(value, Tensor):
            address = value.data_ptr()
            parts += (value.shape, value.stride(), value.dtype, address % 16)
            addresses.append(address)
        else:
            parts.append(value)
    key = tuple(parts)
    if key in _started:
        kept = _started[key]
        if kept is not None:
            kept.start(device, addresses)
    else:
        if len(_started) >= _KEPT:
            _started.clear()
        kept = _first_start(key, plan(*given), given)
    if kept is not None and result is not None and repeat.recording():
        _offer(kept, [value for value in given if isinstance(value, Tensor)], result)


def _first_start(key: tuple[Any, ...], made: Launch, given: tuple[Any, ...]) -> _Kept | None:
    """Starts it as Triton does, compiling if need be, and keeps what a later call changes: the addresses."""
    if 0 in made.grid:
        _started[key] = None
        return None
    start = made.kernel[made.grid]
    arguments = made.tensors | made.options
    compiled = with_scratch(start, **arguments) if made.descriptors else start(**arguments)
    tensors = [value for value in given if isinstance(value, Tensor)]
    sources = {id(tensor): position for position, tensor in enumerate(tensors)}
    if len(sources) < len(tensors):
        return None  # one tensor is two arguments; another call's may be two
    grid = (*made.grid, 1, 1)[:3]
    fixed = [*grid, compiled.function, compiled.packed_metadata, None, None, None]  # no hooks
    stream = len(tensors)
    places = [*range(stream + 1, stream + 4), stream, *range(stream + 4, stream + 9)]
    for name in made.kernel.arg_names:
        tensor = made.tensors.get(name)
        if tensor is None:
            fixed.append(made.options.get(name))
            places.append(stream + len(fixed))
        else:
            places.append(sources[id(tensor)])
    head = 1 + max(i for i, place in enumerate(places) if place <= stream)
    early = sum(place > stream for place in places[:head])
    run = partial(with_scratch, compiled.run) if made.descriptors else compiled.run
    kept = _Kept(run, itemgetter(*places[:head]), tuple(fixed[:early]), tuple(fixed[early:]))
    _started[key] = kept
    return kept


def _offer(kept: _Kept, tensors: Sequence[Tensor], result: Tensor) -> None:
    """Lets calls like this one start from the addresses of their tensors."""
    others = [tensor for tensor in tensors if tensor is not result]
    alignment = [tensor.data_ptr() % 16 for tensor in others]  # Triton's code depends on it
    place = next(place for place, tensor in enumerate(tensors) if tensor is result)
    size, stride, dtype, device = result.shape, result.stride(), result.dtype, result.device
    index = device.index

    def start(addresses: list[int]) -> Any:
        if [address % 16 for address in addresses] != alignment:
            return NotImplemented
        if index != torch._C._cuda_getDevice():
            return NotImplemented
        out = torch.empty_strided(size, stride, dtype=dtype, device=device)
        addresses.insert(place, out.data_ptr())
        kept.start(index, addresses)
        return out

    repeat.offer(result, others, start)
