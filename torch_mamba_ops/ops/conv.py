"""What the causal convolutions share: the weighted sum over a window and the checks of its weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import silu

from torch_mamba_ops.ops.checks import check_rank, check_tensor


def convolve(tap: Callable[[int], Tensor], weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """``y[t] = activation(bias + sum over i of weight[:, i] x[t - (width - 1) + i])`` in float32.

    Args:
        tap: gives for ``i`` the inputs ``x[t - (width - 1) + i]`` of all tokens, ``[..., tokens, dim]``.
        weight: ``[dim, width]``.
        bias: ``[dim]``.
        activation: ``"silu"`` or None.
    """
    y = tap(0).float() * weight[:, 0].float()
    for i in range(1, weight.shape[1]):
        y = y + tap(i).float() * weight[:, i].float()
    if bias is not None:
        y = y + bias.float()
    return silu(y) if activation == "silu" else y


def check_filter(x: Tensor, dim: int, weight: Tensor, bias: Tensor | None, widest: int) -> int:
    """Checks weight and bias; returns the width."""
    check_rank("weight", weight, (2,), "[dim, width]")
    width = weight.shape[1]
    check_tensor("weight", weight, (dim, width), "[dim, width]", x.device)
    if not 2 <= width <= widest:
        raise ValueError(f"weight: got width {width}, expected 2 to {widest}")
    if bias is not None:
        check_tensor("bias", bias, (dim,), "[dim]", x.device)
    return width


def check_window(pool: Tensor, name: str, x: Tensor, dim: int, width: int) -> None:
    """Checks a pool of windows."""
    check_rank(name, pool, (3,), "[slots, dim, columns]")
    slots, _, columns = pool.shape
    check_tensor(name, pool, (slots, dim, columns), "[slots, dim, columns]", x.device)
    if columns < width - 1:
        raise ValueError(f"{name}: got {columns} columns, expected at least width - 1 = {width - 1}")
