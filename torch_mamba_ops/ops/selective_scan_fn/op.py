"""The contract of the selective scan."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_mamba_ops.dispatch import Op
from torch_mamba_ops.ops.checks import check_dtype, check_groups, check_rank, check_tensor


def _fake(u: Tensor, delta: Tensor, A: Tensor, *tensors: Tensor | None, **options: object) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), u.new_empty((u.shape[0], *A.shape), dtype=torch.float32)


OP = Op(
    "selective_scan_fn(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "*, bool delta_softplus, str backend) -> (Tensor out, Tensor last_state)",
    fake=_fake,
    auto=("triton", "reference"),
    differentiable=True,
)


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Selective scan (Mamba1), of any length. Differentiable.

    .. math::
        h_t = e^{\Delta_t A} h_{t-1} + \Delta_t\, u_t B_t, \qquad y_t = (h_t C_t + D u_t) \cdot \mathrm{silu}(z_t),
        \qquad \Delta = \mathrm{softplus}(delta + delta\_bias)

    Args:
        u: ``[batch, dim, length]``, any strides.
        delta: like u.
        A: ``[dim, state]``, real, negative.
        B: ``[batch, state, length]``, ``[batch, groups, state, length]``, or ``[dim, state]`` for all tokens.
        C: any of these, on its own.
        D: ``[dim]``.
        z: like u; the gate.
        delta_bias: ``[dim]``.
        delta_softplus: whether the step size goes through softplus.
        return_last_state: also return the state after the last token.
        backend: the backend's name; None: as chosen by context, process, environment or automatically.

    Returns:
        out ``[batch, dim, length]`` in u's dtype, contiguous; or (out, last_state), the latter
        ``[batch, dim, state]`` float32.

    Raises:
        ValueError: a shape or device is wrong.
        TypeError: a dtype is wrong; a complex A (S4's) is not supported.
        BackendError: the backend asked for is unknown or cannot run this call.

    Paper: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023).
    """
    check_rank("u", u, (3,), "[batch, dim, length]")
    check_dtype("u", u)
    batch, dim, length = u.shape
    device = u.device
    check_tensor("delta", delta, u.shape, "the shape of u", device)
    check_rank("A", A, (2,), "[dim, state]")
    size = A.shape[1]
    check_tensor("A", A, (dim, size), "[dim, state]", device)
    for name, tensor in (("B", B), ("C", C)):
        check_rank(name, tensor, (2, 3, 4), "[dim, state], [batch, state, length] or [batch, groups, state, length]")
        if tensor.dim() == 2:
            check_tensor(name, tensor, (dim, size), "[dim, state]", device)
        elif tensor.dim() == 3:
            check_tensor(name, tensor, (batch, size, length), "[batch, state, length]", device)
        else:
            groups = tensor.shape[1]
            check_tensor(name, tensor, (batch, groups, size, length), "[batch, groups, state, length]", device)
            check_groups(name, groups, dim, "channels")
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None:
            check_tensor(name, vector, (dim,), "[dim]", device)
    if z is not None:
        check_tensor("z", z, u.shape, "the shape of u", device)
    out, last_state = OP(backend, (u, delta, A, B, C, D, z, delta_bias), {"delta_softplus": delta_softplus})
    return (out, last_state) if return_last_state else out
