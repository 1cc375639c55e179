"""torch finds out which tensors a Triton kernel writes by making Triton's IR of it, four or five times for each call in
a graph: more than half of the time that tracing a model of many layers takes. For kernels of this package, once does.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

_ANALYSES = ("identify_accessed_tensors", "identify_mutated_tensors")  # of torch 2.13, of 2.11
_PACKAGE = __name__.partition(".")[0]


@functools.cache
def remember() -> None:
    """Has torch keep what it found. A torch that has neither function goes on as it does."""
    wrap = importlib.import_module("torch._higher_order_ops.triton_kernel_wrap")
    for name in _ANALYSES:
        if hasattr(wrap, name):
            setattr(wrap, name, remembering(getattr(wrap, name)))


def remembering(identify: Callable[..., Any]) -> Callable[..., Any]:
    """An analysis of torch's that remembers its results for kernels of this package."""
    known: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(identify)
    def remembered(kernel: Any, kwargs: Mapping[str, Any], tma_descriptor_metadata: Mapping[str, Any]) -> Any:
        configs = getattr(kernel, "configs", ())  # torch makes an autotuner of a kernel and its num_warps
        function = kernel.fn if configs else kernel
        module = str(getattr(function, "__module__", ""))
        if not module.startswith(f"{_PACKAGE}.") or len(configs) > 1 or tma_descriptor_metadata:
            return identify(kernel, kwargs, tma_descriptor_metadata)
        given = {**kwargs, **configs[0].kwargs} if configs else kwargs
        kinds = {name: _kind(value) for name, value in given.items()}
        key = (module, function.__name__, *kinds.items())
        if key in known:
            return known[key]
        found = identify(kernel, kwargs, tma_descriptor_metadata)
        tensors = {name for name, kind in kinds.items() if isinstance(kind, torch.dtype)}
        if not tensors <= _written(found):  # as it says when it fails
            known[key] = found
        return found

    return remembered


def _kind(value: Any) -> Any:
    """What Triton's IR depends on: a tensor's dtype, a number's value if it is known."""
    if isinstance(value, torch.Tensor):
        return value.dtype
    if hasattr(value, "get_dtype"):  # of Inductor
        return value.get_dtype()
    if value is None or isinstance(value, (bool, int, float, str)):
        return type(value), value
    return "symbol"


def _written(found: Any) -> set[str]:
    return set(found) if isinstance(found, list) else {access.name for access in found.read_writes.writes}
