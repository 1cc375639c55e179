"""Mamba2 layers of Hugging Face models on several devices: each has its heads, and one all-reduce ends the layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn.functional import linear, silu

from torch_mamba_ops.integrations import transformers
from torch_mamba_ops.ops import rms_norm_gated

from .split import check_divides, conv_channels_of, groups_of, heads_of, take

_MIXER = (
    *("in_proj", "conv1d", "out_proj", "norm", "A_log", "D", "dt_bias"),
    *("num_heads", "head_dim", "n_groups", "ssm_state_size", "intermediate_size", "conv_dim"),
)


class Mamba2Parallel(ParallelStyle):
    """Tensor parallelism for a Mamba2 mixer, for ``torch.distributed.tensor.parallel.parallelize_module``.

    Works for the mixers of Mamba2, Bamba, Nemotron-H, Falcon-H1, Zamba2 and Granite 4, eager and compiled, and for
    other modules built alike. Each device gets the z, x and dt of its heads from ``in_proj``, with the B and C that
    they use; the convolution's channels and A, D, dt_bias likewise; the norm, which is local where devices hold whole
    groups of it and else sums squares over the devices; and its columns of ``out_proj``, whose output is summed. Where
    the devices do not divide the groups, those that share one each have its B and C.

    The module is changed in place: its parameters become the device's part, plain tensors under the same names, and
    its sizes (``num_heads``, ``n_groups``, ...) the device's. Input and output are whole on every device; the states
    that it makes are those of its heads. Apply it after the weights are loaded, the same on every device.

    Raises:
        ValueError: the mesh has more than one dimension, or its devices cannot split the heads.
        TypeError: the module is no Mamba2 mixer, or was split before.
        RuntimeError: a mixer of transformers while ``integrations.transformers`` is not enabled.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _check(module, device_mesh)
        _Cut(module, device_mesh).apply()
        return module


def _check(module: Any, mesh: DeviceMesh) -> None:
    name = type(module).__name__
    if missing := [attribute for attribute in _MIXER if not hasattr(module, attribute)]:
        raise TypeError(f"module: got {name}, expected a Mamba2 mixer; it has no {', '.join(missing)}")
    for projection in (module.in_proj, module.out_proj):
        if type(projection) is not nn.Linear:
            raise TypeError(
                f"module: got a {name} with projections of {type(projection).__name__}, expected torch.nn.Linear, "
                "not split before"
            )
    if mesh.ndim != 1:
        raise ValueError(f"device_mesh: got {mesh.ndim} dimensions, expected one, as in device_mesh['tp']")
    if module.intermediate_size != module.num_heads * module.head_dim:
        raise ValueError(
            f"module: got {module.intermediate_size} channels, expected {module.num_heads} heads of {module.head_dim}"
        )
    check_divides(f"num_heads of {name}", module.num_heads, mesh.size())
    # Kernels that transformers fetches do a whole layer in one, without a sum over devices.
    if type(module).__module__.startswith("transformers.") and not transformers.enabled():
        raise RuntimeError(
            f"{name}: torch_mamba_ops.integrations.transformers is not enabled, expected a call of its enable() first"
        )


class _Cut:
    """What a device keeps of a mixer."""

    def __init__(self, mixer: Any, mesh: DeviceMesh) -> None:
        self.mixer, self.mesh = mixer, mesh
        devices, device = mesh.size(), mesh.get_local_rank()
        heads, groups, size = mixer.num_heads, mixer.n_groups, mixer.head_dim
        inner = heads * size
        self.heads = heads_of(heads, devices, device)
        self.groups = groups_of(heads, groups, devices, device)
        self.inner = range(self.heads.start * size, self.heads.stop * size)
        self.conv = conv_channels_of(heads, size, groups, mixer.ssm_state_size, devices, device)
        steps = inner + mixer.conv_dim
        self.projected = (
            self.inner,  # z
            *(range(inner + run.start, inner + run.stop) for run in self.conv),
            range(steps + self.heads.start, steps + self.heads.stop),  # dt
        )
        self.shared = groups % devices != 0
        self.norm_groups = groups_of(inner, inner // _norm_group(mixer.norm, inner), devices, device)

    def apply(self) -> None:
        """Leaves the device's part in the mixer."""
        mixer, mesh = self.mixer, self.mesh
        in_proj, conv1d, out_proj = mixer.in_proj, mixer.conv1d, mixer.out_proj
        mixer.in_proj = _Columns(_cut(in_proj.weight, self.projected), _cut(in_proj.bias, self.projected), mesh)
        conv1d.weight, conv1d.bias = _cut(conv1d.weight, self.conv), _cut(conv1d.bias, self.conv)
        if self.shared:
            for parameter in (mixer.in_proj.weight, mixer.in_proj.bias):
                self._sum_gradients(parameter, 2 * len(self.inner))  # after z and x
            for parameter in (conv1d.weight, conv1d.bias):
                self._sum_gradients(parameter, len(self.inner))
        for name in ("A_log", "D", "dt_bias"):
            setattr(mixer, name, _cut(getattr(mixer, name), (self.heads,)))
        if getattr(mixer, "mup_vector", None) is not None:  # Falcon-H1: multipliers of the projection
            mixer.mup_vector = take(mixer.mup_vector, -1, self.projected).clone()
        if getattr(mixer.norm, "weight", None) is not None:
            mixer.norm = self._norm(mixer.norm)
        mixer.out_proj = _Rows(_cut(out_proj.weight, (self.inner,), dim=1), out_proj.bias, mesh)
        mixer.num_heads, mixer.n_groups = len(self.heads), len(self.groups)
        mixer.intermediate_size, mixer.conv_dim = len(self.inner), sum(map(len, self.conv))
        conv1d.in_channels = conv1d.out_channels = conv1d.groups = mixer.conv_dim

    def _norm(self, norm: Any) -> nn.Module:
        inner = self.mixer.num_heads * self.mixer.head_dim
        group = _norm_group(norm, inner)
        return _Norm(
            _cut(norm.weight, (self.inner,)),
            norm.variance_epsilon,
            group,
            getattr(norm, "norm_before_gate", False),
            self.norm_groups if len(self.inner) % group else (),
            inner // group,
            self.mesh,
        )

    def _sum_gradients(self, parameter: nn.Parameter | None, start: int) -> None:
        """Devices that share a group each have its B and C, and must go on having the same: their gradients add up."""
        if parameter is None or not parameter.requires_grad:
            return
        mixer, mesh = self.mixer, self.mesh
        inner, stop = mixer.num_heads * mixer.head_dim, start + 2 * len(self.groups) * mixer.ssm_state_size
        held = [channel - inner for run in self.conv for channel in run][len(self.inner) :]
        rows, whole = torch.tensor(held, device=parameter.device), 2 * mixer.n_groups * mixer.ssm_state_size

        def sum_over_devices(gradient: Tensor) -> Tensor:
            own = gradient[start:stop]
            summed = _sum(own.new_zeros(whole, *own.shape[1:]).index_add(0, rows, own), mesh)
            return torch.cat((gradient[:start], summed[rows], gradient[stop:]))

        parameter.register_hook(sum_over_devices)


class _Columns(nn.Module):
    """The projection into a device's part: whole input, output of its own."""

    def __init__(self, weight: nn.Parameter | None, bias: nn.Parameter | None, mesh: DeviceMesh) -> None:
        super().__init__()
        self.weight, self.bias, self.mesh = weight, bias, mesh

    def forward(self, hidden: Tensor) -> Tensor:
        assert self.weight is not None
        return linear(_shared(hidden, self.mesh), self.weight, self.bias)


class _Rows(nn.Module):
    """The projection out of it: input of its own, output summed over the devices."""

    def __init__(self, weight: nn.Parameter | None, bias: nn.Parameter | None, mesh: DeviceMesh) -> None:
        super().__init__()
        self.weight, self.bias, self.mesh = weight, bias, mesh

    def forward(self, hidden: Tensor) -> Tensor:
        assert self.weight is not None
        out = _sum(linear(hidden, self.weight), self.mesh)
        return out if self.bias is None else out + self.bias


class _Norm(nn.Module):
    """The gated norm of a device's channels. Groups that go over several devices have their squares summed there.

    Args:
        weight: of the device's channels.
        eps: added to the mean square.
        group_size: channels that are normalised together.
        norm_before_gate: norm first, then gate; else gate first.
        spread: the group of each equal block of the device's channels; empty if it has whole groups.
        groups: on all devices.
        mesh: the devices.
    """

    def __init__(
        self,
        weight: nn.Parameter | None,
        eps: float,
        group_size: int,
        norm_before_gate: bool,
        spread: Sequence[int],
        groups: int,
        mesh: DeviceMesh,
    ) -> None:
        super().__init__()
        assert weight is not None
        self.weight, self.variance_epsilon, self.group_size = weight, eps, group_size
        self.norm_before_gate, self.groups, self.mesh = norm_before_gate, groups, mesh
        index = torch.tensor(spread, device=weight.device) if spread else None
        self.spread: Tensor | None
        self.register_buffer("spread", index, persistent=False)

    def forward(self, hidden: Tensor, gate: Tensor | None = None) -> Tensor:
        if self.spread is None:
            return rms_norm_gated(
                hidden, self.weight, None, gate, self.variance_epsilon, self.group_size, self.norm_before_gate
            )
        y = hidden.float()
        if gate is not None and not self.norm_before_gate:
            y = y * silu(gate.float())
        blocks = y.unflatten(-1, (self.spread.shape[0], -1))
        own = blocks.square().sum(-1)
        squares = own.new_zeros(*own.shape[:-1], self.groups).index_add(-1, self.spread, own)
        squares = _shared(_sum(squares, self.mesh), self.mesh)
        mean = squares.index_select(-1, self.spread).unsqueeze(-1) / self.group_size
        y = (blocks * torch.rsqrt(mean + self.variance_epsilon)).flatten(-2) * self.weight.float()
        if gate is not None and self.norm_before_gate:
            y = y * silu(gate.float())
        return y.to(hidden.dtype)


def _norm_group(norm: Any, channels: int) -> int:
    """Channels that a model's norm normalises together."""
    return int(getattr(norm, "group_size", channels // getattr(norm, "n_groups", 1)))


def _cut(parameter: nn.Parameter | None, runs: Sequence[range], dim: int = 0) -> nn.Parameter | None:
    if parameter is None:
        return None
    # A clone, since a view would keep the whole in memory.
    return nn.Parameter(take(parameter.detach(), dim, runs).clone(), requires_grad=parameter.requires_grad)


def _sum(partial: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum over the devices, on each; what is done with it is the same on each."""
    return DTensor.from_local(partial, mesh, [Partial()], run_check=False).redistribute(mesh, [Replicate()]).to_local()


def _shared(whole: Tensor, mesh: DeviceMesh) -> Tensor:
    """The same, which each device uses for its own part: the gradients add up."""
    return DTensor.from_local(whole, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


__all__ = ["Mamba2Parallel"]
