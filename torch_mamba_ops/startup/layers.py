"""Which layers of ours a model has: from specs, from a configuration, or from the model itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

if TYPE_CHECKING:
    from torch_mamba_ops.state import MambaStateSpec

    # A configuration is any object or dictionary with a model_type.
    Given: TypeAlias = torch.nn.Module | MambaStateSpec | Iterable[MambaStateSpec] | Mapping[int, MambaStateSpec] | Any


@dataclass(frozen=True)
class Layers:
    """What is known of a model's layers.

    Attributes:
        counts: each kind of layer once, with how many there are.
        pooled: whether states live in a pool of slots, as an engine keeps them, or in a dense batch, as Hugging Face
            transformers do.
        device: where the model is, where there is one.
        dtype: of its parameters.
        unknown: why nothing is known; empty where it is, be it that there are no such layers.
    """

    counts: tuple[tuple[MambaStateSpec, int], ...] = ()
    pooled: bool = True
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    unknown: str = ""


def layers_of(given: Given) -> Layers:
    """Looks at a model, its configuration (object or dictionary), or the specs of its layers (one, several, or by
    index)."""
    if isinstance(given, torch.nn.Module):
        return _of_module(given)
    if hasattr(given, "model_type") or (isinstance(given, Mapping) and "model_type" in given):
        return _of_config(given)
    several = given.values() if isinstance(given, Mapping) else given
    specs: list[Any] = list(several) if isinstance(several, Iterable) else [several]
    for spec in specs:
        if not hasattr(spec, "ssm_shape"):
            raise TypeError(
                f"layers: got {type(spec).__name__}, expected a model, its configuration or MambaStateSpecs"
            )
    return Layers(tuple(Counter(specs).items()))


def _of_module(model: torch.nn.Module) -> Layers:
    configs = (getattr(module, "config", None) for module in model.modules())
    config = next((found for found in configs if hasattr(found, "model_type")), None)
    if config is None:
        return Layers(unknown=f"{type(model).__name__} has no configuration: give the MambaStateSpecs of its layers")
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    found = replace(_of_config(config), pooled=False)
    return found if parameter is None else replace(found, device=parameter.device, dtype=parameter.dtype)


def _of_config(config: Any) -> Layers:
    from torch_mamba_ops.state import MambaStateSpec

    try:
        specs = MambaStateSpec.from_config(config)
    except (ValueError, TypeError) as error:
        return Layers(unknown=f"no layers can be read from the configuration: {error}")
    return Layers(tuple(Counter(specs.values()).items()))
