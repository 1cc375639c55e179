"""What a model's layers will call, and which backend runs each call, without running any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from torch_mamba_ops.dispatch import Explanation, explain
from torch_mamba_ops.startup.calls import Call, calls_of
from torch_mamba_ops.startup.layers import Layers, layers_of
from torch_mamba_ops.startup.scratch import FEW, Size

if TYPE_CHECKING:
    from torch_mamba_ops.startup.layers import Given
    from torch_mamba_ops.state import MambaStateSpec

SAMPLE = Size(FEW + 1, 2 * FEW + 2)  # the choice is the same for other sizes, unless a table sways it


@dataclass(frozen=True)
class Planned:
    """One variant of an operation in one kind of layer.

    Attributes:
        op: the operation.
        variant: what the call is for: ``"decode"``, ``"packed prefill, initial states"``.
        layer: the kind of layer, in words.
        count: how many layers are of this kind.
        backend: what will run it; None if nothing can.
        why: the choice's reason.
        reasons: of each other backend, why it cannot run the call.
    """

    op: str
    variant: str
    layer: str
    count: int
    backend: str | None
    why: str
    reasons: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        against = "".join(f"\n      not {name}: {reason}" for name, reason in self.reasons)
        return f"  {self.op}, {self.variant} -> {self.backend or 'nothing'}: {self.why}{against}"


@dataclass(frozen=True)
class Report:
    """What `prepare` found. Reports of equal layers under equal settings are equal.

    Attributes:
        calls: every variant of every operation that the layers call.
        unknown: why nothing is known of the layers; empty where it is.
    """

    calls: tuple[Planned, ...] = ()
    unknown: str = ""

    def __str__(self) -> str:
        if not self.calls:
            return (
                f"skipped: {self.unknown}" if self.unknown else "no Mamba layer and no short convolution: nothing to do"
            )
        lines: list[str] = []
        for call in self.calls:
            title = f"{call.count} x {call.layer}"
            if title not in lines:
                lines.append(title)
            lines.append(str(call))
        return "\n".join(lines)


def prepare(layers: Given, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Report:
    """Tells which operations these layers will call, which backend will run each call under the settings in force, and
    why. Nothing runs, nothing is allocated or kept, and without such layers nothing is imported either: calling it
    again with other layers or settings tells of those.

    Args:
        layers: a model (Hugging Face transformers, or a module that has a ``config``), its configuration, or the
            `MambaStateSpec` of its layers: one, several, or by index.
        device: where it will run; None: where the model is, else the GPU if there is one.
        dtype: of activations and parameters; None: the model's, else that of the convolution's states.

    Returns:
        A printable report; without calls if the layers need none, or if they are not known (``unknown`` says why).
    """
    found = layers_of(layers)
    place = device_of(found, device)
    planned = tuple(
        _planned(call, describe(spec), count, explained(call, place, SAMPLE))
        for spec, count in found.counts
        for call in calls_of(spec, dtype_of(found, spec, dtype), pooled=found.pooled)
    )
    return Report(planned, found.unknown)


def explained(call: Call, device: torch.device, size: Size, backend: str | None = None) -> Explanation:
    """The choice for a call of this size, on tensors that need no memory."""
    with torch._subclasses.FakeTensorMode():
        return explain(call.op, **call.arguments(device, size), backend=backend)


def device_of(layers: Layers, given: torch.device | str | None) -> torch.device:
    """Where the calls run."""
    device = torch.device(given) if given is not None else layers.device
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def dtype_of(layers: Layers, spec: MambaStateSpec, given: torch.dtype | None) -> torch.dtype:
    """Of the activations of a layer."""
    return given or layers.dtype or spec.conv_dtype


def describe(spec: MambaStateSpec) -> str:
    """A kind of layer in words: ``mamba2 H128 P64 N128 G8, conv 10240 x 4 SD, states float32``."""
    conv = f"conv {spec.conv_dim} x {spec.conv_width} {spec.conv_layout}"
    if spec.kind == "short_conv":
        return f"short_conv, {conv}"
    sizes = f"H{spec.heads} P{spec.head_dim} N{spec.state_size} G{spec.groups}"
    rounding = f" rounded stochastically ({spec.philox_rounds})" if spec.stochastic_rounding else ""
    return f"{spec.kind} {sizes}, {conv}, states {str(spec.ssm_dtype).removeprefix('torch.')}{rounding}"


def _planned(call: Call, layer: str, count: int, told: Explanation) -> Planned:
    reasons = tuple(
        (candidate.name, "; ".join(candidate.reasons)) for candidate in told.candidates if candidate.reasons
    )
    return Planned(call.op, call.variant, layer, count, told.chosen, told.why, reasons)
