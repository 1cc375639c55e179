"""How the scan's kernels are started for dense and for packed batches, and what they cannot run."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from torch_mamba_ops.ops.launch import INTERPRET, Launch, launch, reasons_against_triton, why_not_descriptors
from torch_mamba_ops.tuning import Config, configs_for, key_of

_LARGEST_STATE = 512
_HEADS = 8  # of a program that prepares a chunk


def why_not(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *tensors: Tensor | None, **options: Any) -> list[str]:
    """Why the kernels cannot run these arguments of either scan."""
    reasons = reasons_against_triton((x, dt, A, B, *tensors))
    if B.shape[-1] > _LARGEST_STATE:
        reasons.append(f"it holds states in registers, up to {_LARGEST_STATE} numbers a channel, not {B.shape[-1]}")
    return reasons


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    computed: Tensor | None,
    *,
    initial: Tensor | None,
    initial_is: str,
    has_initial: Tensor | None,
    final: Tensor | None,
    row_final: Tensor | None,
    slots: Tensor | None,
    pool: bool,
    pad_slot_id: int,
    chunk_size: int,
    dt_softplus: bool,
    dt_min: float | None,
    dt_max: float | None,
) -> Tensor:
    """The outputs; writes the states. What is named as in ``ssd_kernels.scan`` is explained there.

    Tokens are ``[batch, length]`` or, of the packed scan, ``[tokens]``; ``cu_seqlens`` may also divide a batch of one.
    """
    heads, head_dim = x.shape[-2:]
    groups, size = B.shape[-2:]
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    config = _config(x.dtype, heads, head_dim, size, sequences, x.device)
    block = config["BLOCK_Q"]
    chunk = min(chunk_size, block)
    length = x.shape[-3]
    # A packed sequence may begin and end in the middle of a chunk.
    chunks = sequences * ((length + chunk - 1) // chunk) if cu_seqlens is None else length // chunk + 2 * sequences
    # Not float16: a state can be larger than its largest number; TF32 keeps as many digits.
    product = torch.bfloat16 if {x.dtype, B.dtype, C.dtype} == {torch.bfloat16} else torch.float32
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    totals = x.new_empty((heads, chunks), dtype=torch.float32)
    decays = x.new_empty((chunks, heads, 2, block), dtype=torch.float32)
    scales = torch.empty_like(decays)
    scores = x.new_empty((groups + heads, math.prod(x.shape[:-2]), block), dtype=product)
    launch(
        _prepare, dt, A, B, C, dt_bias, seq_idx, cu_seqlens, computed, totals, decays, scales, scores, x.dtype, chunk,
        dt_softplus, dt_min, dt_max,
    )  # fmt: skip
    launch(
        _scan, x, B, C, D, z, cu_seqlens, computed, totals, decays, scales, scores, initial, has_initial,
        slots, out, final, row_final, initial_is, pool, pad_slot_id, chunk,
    )  # fmt: skip
    return out


def _prepare(
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    computed: Tensor | None,
    totals: Tensor,
    decays: Tensor,
    scales: Tensor,
    scores: Tensor,
    dtype: torch.dtype,
    chunk: int,
    dt_softplus: bool,
    dt_min: float | None,
    dt_max: float | None,
) -> Launch:
    from torch_mamba_ops.ops import ssd_kernels

    chunks, heads, _, block = decays.shape
    groups, size = B.shape[-2:]
    ratio = heads // groups
    return Launch(
        ssd_kernels.prepare,
        (chunks, groups, (ratio + _HEADS - 1) // _HEADS),
        {
            "totals": totals,
            "decays": decays,
            "scales": scales,
            "scores": scores,
            "cu_seqlens": cu_seqlens,
            "computed": computed,
            "seq_idx": seq_idx,
            "dt_bias": dt_bias,
            "dt": dt,
            "B": B,
            "C": C,
            "A": A,
        },
        dict(
            **_packing(dt.shape[:-1], cu_seqlens, chunk),
            dt_min=0.0 if dt_min is None else dt_min,
            dt_max=0.0 if dt_max is None else dt_max,
            **_tokens("dt", dt, 1),
            **_tokens("B", B, 2),
            **_tokens("C", C, 2),
            **_tokens("seq_idx", seq_idx, 0),
            **_inner("DT", dt, "HEAD"),
            **_inner("A", A, "HEAD"),
            **_inner("B", B, "GROUP", "N"),
            **_inner("C", C, "GROUP", "N"),
            **_inner("DT_BIAS", dt_bias, "HEAD"),
            GROUPS=groups,
            N=size,
            RATIO=ratio,
            CHUNK=chunk,
            DT_SOFTPLUS=dt_softplus,
            HAS_DT_MIN=dt_min is not None,
            HAS_DT_MAX=dt_max is not None,
            HAS_DT_BIAS=dt_bias is not None,
            HAS_SEQ_IDX=seq_idx is not None,
            HAS_COMPUTED=computed is not None,
            PACKED=cu_seqlens is not None,
            PRECISION=_precision(dtype, B.dtype, C.dtype),
            INTERPRETED=INTERPRET,
            BLOCK_Q=block,
            BLOCK_N=_power_of_two(size),
            BLOCK_H=_HEADS,
            num_warps=4,
        ),
    )


def _scan(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    computed: Tensor | None,
    totals: Tensor,
    decays: Tensor,
    scales: Tensor,
    scores: Tensor,
    initial: Tensor | None,
    has_initial: Tensor | None,
    slots: Tensor | None,
    out: Tensor,
    final: Tensor | None,
    row_final: Tensor | None,
    initial_is: str,
    pool: bool,
    pad_slot_id: int,
    chunk: int,
) -> Launch:
    from torch_mamba_ops.ops import ssd_kernels

    heads, head_dim = x.shape[-2:]
    size = B.shape[-1]
    sequences = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else x.shape[0]
    config = _config(x.dtype, heads, head_dim, size, sequences, x.device)
    tma = config.pop("TMA", False) and not why_not_tma(x, B, C, out, chunk, config["BLOCK_Q"])
    return Launch(
        ssd_kernels.scan,
        ((head_dim + config["BLOCK_P"] - 1) // config["BLOCK_P"], heads, sequences),
        {
            "out": out,
            "final": final,
            "row_final": row_final,
            "initial": initial,
            "cu_seqlens": cu_seqlens,
            "slots": slots,
            "has_initial": has_initial,
            "computed": computed,
            "D": D,
            "z": z,
            "totals": totals,
            "decays": decays,
            "scales": scales,
            "scores": scores,
            "x": x,
            "B": B,
            "C": C,
        },
        dict(
            **_packing(x.shape[:-2], cu_seqlens, chunk),
            all_chunks=totals.shape[1],
            pad_slot_id=pad_slot_id,
            **_tokens("x", x, 2),
            **_tokens("B", B, 2),
            **_tokens("C", C, 2),
            **_tokens("z", z, 2),
            out_batch=out.stride(0) if out.dim() == 4 else 0,
            initial_slot=0 if initial is None else initial.stride(0),
            final_slot=0 if final is None else final.stride(0),
            **_inner("X", x, "HEAD", "DIM"),
            **_inner("B", B, "GROUP", "N"),
            **_inner("C", C, "GROUP", "N"),
            D_HEAD=0 if D is None else D.stride(0),
            D_DIM=0 if D is None or D.dim() == 1 else D.stride(1),
            **_inner("Z", z, "HEAD", "DIM"),
            OUT_TOKEN=heads * head_dim,
            **_inner("INITIAL", initial, "HEAD", "DIM", "N"),
            **_inner("FINAL", final, "HEAD", "DIM", "N"),
            HEADS=heads,
            head_dim=head_dim,
            N=size,
            RATIO=heads // B.shape[-2],
            CHUNK=chunk,
            HAS_D=D is not None,
            HAS_Z=z is not None,
            HAS_COMPUTED=computed is not None,
            PACKED=cu_seqlens is not None,
            POOL=pool,
            HAS_SLOTS=slots is not None,
            INITIAL=initial_is,
            HAS_FINAL=final is not None,
            PRECISION=_precision(x.dtype, B.dtype, C.dtype),
            INTERPRETED=INTERPRET,
            **config,
            TMA=tma,
        ),
        descriptors=tma,
    )


def why_not_tma(x: Tensor, B: Tensor, C: Tensor, out: Tensor, chunk: int, block: int) -> list[str]:
    """Why the scan cannot copy tiles of these tensors by TMA. It then does by pointers, whatever the config says: the
    bits are the same. Fake tensors get the answer of the graph that they stand for."""
    reasons = why_not_descriptors({"x": x, "B": B, "C": C, "out": out})
    if chunk != block:
        reasons.append(f"it copies blocks of {block} tokens, and a chunk has {chunk}")
    if not x.dtype == B.dtype == C.dtype == torch.bfloat16:
        reasons.append(f"it is for bfloat16, and x, B, C are {x.dtype}, {B.dtype}, {C.dtype}")
    return reasons


def _packing(tokens: torch.Size, cu_seqlens: Tensor | None, chunk: int) -> dict[str, Any]:
    length = tokens[-1]
    if cu_seqlens is not None:
        return {"length": length, "sequences": cu_seqlens.shape[0] - 1, "row_chunks": 0}
    return {"length": length, "sequences": tokens[0], "row_chunks": (length + chunk - 1) // chunk}


def _tokens(name: str, tensor: Tensor | None, inner: int) -> dict[str, Any]:
    """Strides over rows and tokens, which stand before ``inner`` dimensions."""
    strides = () if tensor is None else tensor.stride()[: tensor.dim() - inner]
    batch, token = (0, 0, *strides)[-2:]
    return {f"{name}_batch": batch, f"{name}_token": token}


def _inner(name: str, tensor: Tensor | None, *dimensions: str) -> dict[str, Any]:
    strides = tensor.stride()[-len(dimensions) :] if tensor is not None else (0,) * len(dimensions)
    return {f"{name}_{dimension}": stride for dimension, stride in zip(dimensions, strides, strict=True)}


def _precision(*dtypes: torch.dtype) -> str:
    """Of products of float32 numbers."""
    return "tf32x3" if torch.float32 in dtypes else "tf32"


def _power_of_two(size: int) -> int:
    """At least 16, which matrix units ask for."""
    return max(16, 1 << (size - 1).bit_length())


def _config(dtype: torch.dtype, heads: int, head_dim: int, size: int, sequences: Any, device: torch.device) -> Config:
    """How much there is to do decides on speed alone: ``BLOCK_Q``, which changes the bits of a result, is the same for
    all of a key, as a sequence's bits must not depend on what else is in the batch."""
    block_n = _power_of_two(size)
    key = key_of(dtype, P=head_dim, N=size)
    found = configs_for("mamba_chunk_scan_combined", key, heads * sequences, device)
    if found is not None:
        return {"BLOCK_N": block_n, **found}
    config = {"BLOCK_Q": 32, "BLOCK_P": 32 if block_n <= 128 else 16, "num_warps": 4, "num_stages": 1}
    if dtype is torch.bfloat16:
        config["num_stages"] = 2
        shared_memory, generation = _card(device)
        if shared_memory >= 224 * 1024:
            # By TMA where that was measured; later generations have other matrix units.
            config |= {"BLOCK_Q": 64, "BLOCK_P": 64, "num_stages": 3, "TMA": generation == 9}
            if block_n > 128:
                config |= {"BLOCK_P": 32, "num_stages": 2}
    return config | {"BLOCK_P": min(config["BLOCK_P"], _power_of_two(head_dim)), "BLOCK_N": block_n}


@functools.cache
def _card(device: torch.device) -> tuple[int, int]:
    """Bytes of shared memory that a program can have, and the generation; none where there is no such device."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0, 0
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin), int(properties.major)
