"""Which calls stay an operator in the graph, for Inductor to lower to a template.

The rest is traced inline as before: exported programs, other compilers, and what the template does not cover.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_mamba_ops.dispatch import operation
from torch_mamba_ops.dispatch.op import Lowering, Op
from torch_mamba_ops.ops import launch
from torch_mamba_ops.ops.causal_conv1d_update.triton import is_dense
from torch_mamba_ops.ops.launch import INTERPRET

from .gate import ready, tested


def install() -> None:
    """Tells the operations and the launcher, which know nothing of compilers, to ask."""
    launch.compiler_serves_descriptors = _serves_descriptors
    for name in RULES:
        op = operation(name)
        op.lowering = Lowering(functools.partial(_why_not, op), _tracing)
    if importlib.util.find_spec("flashinfer") is not None:
        # A graph that was tuned may call it: no cache may serve such a graph where it is not installed.
        op = operation("selective_state_update")
        triton = op.backends["triton"]
        op.add(replace(triton, key=triton.key.replace("@", "@flashinfer-", 1)))


def _state_update(backend: str, given: Mapping[str, Any]) -> list[str]:
    state, x = given["state"], given["x"]
    several = "cu_seqlens", "num_accepted_tokens", "intermediate_states_buffer", "intermediate_state_indices", "parents"
    reasons = _reasons(backend, state, x, given, several)
    if x.dim() != state.dim() - 1:
        reasons.append("it is for one token a sequence, and x has a length")
    for name in ("state_batch_indices", "dst_state_batch_indices"):
        if given[name] is not None and given[name].dim() != 1:
            reasons.append(f"it is for one slot a sequence, and {name} has columns")
    return reasons


def _convolution(backend: str, given: Mapping[str, Any]) -> list[str]:
    state, x = given["conv_state"], given["x"]
    several = "cache_seqlens", "num_accepted_tokens", "query_start_loc", "parents"
    reasons = _reasons(backend, state, x, given, several)
    if x.dim() != 2:
        reasons.append("it is for one token a sequence, and x has a length")
    elif not reasons and not is_dense(x, state, given["weight"], given["bias"]):  # which guards strides that change
        reasons.append("it is for channels in vectors of 16 bytes, and some tensor is not laid out for that")
    return reasons


# Every reason why a call is none for the template, by its operator. Called with the name of the backend that the call
# names, and the operator's arguments by name; tensors may be fake.
RULES: dict[str, Callable[[str, Mapping[str, Any]], list[str]]] = {
    "selective_state_update": _state_update,
    "causal_conv1d_update": _convolution,
}


def _reasons(backend: str, state: Any, x: Any, given: Mapping[str, Any], several: Sequence[str]) -> list[str]:
    reasons = []
    if backend != "triton":
        reasons.append(f"it is the triton backend's, and this is {backend}")
    if state.device.type != "cuda":
        reasons.append(f"it is for CUDA devices, and the tensors are on {state.device.type}")
    if INTERPRET:
        reasons.append("Triton's interpreter (TRITON_INTERPRET=1) cannot be compiled")
    reasons += [f"it is for one token a sequence, without {name}" for name in several if given[name] is not None]
    if any(isinstance(size, int) and size == 0 for size in (*state.shape, *x.shape)):
        reasons.append("there is nothing to do")
    return reasons


def _why_not(op: Op, backend: str, tensors: Sequence[Any], options: Mapping[str, Any]) -> list[str]:
    return RULES[op.name](backend, op.named(tensors, options))


def _tracing() -> bool:
    """Inside ``compile_fx``, and not ahead of time: a package's kernels are those of the exported program."""
    return _compiling() and ready()


def _serves_descriptors() -> bool:
    """Inductor's wrapper in Python allocates scratch; that in C++, before torch 2.13, as if there were one program.
    From torch 2.13 on, the former names an allocator in a graph's first launch alone, and threads have their own. Of
    graph inputs it checks at run time the addresses that it took to be multiples of 16 bytes, as they are by their
    offset in storage, and clones those that are not; what it allocates itself is."""
    if not _compiling() or sys.modules["torch._inductor.config"].cpp_wrapper:
        return False
    heuristics = importlib.import_module("torch._inductor.runtime.triton_heuristics")
    return tested() and not hasattr(heuristics.CachingAutotuner, "_build_fast_launcher")


def overlaps_kernels() -> bool:
    """As Inductor does for the kernels that it writes itself, see its ``triton.enable_pdl``."""
    wanted = _compiling() and sys.modules["torch._inductor.config"].triton.enable_pdl
    return bool(wanted) and torch.version.hip is None and torch.cuda.get_device_capability()[0] >= 9


def _compiling() -> bool:
    module = sys.modules.get("torch._inductor.virtualized")
    return module is not None and isinstance(module.V.fake_mode, FakeTensorMode) and not module.V.aot_compilation
