"""The selective state update on GPUs: which calls the Triton kernel can run, and how it is started."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_mamba_ops.dispatch import register_backend
from torch_mamba_ops.ops.launch import Launch, launch, reasons_against_triton
from torch_mamba_ops.tuning import configs_for, key_of, version

_INNER = (
    *("STATE_HEAD", "STATE_DIM", "STATE_N", "X_HEAD", "X_DIM", "DT_HEAD", "DT_DIM", "A_HEAD", "A_DIM", "A_N"),
    *("B_GROUP", "B_N", "C_GROUP", "C_N", "D_HEAD", "D_DIM", "Z_HEAD", "Z_DIM", "DT_BIAS_HEAD", "DT_BIAS_DIM"),
    *("OUT_HEAD", "OUT_DIM", "BUFFER_HEAD", "BUFFER_DIM", "BUFFER_N"),
)


def _why_not(state: Tensor, *tensors: Tensor | None, **options: Any) -> list[str]:
    reasons = reasons_against_triton((state, *tensors))
    if state.shape[-1] > 512:
        reasons.append(f"it holds whole states in registers, up to 512 numbers a channel, not {state.shape[-1]}")
    return reasons


@register_backend("selective_state_update", "triton", trace="inline", why_not=_why_not, version=version())
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
    """See ``op.selective_state_update``."""
    # Tokens of no sequence are no program's.
    allocate = torch.empty_like if cu_seqlens is None else torch.zeros_like
    out = allocate(x, memory_format=torch.contiguous_format)
    launch(
        plan, state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, dst_state_batch_indices, cu_seqlens,
        num_accepted_tokens, intermediate_states_buffer, intermediate_state_indices, rand_seed, parents, out,
        dt_softplus, pad_slot_id, disable_state_update, philox_rounds,
        result=out if cu_seqlens is None else None,
    )  # fmt: skip
    return out


def plan(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    read: Tensor | None,
    dst_state_batch_indices: Tensor | None,
    cu_seqlens: Tensor | None,
    num_accepted_tokens: Tensor | None,
    buffer: Tensor | None,
    intermediate_state_indices: Tensor | None,
    rand_seed: Tensor | None,
    parents: Tensor | None,
    out: Tensor,
    dt_softplus: bool,
    pad_slot_id: int,
    disable_state_update: bool,
    philox_rounds: int,
) -> Launch:
    """How the kernel is started for a call, worked out from the metadata of its arguments."""
    from torch_mamba_ops.ops.selective_state_update import kernels

    mamba1 = state.dim() == 3
    heads, head_dim, size = (1, *state.shape[1:]) if mamba1 else state.shape[1:]
    packed = cu_seqlens is not None
    several = not packed and x.dim() == (3 if mamba1 else 4)
    tied = A.dim() == 1
    batch = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else x.shape[0]
    write = read if dst_state_batch_indices is None else dst_state_batch_indices

    def channels(tensor: Tensor | None, last: int) -> tuple[int, ...]:
        """Strides over head, channel and state, of which a tensor has the ``last``; 0 for what it lacks."""
        if tensor is None:
            return (0,) * last
        own = tensor.stride()[tensor.dim() - last + (1 if mamba1 else 0) :]
        return (0, *own) if mamba1 else own

    def tokens(tensor: Tensor | None) -> tuple[int, int]:
        """Strides over sequence and token."""
        if tensor is None:
            return 0, 0
        outer = tensor.stride()
        return (0, outer[0]) if packed else (outer[0], outer[1] if several else 0)

    def slots(tensor: Tensor | None) -> tuple[int, int]:
        if tensor is None:
            return 0, 0
        return tensor.stride(0), tensor.stride(1) if tensor.dim() == 2 else 0

    def columns(tensor: Tensor | None) -> int:
        return tensor.shape[1] if tensor is not None and tensor.dim() == 2 else 1

    per_step = ((dt.stride(-1), 0) if tied else channels(dt, 2), (A.stride(0), 0, 0) if tied else channels(A, 3))
    bias = (dt_bias.stride(0), 0) if tied and dt_bias is not None else channels(dt_bias, 2)
    skip = (D.stride(0), 0) if D is not None and D.dim() == 1 and not mamba1 else channels(D, 2)
    inner = (
        *channels(state, 3), *channels(x, 2), *per_step[0], *per_step[1], *channels(B, 2), *channels(C, 2), *skip,
        *channels(z, 2), *bias, *channels(out, 2), *channels(buffer, 3),
    )  # fmt: skip
    outer: dict[str, int] = {}
    for name, tensor in (("x", x), ("dt", dt), ("B", B), ("C", C), ("z", z), ("out", out)):
        outer[f"{name}_batch"], outer[f"{name}_token"] = tokens(tensor)
    outer["parents_row"], outer["parents_token"] = tokens(parents)
    outer["read_row"], outer["read_column"] = slots(read)
    outer["write_row"], outer["write_column"] = slots(write)
    each = write is not None and write.dim() == 2
    config = _config(head_dim, size, state.dtype, batch * heads, state.device)
    return Launch(
        kernels.selective_state_update,
        ((head_dim + config["BLOCK_P"] - 1) // config["BLOCK_P"], heads, batch),
        {
            "state": state,
            "x": x,
            "dt": dt,
            "A": A,
            "B": B,
            "C": C,
            "D": D,
            "z": z,
            "dt_bias": dt_bias,
            "out": out,
            "read_slots": read,
            "write_slots": write,
            "cu_seqlens": cu_seqlens,
            "accepted": num_accepted_tokens,
            "buffer": buffer,
            "buffer_rows": intermediate_state_indices,
            "rand_seed": rand_seed,
            "parents": parents,
        },
        dict(
            heads=heads,
            head_dim=head_dim,
            length=x.shape[1] if several else 1,
            read_columns=columns(read),
            write_columns=columns(write),
            pad_slot_id=pad_slot_id,
            state_slot=state.stride(0),
            buffer_row=0 if buffer is None else buffer.stride(0),
            buffer_step=0 if buffer is None else buffer.stride(1),
            **outer,
            **dict(zip(_INNER, inner, strict=True)),
            N=size,
            RATIO=1 if mamba1 else heads // B.shape[-2],
            ROUNDS=philox_rounds,
            DT_SOFTPLUS=dt_softplus,
            TIED=tied,
            HAS_D=D is not None,
            HAS_Z=z is not None,
            HAS_DT_BIAS=dt_bias is not None,
            HAS_SLOTS=read is not None,
            HAS_ACCEPTED=num_accepted_tokens is not None,
            WRITE="none" if disable_state_update else "each" if each else "last",
            ELSEWHERE=dst_state_batch_indices is not None,
            PACKED=packed,
            ONE_TOKEN=not packed and not several,
            HAS_BUFFER=buffer is not None,
            HAS_BUFFER_ROWS=intermediate_state_indices is not None,
            STOCHASTIC=rand_seed is not None,
            HAS_PARENTS=parents is not None,
            **config,
        ),
    )


def _config(head_dim: int, size: int, dtype: torch.dtype, work: Any, device: torch.device) -> dict[str, Any]:
    found = configs_for("selective_state_update", key_of(dtype, P=head_dim, N=size), work, device)
    if found is not None:
        return found
    block_n = max(8, 1 << (size - 1).bit_length())  # 8: the places that share a call of the random numbers
    block_p = 1 << (max(1, 4096 // block_n) - 1).bit_length()
    return {"BLOCK_P": min(block_p, 1 << (head_dim - 1).bit_length()), "BLOCK_N": block_n, "num_warps": 4}
