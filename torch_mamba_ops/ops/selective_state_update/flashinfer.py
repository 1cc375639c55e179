"""The selective state update by FlashInfer's CUDA kernels (>= 0.7.2): which calls they can run, and how.

FlashInfer has one kernel for one token and one for several; only the latter knows destination slots, accepted tokens
and a buffer of intermediate states. Both compute an output for padded sequences, which is set to zero afterwards.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_mamba_ops.dispatch import register_backend
from torch_mamba_ops.ops.packing import sequence_of_token

_INSTALLED = importlib.util.find_spec("flashinfer") is not None

_OLDEST = (8, 0)
_BLACKWELL = (10, 0)
# Have cvt.rs; elsewhere its stochastic rounding is emulated, and that flushes subnormal numbers to zero.
_ROUNDS_IN_HARDWARE = ((10, 0), (10, 3), (10, 7))
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# Its kernels for one token and for several are compiled together, so what one refuses the other does too.
_HEAD_DIMS = (64, 128)
_STATE_SIZES = (64, 96, 128, 256)
_HEADS_A_GROUP = (1, 2, 4, 8, 16, 32, 64)
_MOST_TOKENS = 16  # of a sequence: they share shared memory, which holds as many on every supported GPU
_ALIGNMENT = 16  # bytes, of vector loads
_TMA_ALIGNMENT = 128  # bytes, of the first element; its kernel without TMA does with less


def _capability(kind: str, index: int | None) -> tuple[int, int] | None:
    """Of the GPU; None where there is none, as with fake tensors on a machine without."""
    if kind != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(index)


# What torch.compiler.assume_constant_result does, which would load the compiler when the package is imported.
_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _why_not(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state_batch_indices: Tensor | None,
    dst_state_batch_indices: Tensor | None,
    cu_seqlens: Tensor | None,
    num_accepted_tokens: Tensor | None,
    intermediate_states_buffer: Tensor | None,
    intermediate_state_indices: Tensor | None,
    rand_seed: Tensor | None,
    parents: Tensor | None,
    *,
    dt_softplus: bool,
    pad_slot_id: int,
    max_seqlen: int | None,
    disable_state_update: bool,
    philox_rounds: int,
) -> list[str]:
    reasons = []
    capability = _capability(state.device.type, state.device.index)
    if not _INSTALLED:
        reasons.append("it needs flashinfer, which is not installed: pip install flashinfer-python")
    if not state.is_cuda:
        reasons.append(f"it runs on CUDA devices, and the tensors are on {state.device.type}")
    if capability is not None and capability < _OLDEST:
        reasons.append(f"it needs a GPU of compute capability 8.0, not {capability[0]}.{capability[1]}")
    if state.dim() == 3:
        reasons.append("it runs Mamba2, and the state has no heads (Mamba1)")
        return reasons
    if A.dim() == 3:
        reasons.append("it takes one A and dt a head, [heads], and these differ inside a head")
    if D is not None and D.dim() == 2:
        reasons.append("it takes one D a head, [heads], and this differs inside a head")
    heads, head_dim, size = state.shape[1], state.shape[2], state.shape[3]
    if head_dim not in _HEAD_DIMS:
        reasons.append(f"its head_dim is one of {_listed(_HEAD_DIMS)}, not {head_dim}")
    if size not in _STATE_SIZES:
        reasons.append(f"its state size is one of {_listed(_STATE_SIZES)}, not {size}")
    given = (dst_state_batch_indices, cu_seqlens, num_accepted_tokens, intermediate_states_buffer)
    several = _several(x, *given, disable_state_update)
    ratio = heads // B.shape[-2]
    if ratio not in _HEADS_A_GROUP and (several or (capability is not None and capability >= _BLACKWELL)):
        reasons.append(f"its heads a group are one of {_listed(_HEADS_A_GROUP)} here, not {ratio}")
    reasons += _dtype_reasons(state, x, dt, A, (("B", B), ("C", C), ("z", z)), (("D", D), ("dt_bias", dt_bias)))
    reasons += _layout_reasons(state, (("x", x), ("z", z), ("B", B), ("C", C)))

    batch = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else x.shape[0]
    if parents is not None:
        reasons.append("it has each token follow the one before, and parents make them a tree")
    if state.shape[0] < batch:
        reasons.append(f"it needs a slot for each of the {batch} sequences, and the pool has {state.shape[0]}")
    if not -(2**31) <= pad_slot_id < 2**31:
        reasons.append(f"it holds pad_slot_id in 32 bits, and that is {pad_slot_id}")
    tokens = 1
    if several:
        tokens = _tokens(x, cu_seqlens, max_seqlen, intermediate_states_buffer)
        if tokens > _MOST_TOKENS:
            reasons.append(f"it takes up to {_MOST_TOKENS} tokens a sequence, not {tokens}")
    read, write = state_batch_indices, _destination(state_batch_indices, dst_state_batch_indices, disable_state_update)
    if read is not None and dst_state_batch_indices is not None and read.dtype != dst_state_batch_indices.dtype:
        reasons.append("it takes state_batch_indices and dst_state_batch_indices of one dtype")
    if several and write is not None and write.dim() == 2 and write.shape[1] < tokens:
        reasons.append(f"it writes the state after each of {tokens} tokens, and there are {write.shape[1]} columns")
    elif num_accepted_tokens is not None and read is not None and read.shape[1] < tokens:
        reasons.append(f"it reads {tokens} columns of state_batch_indices, and there are {read.shape[1]}")
    if intermediate_states_buffer is not None:
        if not disable_state_update:
            reasons.append("it writes to intermediate_states_buffer or to the state, and this call wants both")
        if intermediate_state_indices is not None:
            reasons.append("it would write out of bounds for padding among intermediate_state_indices")
        if intermediate_states_buffer.dtype != state.dtype:
            reasons.append("it takes an intermediate_states_buffer of the state's dtype")
        if not intermediate_states_buffer.is_contiguous():
            reasons.append("it takes a contiguous intermediate_states_buffer")
    if rand_seed is not None and not disable_state_update:
        if state.dtype != torch.float16:
            reasons.append(f"it rounds float16 states stochastically, not {state.dtype}")
        elif capability not in (None, *_ROUNDS_IN_HARDWARE):
            reasons.append("its stochastic rounding flushes subnormal numbers to zero on this GPU")
    return reasons


def _dtype_reasons(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    like_x: tuple[tuple[str, Tensor | None], ...],
    like_dt: tuple[tuple[str, Tensor | None], ...],
) -> list[str]:
    reasons = []
    for name, tensor in (("state", state), ("x", x), ("dt", dt), ("A", A)):
        if tensor.dtype not in _FLOATS:
            reasons.append(f"its floats have 16 or 32 bits, and {name} is {tensor.dtype}")
    for owner, model, others in (("x", x, like_x), ("dt", dt, like_dt)):
        for name, other in others:
            if other is not None and other.dtype != model.dtype:
                reasons.append(f"it takes {name} in the dtype of {owner}, {model.dtype}, not {other.dtype}")
    return reasons


def _layout_reasons(state: Tensor, inputs: tuple[tuple[str, Tensor | None], ...]) -> list[str]:
    reasons = []
    head_dim, size = state.shape[2], state.shape[3]
    if state.stride(3) != 1 or state.stride(2) != size or state.stride(1) != head_dim * size:
        reasons.append("it takes states that are contiguous inside a slot")
    if not _aligned(state, state.stride(0)) or not _aligned(state, _start(state)):
        reasons.append(f"it takes states whose slots start at multiples of {_ALIGNMENT} bytes")
    for name, tensor in inputs:
        if tensor is None:
            continue
        rows, length = tensor.shape[-2], tensor.shape[-1]
        if tensor.stride(-1) != 1 or (rows > 1 and tensor.stride(-2) != length):
            reasons.append(f"it takes {name} contiguous inside a token")
        apart = [tensor.stride(d) for d in range(tensor.dim() - 2) if tensor.shape[d] > 1]
        if not all(_aligned(tensor, distance) for distance in [*apart, _start(tensor)]):
            reasons.append(f"it takes {name} whose tokens start at multiples of {_ALIGNMENT} bytes")
    return reasons


def _start(tensor: Tensor) -> int | torch.SymInt:
    """Where a tensor starts in its memory. Dynamo cannot tell: inputs are then looked at when the graph runs."""
    return 0 if torch.compiler.is_compiling() else tensor.storage_offset()


def _aligned(tensor: Tensor, elements: int | torch.SymInt) -> bool:
    return bool(elements * tensor.element_size() % _ALIGNMENT == 0)


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(str(number) for number in numbers)


def _several(
    x: Tensor,
    write: Tensor | None,
    cu_seqlens: Tensor | None,
    accepted: Tensor | None,
    buffer: Tensor | None,
    disable_state_update: bool,
) -> bool:
    """Whether the kernel for several tokens runs. That for one would write out of bounds for a padded destination."""
    if x.dim() == 4 or cu_seqlens is not None or accepted is not None or buffer is not None:
        return True
    return write is not None and not disable_state_update


def _tokens(x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, buffer: Tensor | None) -> int:
    """Tokens of a sequence that the kernel is compiled for. It counts the buffer's steps by it."""
    if cu_seqlens is None:
        return x.shape[1] if x.dim() == 4 else 1
    assert max_seqlen is not None
    return max_seqlen if buffer is None else buffer.shape[1]


def _destination(read: Tensor | None, write: Tensor | None, disable_state_update: bool) -> Tensor | None:
    """Slots to write; None: the one slot that was read, or none if the state stays as it is."""
    if disable_state_update:  # FlashInfer would write to destinations all the same
        return None
    if write is None and read is not None and read.dim() == 2:
        return read
    return write


@functools.cache
def _kernel() -> Callable[..., Any]:
    function: Callable[..., Any] = importlib.import_module("flashinfer.mamba").selective_state_update
    return function


@register_backend("selective_state_update", "flashinfer", trace="opaque", why_not=_why_not)
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state_batch_indices: Tensor | None,
    dst_state_batch_indices: Tensor | None,
    cu_seqlens: Tensor | None,
    num_accepted_tokens: Tensor | None,
    intermediate_states_buffer: Tensor | None,
    intermediate_state_indices: Tensor | None,
    rand_seed: Tensor | None,
    parents: Tensor | None,
    *,
    dt_softplus: bool,
    pad_slot_id: int,
    max_seqlen: int | None,
    disable_state_update: bool,
    philox_rounds: int,
) -> Tensor:
    """See ``op.selective_state_update``. With ``rand_seed`` the draws are FlashInfer's, not those of other backends."""
    _, heads, head_dim, size = state.shape
    read, buffer = state_batch_indices, intermediate_states_buffer
    batch = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else x.shape[0]
    if batch == 0 or x.numel() == 0:
        return x.new_zeros(x.shape)
    given = (dst_state_batch_indices, cu_seqlens, num_accepted_tokens, buffer)
    several = _several(x, *given, disable_state_update)
    out = x.new_empty(x.shape)
    results, inputs, steps = out, [None if t is None else _placed(t) for t in (x, B, C, z)], _one_a_head(dt)
    if several and cu_seqlens is None and x.dim() == 3:
        results, steps = out.unsqueeze(1), steps.unsqueeze(1)
        inputs = [None if tensor is None else tensor.unsqueeze(1) for tensor in inputs]
    write = _destination(read, dst_state_batch_indices, disable_state_update)
    if read is not None and read.dim() == 2 and num_accepted_tokens is None:
        read = read[:, 0]
    cache_steps = 0
    if several:
        cache_steps = buffer.shape[1] if buffer is not None else _tokens(x, cu_seqlens, max_seqlen, buffer)
    rows = intermediate_state_indices
    if buffer is not None and rows is None and read is not None:  # FlashInfer would take the slots
        rows = torch.arange(batch, device=read.device, dtype=read.dtype)
    # Not kept from call to call: memory first asked for inside a CUDA graph belongs to that graph.
    skip = dt.new_zeros(heads) if D is None else D
    tma = all(t.data_ptr() % _TMA_ALIGNMENT == 0 for t in (state, *inputs) if t is not None)
    _kernel()(
        state,
        inputs[0],
        steps.as_strided((*steps.shape, head_dim), (*steps.stride()[:-1], 1, 0)),
        _one_a_head(A).as_strided((heads, head_dim, size), (1, 0, 0)),
        inputs[1],
        inputs[2],
        _one_a_head(skip).as_strided((heads, head_dim), (1, 0)),
        z=inputs[3],
        dt_bias=None if dt_bias is None else _one_a_head(dt_bias).as_strided((heads, head_dim), (1, 0)),
        dt_softplus=dt_softplus,
        state_batch_indices=read,
        pad_slot_id=pad_slot_id if read is not None else -1,  # else it would be the number of a sequence
        out=results,
        disable_state_update=disable_state_update,
        intermediate_states_buffer=buffer,
        intermediate_state_indices=rows,
        rand_seed=None if disable_state_update else rand_seed,
        philox_rounds=philox_rounds,
        cache_steps=cache_steps,
        algorithm="auto" if tma or several else "simple",
        dst_state_batch_indices=write,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(),
        num_accepted_tokens=None if num_accepted_tokens is None else num_accepted_tokens.contiguous(),
    )
    if read is not None or cu_seqlens is not None:
        out.masked_fill_(_to_zero(out, read, num_accepted_tokens, cu_seqlens, pad_slot_id), 0.0)
    return out


def _one_a_head(tensor: Tensor) -> Tensor:
    """[..., heads], with heads side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _placed(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where the compiler laid it out otherwise than it was when the backend was chosen."""
    inside = tensor.stride(-1) == 1 and tensor.stride(-2) == tensor.shape[-1]
    if inside and tensor.data_ptr() % _ALIGNMENT == 0 and all(_aligned(tensor, s) for s in tensor.stride()[:-2]):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _to_zero(out: Tensor, read: Tensor | None, accepted: Tensor | None, cu_seqlens: Tensor | None, pad: int) -> Tensor:
    """Whose output is zero: padded sequences and tokens of no sequence, [tokens, 1, ...]."""
    padded = None
    if read is not None:
        if accepted is not None:
            column = (accepted.long() - 1).clamp(min=0, max=read.shape[1] - 1)
            read = read.gather(1, column[:, None])[:, 0]
        padded = read == pad
    if cu_seqlens is not None:
        sequence, _, present = sequence_of_token(cu_seqlens, out.shape[0])
        padded = ~present if padded is None else ~present | padded[sequence]
    assert padded is not None
    return padded.view(-1, *[1] * (out.dim() - 1))
