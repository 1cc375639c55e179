"""The selective scan on GPUs: which calls the Triton kernel can run, and how it is started."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_mamba_ops.dispatch import register_backend
from torch_mamba_ops.ops.launch import Launch, launch, reasons_against_triton
from torch_mamba_ops.tuning import configs_for, key_of, version

_LARGEST_STATE = 256


def _why_not(u: Tensor, delta: Tensor, A: Tensor, *tensors: Tensor | None, **options: Any) -> list[str]:
    reasons = reasons_against_triton((u, delta, A, *tensors))
    if A.shape[1] > _LARGEST_STATE:
        reasons.append(f"it holds states in registers, up to {_LARGEST_STATE} numbers a channel, not {A.shape[1]}")
    return reasons


@register_backend("selective_scan_fn", "triton", trace="inline", why_not=_why_not, version=version())
def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    *,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """See ``op.selective_scan_fn``."""
    out = u.new_empty(u.shape)
    last_state = u.new_empty((u.shape[0], *A.shape), dtype=torch.float32)
    launch(_plan, u, delta, A, B, C, D, z, delta_bias, out, last_state, delta_softplus)
    return out, last_state


def _plan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    out: Tensor,
    last_state: Tensor,
    delta_softplus: bool,
) -> Launch:
    from torch_mamba_ops.ops.selective_scan_fn import kernels

    batch, _, length = u.shape
    dim, size = map(int, A.shape)  # the kernel's code depends on them
    b_sharing, c_sharing = _sharing(B, dim), _sharing(C, dim)
    section = math.gcd(b_sharing, c_sharing) or 1
    config = _config(dim, section, size, u.dtype, u.device)
    block_d = config["BLOCK_D"]
    block_n = _power_of_two(size)
    sharing_a_channel = min(block_n, max(1, 32 * config["num_warps"] // block_d))  # threads, in Triton's layout
    strides: dict[str, int] = {}
    for name, tensor, along in (
        ("u", u, ("batch", "channel", "token")),
        ("delta", delta, ("batch", "channel", "token")),
        ("z", z, ("batch", "channel", "token")),
        ("A", A, ("channel", "state")),
        ("D", D, ("channel",)),
        ("bias", delta_bias, ("channel",)),
    ):
        strides |= {f"{name}_{axis}": 0 if tensor is None else tensor.stride(i) for i, axis in enumerate(along)}
    axes = {2: ("channel", "state"), 3: ("batch", "state", "token"), 4: ("batch", "group", "state", "token")}
    for name, tensor in (("B", B), ("C", C)):
        found = dict(zip(axes[tensor.dim()], tensor.stride(), strict=True))
        strides |= {f"{name}_{axis}": found.get(axis, 0) for axis in ("batch", "group", "channel", "state", "token")}
    return Launch(
        kernels.selective_scan_fn,
        (batch * (dim // section) * ((section + block_d - 1) // block_d),),
        {
            "out": out,
            "last_state": last_state,
            "u": u,
            "delta": delta,
            "A": A,
            "B": B,
            "C": C,
            "D": D,
            "z": z,
            "delta_bias": delta_bias,
        },
        dict(
            length=length,
            **strides,
            dim=dim,
            N=size,
            SECTION=section,
            B_SHARING=b_sharing,
            C_SHARING=c_sharing,
            FIXED_B=B.dim() == 2,
            FIXED_C=C.dim() == 2,
            SOFTPLUS=delta_softplus,
            HAS_D=D is not None,
            HAS_Z=z is not None,
            HAS_BIAS=delta_bias is not None,
            HALVINGS=sharing_a_channel.bit_length() - 1,
            BLOCK_N=block_n,
            **config,
        ),
    )


def _sharing(projection: Tensor, dim: int) -> int:
    """How many channels share a group."""
    return dim // int(projection.shape[1]) if projection.dim() == 4 else dim


def _config(dim: int, section: int, size: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Chosen by what a model fixes and never by the batch, so that no sequence's bits depend on what is beside it."""
    found = configs_for("selective_scan_fn", key_of(dtype, N=size), dim, device)
    if found is not None:
        return found
    # A thread has 2 to 4 states of a channel, 64 numbers of a tile, and its share of what has no state. With many
    # channels it has half as many numbers: blocks walk for long, so that all must fit on the GPU at once.
    block_n = _power_of_two(size)
    threads = max(1, block_n // (2 if block_n <= 16 else 4))  # that share a channel
    block_d = min(_power_of_two(section), 16, 256 // threads)
    num_warps = max(1, threads * block_d // 32)
    numbers = 32 if dim > 6144 else 64
    block_t = min(32, numbers * threads // block_n, 256 * num_warps // block_d)
    return {"BLOCK_D": block_d, "BLOCK_T": block_t, "num_warps": num_warps}


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
