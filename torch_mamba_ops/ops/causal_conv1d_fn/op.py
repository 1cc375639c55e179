"""The contract of the causal convolution over dense batches."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_mamba_ops.dispatch import Op
from torch_mamba_ops.dispatch.mutation import check_disjoint, check_writable
from torch_mamba_ops.ops.checks import INTEGER, canonical_activation, check_dtype, check_rank, check_tensor
from torch_mamba_ops.ops.conv import check_filter


def _fake(x: Tensor, *tensors: Tensor | None, **options: object) -> Tensor:
    return torch.empty_like(x)


OP = Op(
    "causal_conv1d_fn(Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? initial_states, *, "
    "str? activation, str backend) -> Tensor",
    fake=_fake,
    auto=("triton", "reference"),
    differentiable=True,
)


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | bool | None = None,
    *,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Causal depthwise convolution of width 2 to 4. Differentiable.

    .. math::
        y_t = \mathrm{activation}\Big(b + \sum_{i=0}^{width-1} w_i\, x_{t-(width-1)+i}\Big)

    Args:
        x: ``[batch, dim, length]``, any strides (channel last as well).
        weight: ``[dim, width]``.
        bias: ``[dim]``.
        seq_idx: int ``[batch, length]``, which sequence a token belongs to: no token sees another sequence.
        initial_states: ``[batch, dim, width - 1]``, the inputs before the first, newest last; None: zeros. They belong
            to the first token's sequence.
        return_final_states: also return the last ``width - 1`` inputs.
        final_states_out: ``[batch, dim, width - 1]``, receives them. Mutated.
        activation: None, or ``"silu"`` (also ``"swish"``).
        backend: the backend's name; None: as chosen by context, process, environment or automatically.

    Returns:
        out ``[batch, dim, length]`` in x's dtype and memory layout; or (out, final_states) with ``[batch, dim,
        width - 1]`` in x's dtype.

    Raises:
        ValueError: a shape, device, width or activation is wrong.
        TypeError: a dtype is wrong.
        BackendError: the backend asked for is unknown or cannot run this call.

    Paper: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), section 3.4.
    """
    check_rank("x", x, (3,), "[batch, dim, length]")
    check_dtype("x", x)
    batch, dim, length = x.shape
    width = check_filter(x, dim, weight, bias, widest=4)
    window = (batch, dim, width - 1)
    if seq_idx is not None:
        check_tensor("seq_idx", seq_idx, (batch, length), "[batch, length]", x.device, INTEGER)
    if initial_states is not None:
        check_tensor("initial_states", initial_states, window, "[batch, dim, width - 1]", x.device)
    if final_states_out is not None:
        if not return_final_states:
            raise ValueError("final_states_out: given without return_final_states, expected both")
        check_tensor("final_states_out", final_states_out, window, "[batch, dim, width - 1]", x.device, (x.dtype,))
        check_writable("final_states_out", final_states_out)
        inputs = {"x": x, "weight": weight, "bias": bias, "initial_states": initial_states}
        check_disjoint("final_states_out", final_states_out, inputs)
    out: Tensor = OP(
        backend, (x, weight, bias, seq_idx, initial_states), {"activation": canonical_activation(activation)}
    )
    if not return_final_states:
        return out
    final_states = _final_states(x, initial_states, width)
    return out, final_states if final_states_out is None else final_states_out.copy_(final_states)


def _final_states(x: Tensor, initial_states: Tensor | None, width: int) -> Tensor:
    """The last inputs, picked by index: a slice would keep the whole text alive, and how many of them stand in x is not
    asked, which would make a graph of its own for texts shorter than the window."""
    batch, dim, length = x.shape
    before = x.new_zeros((batch, dim, width - 1)) if initial_states is None else initial_states.to(x.dtype)
    if length == 0:
        return before.clone()
    position = torch.arange(width - 1, device=x.device) + (length - (width - 1))
    older = before.index_select(2, (position + width - 1).clamp(max=width - 2))
    return torch.where(position < 0, older, x.index_select(2, position.clamp(min=0)))
