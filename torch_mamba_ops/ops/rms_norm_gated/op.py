"""The contract of the gated RMSNorm."""

from __future__ import annotations

from torch import Tensor

from torch_mamba_ops.dispatch import Op
from torch_mamba_ops.ops.checks import check_dtype, check_int, check_rank, check_tensor


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, **options: object) -> Tensor:
    return x.new_empty(x.shape)


OP = Op(
    "rms_norm_gated(Tensor x, Tensor weight, Tensor? bias, Tensor? z, *, float eps, int? group_size, "
    "bool norm_before_gate, str backend) -> Tensor",
    fake=_fake,
    auto=("reference",),
    differentiable=True,
)


def rms_norm_gated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Root-mean-square norm over groups of channels, gated by ``silu(z)`` after or before. Differentiable.

    .. math::
        y = \frac{x}{\sqrt{\mathrm{mean}(x^2) + \epsilon}}\, w + b, \quad\text{times } \mathrm{silu}(z)
        \text{ (norm\_before\_gate)}, \quad\text{or with } x \leftarrow x\,\mathrm{silu}(z) \text{ (Mamba2 models)}

    Args:
        x: ``[..., channels]``, float.
        weight: ``[channels]``.
        bias: ``[channels]``.
        z: like x, the gate.
        eps: added to the mean square.
        group_size: channels that are normalised together; None: all. Divides the channels.
        norm_before_gate: norm first, then gate; else gate first.
        backend: the backend's name; None: as chosen by context, process, environment or automatically.

    Returns:
        ``[..., channels]`` in x's dtype, contiguous.

    Raises:
        ValueError: a shape or device is wrong, or the groups do not divide the channels.
        TypeError: a dtype is wrong.

    Papers: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019); Dao and Gu, "Transformers are SSMs"
    (2024).
    """
    check_rank("x", x, range(1, 9), "[..., channels]")
    check_dtype("x", x)
    channels = x.shape[-1]
    check_tensor("weight", weight, (channels,), "[channels]", x.device)
    if bias is not None:
        check_tensor("bias", bias, (channels,), "[channels]", x.device)
    if z is not None:
        check_tensor("z", z, x.shape, "the shape of x", x.device)
    if group_size is not None:
        check_int("group_size", group_size)
        if group_size <= 0 or channels % group_size != 0:
            raise ValueError(f"group_size: got {group_size}, expected a number that divides the {channels} channels")
    options = {"eps": eps, "group_size": group_size, "norm_before_gate": norm_before_gate}
    result: Tensor = OP(backend, (x, weight, bias, z), options)
    return result
