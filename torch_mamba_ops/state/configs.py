"""Hugging Face configurations: which layers of a model keep states, and under which names the sizes stand.

Names are read off the object or dictionary, so that transformers need not be there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .spec import dtype_of

if TYPE_CHECKING:
    from .spec import MambaStateSpec, Options

_BAMBA = {
    "heads": "mamba_n_heads",
    "head_dim": "mamba_d_head",
    "state_size": "mamba_d_state",
    "groups": "mamba_n_groups",
    "conv_width": "mamba_d_conv",
    "chunk_size": "mamba_chunk_size",
    "activation": "hidden_act",
}
_MAMBA2 = {
    "mamba2": {
        "heads": "num_heads",
        "head_dim": "head_dim",
        "state_size": "state_size",
        "groups": "n_groups",
        "conv_width": "conv_kernel",
        "chunk_size": "chunk_size",
        "activation": "hidden_act",
    },
    "bamba": _BAMBA,
    "granitemoehybrid": _BAMBA,
    "falcon_h1": _BAMBA,
    "zamba2": {  # its hidden_act is that of the MLPs
        "heads": "n_mamba_heads",
        "head_dim": "mamba_headdim",
        "state_size": "mamba_d_state",
        "groups": "mamba_ngroups",
        "conv_width": "mamba_d_conv",
        "chunk_size": "chunk_size",
    },
    "nemotron_h": {
        "heads": "mamba_num_heads",
        "head_dim": "mamba_head_dim",
        "state_size": "ssm_state_size",
        "groups": "n_groups",
        "conv_width": "conv_kernel",
        "chunk_size": "chunk_size",
        "activation": "mamba_hidden_act",
    },
}
_MAMBA = {"state_size": "state_size", "conv_width": "conv_kernel", "activation": "hidden_act"}
_MAMBA1 = {
    "mamba": _MAMBA,
    "falcon_mamba": _MAMBA,
    "jamba": {"state_size": "mamba_d_state", "conv_width": "mamba_d_conv", "activation": "hidden_act"},
}
_SHORT_CONV = {"lfm2": {"conv_width": "conv_L_cache"}, "lfm2_moe": {"conv_width": "conv_L_cache"}}
MODELS = tuple(sorted([*_MAMBA2, *_MAMBA1, *_SHORT_CONV]))

_WITH_STATE = ("mamba", "mamba2", "linear_attention", "hybrid", "conv")
_WITHOUT = ("attention", "full_attention", "sliding_attention", "mlp", "moe")


def layers(spec: type[MambaStateSpec], config: Any, options: Options) -> dict[int, MambaStateSpec]:
    """See `MambaStateSpec.from_config`."""
    read = _Reader(config)
    model = read.type
    if model not in MODELS:
        if any("mamba" in name or "ssm" in name for name in read.names()):
            raise ValueError(f"config: got a model of type {model!r}, expected one of {', '.join(MODELS)}")
        return {}
    if options.get("conv_dtype") is None and (given := read("dtype", read("torch_dtype"))) is not None:
        options = {**options, "conv_dtype": dtype_of("conv_dtype", given)}
    if options.get("ssm_dtype") is None and (given := read("mamba_ssm_cache_dtype")) is not None:
        options = {**options, "ssm_dtype": dtype_of("ssm_dtype", given)}
    names = _MAMBA2.get(model) or _MAMBA1.get(model) or _SHORT_CONV[model]
    sizes = {field: read.needed(name) for field, name in names.items()}
    if model in _MAMBA2:
        if sizes["head_dim"] == "auto":
            sizes["head_dim"] = (read("mamba_d_ssm") or _expanded(read)) // sizes["heads"]
        made = spec.mamba2(**sizes, **options)
    elif model in _MAMBA1:
        channels = None if model == "jamba" else read("intermediate_size")  # Jamba's is that of its MLPs
        made = spec.mamba1(channels or _expanded(read), **sizes, **options)
    else:
        made = spec.short_conv(read.needed("hidden_size"), **sizes, **options)
    return dict.fromkeys(_indices(read), made)


class _Reader:
    """Values of a configuration by name; None for what is not there."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self.type: str = self.needed("model_type")

    def __call__(self, name: str, otherwise: Any = None) -> Any:
        found = self._config.get(name) if isinstance(self._config, Mapping) else getattr(self._config, name, None)
        return otherwise if found is None else found

    def needed(self, name: str) -> Any:
        found = self(name)
        if found is None:
            raise ValueError(f"config: got no {name}, expected a Hugging Face configuration, which has one")
        return found

    def names(self) -> Iterable[str]:
        return self._config if isinstance(self._config, Mapping) else vars(self._config)


def _expanded(read: _Reader) -> int:
    return int(read("mamba_expand", read("expand", 2)) * read.needed("hidden_size"))


def _indices(read: _Reader) -> list[int]:
    """The layers that keep a state."""
    kinds = read("layers_block_type", read("layer_types"))
    if kinds is not None:
        for kind in kinds:
            if kind not in (*_WITH_STATE, *_WITHOUT):
                expected = ", ".join((*_WITH_STATE, *_WITHOUT))
                raise ValueError(f"config: got a layer of type {kind!r}, expected one of {expected}")
        return [index for index, kind in enumerate(kinds) if kind in _WITH_STATE]
    if (pattern := read("hybrid_override_pattern")) is not None:  # Nemotron-H: M for Mamba
        return [index for index, letter in enumerate(pattern) if letter == "M"]
    every = range(read.needed("num_hidden_layers"))
    if read.type == "jamba":
        period, offset = read.needed("attn_layer_period"), read.needed("attn_layer_offset")
        return [index for index in every if index % period != offset]
    none_named = every if read.type.startswith("lfm2") else ()
    attention = read("attn_layer_indices", read("full_attn_idxs", none_named))
    return [index for index in every if index not in attention]
