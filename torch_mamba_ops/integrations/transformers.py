"""Hugging Face transformers: models with Mamba layers or short convolutions use these operations.

The modeling files look their operations up by module-level name at every call, so replacing those names works before
and after a model is made, under torch.compile and torch.export, and can be taken back.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

import torch_mamba_ops as ops

SUPPORTED = ((5, 17), (5, 24))  # from, and up to but without

_CONVOLUTIONS = ("causal_conv1d_fn", "causal_conv1d_update")
_MAMBA1 = (*_CONVOLUTIONS, "mamba_inner_fn", "mamba_selective_state_update", "mamba_selective_scan")
_MAMBA2 = (
    *_CONVOLUTIONS,
    "mamba2_split_conv1d_scan_combined",
    "mamba2_selective_state_update",
    "mamba2_chunk_scan",
)
MODELS: dict[str, tuple[str, ...]] = {
    "mamba": _MAMBA1,
    "falcon_mamba": _MAMBA1,
    "jamba": _MAMBA1,
    "zamba": (*_CONVOLUTIONS, "mamba_selective_state_update", "mamba_selective_scan"),
    "mamba2": _MAMBA2,
    "bamba": _MAMBA2,
    "falcon_h1": _MAMBA2,
    "zamba2": _MAMBA2,
    "nemotron_h": _MAMBA2,
    "granitemoehybrid": _MAMBA2,
    "lfm2": _CONVOLUTIONS,
    "lfm2_moe": _CONVOLUTIONS,
}

_PARAMETERS = {
    function.__name__: frozenset(inspect.signature(function).parameters)
    for function in (
        ops.causal_conv1d_fn,
        ops.selective_state_update,
        ops.mamba_chunk_scan_combined,
        ops.selective_scan_fn,
    )
}
_originals: dict[tuple[str, str], Any] = {}


def enable() -> tuple[str, ...]:
    """Makes the models of `MODELS` use these operations, in this process. Calling it again changes nothing.

    Returns:
        What is replaced, as ``model.function``.

    Raises:
        ImportError: transformers is missing, of another version than `SUPPORTED`, or lacks a function it should have.
    """
    _check_version()
    if not _originals:
        found = {model: importlib.import_module(f"transformers.models.{model}.modeling_{model}") for model in MODELS}
        missing = [f"{m}.{name}" for m, names in MODELS.items() for name in names if not hasattr(found[m], name)]
        if missing:
            raise ImportError(f"transformers {version('transformers')} lacks {', '.join(missing)}")
        for model, names in MODELS.items():
            for name in names:
                _originals[model, name] = getattr(found[model], name)
                setattr(found[model], name, _REPLACEMENTS[name])
    return tuple(f"{model}.{name}" for model, name in _originals)


def disable() -> None:
    """Gives the models their own functions back."""
    for (model, name), original in _originals.items():
        setattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name, original)
    _originals.clear()


def enabled() -> bool:
    """Whether the models use these operations."""
    return bool(_originals)


def static_cache(model: torch.nn.Module, batch_size: int, max_length: int) -> Any:
    """An empty ``transformers.StaticCache`` for a model, whose tensors are there and stay where they are.

    A cache usually gets its tensors in the first forward. If that is compiled, they are not marked as staying where
    they are, and steps that update them run without CUDA graphs. CUDA graphs are recorded anew for each cache: make one
    of these for a batch size, and ``reset()`` it between prompts.

    Args:
        model: for causal language modeling, on its device and in its dtype.
        batch_size: sequences.
        max_length: tokens that there is room for, with the prompt.
    """
    cache = importlib.import_module("transformers").StaticCache(config=model.config, max_cache_len=max_length)
    parameters = inspect.signature(model.forward).parameters
    ids = torch.zeros((batch_size, 2), dtype=torch.int64, device=next(model.parameters()).device)
    with torch.no_grad():
        model(ids, **{"past_key_values" if "past_key_values" in parameters else "cache_params": cache}, use_cache=True)
    cache.reset()
    return cache


def states_of(cache: Any) -> dict[str, Tensor]:
    """The tensors of a static cache, by layer and name: what an exported prefill returns and an exported step takes.

    ``"0.conv"`` and ``"0.recurrent"`` are a Mamba layer's; ``"1.keys"``, ``"1.values"`` and ``"1.length"`` (tokens so
    far, one number) are an attention layer's; a layer that has both has all. They are the cache's own, not copies.
    """
    states = {}
    for index, layer in enumerate(cache.layers):
        for name, kept in (("conv", "conv_states"), ("recurrent", "recurrent_states")):
            if (tensor := getattr(layer, kept, {}).get(0)) is not None:
                states[f"{index}.{name}"] = tensor
        if getattr(layer, "keys", None) is not None:
            states |= {f"{index}.keys": layer.keys, f"{index}.values": layer.values}
            states[f"{index}.length"] = layer.cumulative_length
    return states


def cache_of(config: Any, max_length: int, states: Mapping[str, Tensor]) -> Any:
    """The static cache that has these tensors, which steps then update in place: the inverse of `states_of`.

    Args:
        config: the model's.
        max_length: that of the cache that the states were made in.
        states: as from `states_of`.
    """
    cache = importlib.import_module("transformers").StaticCache(config=config, max_cache_len=max_length)
    for name, tensor in states.items():
        index, kind = name.split(".")
        layer = cache.layers[int(index)]
        if kind == "conv":
            layer.conv_states[0], layer.conv_kernel_size[0] = tensor, tensor.shape[-1]
            layer.is_conv_states_initialized[0] = layer.has_previous_state[0] = True
        elif kind == "recurrent":
            layer.recurrent_states[0], layer.is_recurrent_states_initialized[0] = tensor, True
        elif kind == "length":
            layer.cumulative_length = tensor
        else:
            setattr(layer, kind, tensor)
            layer.is_initialized = True
        layer.dtype, layer.device = states[name].dtype, tensor.device
    return cache


def _check_version() -> None:
    try:
        installed = version("transformers")
    except PackageNotFoundError:
        raise ImportError("transformers is not installed: pip install 'torch-mamba-ops[transformers]'") from None
    low, high = SUPPORTED
    if not low <= tuple(int(part) for part in installed.split(".")[:2]) < high:
        wanted = f">={low[0]}.{low[1]},<{high[0]}.{high[1]}"
        raise ImportError(f"transformers: got {installed}, expected {wanted}: pip install 'transformers{wanted}'")


# The replacements below take what the models pass. `others` are arguments of the model's forward that models hand down
# to whatever kernel may want them (position_embeddings, output_router_logits), and switches between the models' own
# algorithms (use_mambapy, use_associative_scan): no result depends on them.


def _refuse(name: str, others: dict[str, Any]) -> None:
    """An argument that the operation knows but no model of `MODELS` passes would change results: it is not dropped."""
    known = [other for other in others if other in _PARAMETERS[name]]  # Dynamo of torch 2.11 cannot intersect keys
    if known:
        raise TypeError(
            f"{name}: got {', '.join(known)} through a model's forward, expected it in calls of the operation"
        )


def _causal_conv1d_fn(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
    **others: Any,
) -> Tensor:
    _refuse("causal_conv1d_fn", others)
    out = ops.causal_conv1d_fn(hidden_states, weight, bias, seq_idx=seq_idx, activation=activation)
    assert isinstance(out, Tensor)
    return out


def _causal_conv1d_update(
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    with torch.no_grad():  # models also decode outside of it, and nothing differentiates through a cache
        # Models step by one token and say so as a length of 1; Inductor's template is for x without one.
        out = ops.causal_conv1d_update(hidden_states.squeeze(-1), conv_state, weight, bias, activation)
        return out.view(hidden_states.shape)


def _selective_state_update(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **others: Any,
) -> Tensor:
    _refuse("selective_state_update", others)
    with torch.no_grad():
        return ops.selective_state_update(state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus)


def _mamba2_chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    seq_idx: Tensor | None = None,
    **others: Any,
) -> Any:
    _refuse("mamba_chunk_scan_combined", others)
    return ops.mamba_chunk_scan_combined(
        hidden_states,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=D,
        z=z,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
    )


def _mamba_selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **others: Any,
) -> Any:
    _refuse("selective_scan_fn", others)
    return ops.selective_scan_fn(
        hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state=return_last_state
    )


def _not_fused(*args: Any, **kwargs: Any) -> None:
    """A layer's whole forward in one kernel: None tells the model to go on with the operations."""


_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _causal_conv1d_fn,
    "causal_conv1d_update": _causal_conv1d_update,
    "mamba_inner_fn": _not_fused,
    "mamba_selective_state_update": _selective_state_update,
    "mamba_selective_scan": _mamba_selective_scan,
    "mamba2_split_conv1d_scan_combined": _not_fused,
    "mamba2_selective_state_update": _selective_state_update,
    "mamba2_chunk_scan": _mamba2_chunk_scan,
}

__all__ = ["MODELS", "SUPPORTED", "cache_of", "disable", "enable", "enabled", "static_cache", "states_of"]
