"""Small random models from real Hugging Face configs, one for each family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

VOCABULARY, HIDDEN = 128, 64
_COMMON = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
_MAMBA2_HYBRID = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 32,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
}
_NEMOTRON = {
    **_COMMON,
    **_ATTENTION,
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "chunk_size": 32,
    "max_position_embeddings": 512,
}


def _mamba2() -> Any:
    return hf.Mamba2Config(
        **_COMMON, num_hidden_layers=2, state_size=16, num_heads=8, head_dim=16, n_groups=2, chunk_size=32, expand=2
    )


def _bamba() -> Any:
    return hf.BambaConfig(**_COMMON, **_ATTENTION, **_MAMBA2_HYBRID, num_hidden_layers=3, attn_layer_indices=[1])


def _granite() -> Any:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64}
    kinds = ["mamba", "attention", "mamba"]
    return hf.GraniteMoeHybridConfig(
        **_COMMON, **_ATTENTION, **_MAMBA2_HYBRID, **experts, num_hidden_layers=3, layer_types=kinds
    )


def _falcon_h1() -> Any:
    return hf.FalconH1Config(
        **_COMMON, **_ATTENTION, **_MAMBA2_HYBRID, mamba_d_ssm=128, head_dim=16, num_hidden_layers=2
    )


def _zamba2() -> Any:
    return hf.Zamba2Config(
        **_COMMON,
        num_hidden_layers=3,
        layers_block_type=["mamba", "hybrid", "mamba"],
        mamba_d_state=16,
        mamba_ngroups=2,
        n_mamba_heads=8,
        mamba_headdim=16,
        chunk_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=96,
        num_mem_blocks=1,
        use_shared_attention_adapter=False,
        adapter_rank=8,
    )


def _nemotron_h_mlp() -> Any:
    return hf.NemotronHConfig(**_NEMOTRON, layers_block_type=["mamba", "mlp", "attention", "mamba"])


def _nemotron_h_moe() -> Any:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    shared = {"moe_shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1}
    kinds = ["mamba", "moe", "attention", "mamba"]
    return hf.NemotronHConfig(**_NEMOTRON, **experts, **shared, layers_block_type=kinds)


def _mamba() -> Any:
    return hf.MambaConfig(**_COMMON, num_hidden_layers=2, state_size=8, expand=2, conv_kernel=4, time_step_rank=8)


def _falcon_mamba() -> Any:
    return hf.FalconMambaConfig(**_COMMON, num_hidden_layers=2, state_size=8, expand=2, conv_kernel=4, time_step_rank=8)


def _jamba() -> Any:
    return hf.JambaConfig(
        **_COMMON,
        **_ATTENTION,
        num_hidden_layers=4,
        attn_layer_period=4,
        attn_layer_offset=2,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
        mamba_d_state=8,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_dt_rank=8,
    )


def _lfm2() -> Any:
    kinds = ["conv", "full_attention", "conv"]
    return hf.Lfm2Config(
        **_COMMON, **_ATTENTION, num_hidden_layers=3, layer_types=kinds, conv_L_cache=3, block_ff_dim=96
    )


def _zamba() -> Any:
    return hf.ZambaConfig(
        **_COMMON,
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],  # one attention block shared by two layers
        mamba_d_state=8,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_dt_rank=8,
        n_mamba_heads=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        attention_hidden_size=128,
        attention_head_dim=32,
        intermediate_size=96,
    )


def _lfm2_moe() -> Any:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_dense_layers": 1}
    kinds = ["conv", "full_attention", "conv"]
    return hf.Lfm2MoeConfig(**_COMMON, **_ATTENTION, **experts, num_hidden_layers=3, layer_types=kinds, conv_L_cache=3)


CONFIGS: dict[str, Callable[[], Any]] = {
    "mamba": _mamba,
    "falcon_mamba": _falcon_mamba,
    "jamba": _jamba,
    "mamba2": _mamba2,
    "bamba": _bamba,
    "falcon_h1": _falcon_h1,
    "zamba2": _zamba2,
    "nemotron_h_mlp": _nemotron_h_mlp,
    "nemotron_h_moe": _nemotron_h_moe,
    "granitemoehybrid": _granite,
    "lfm2": _lfm2,
    "zamba": _zamba,
    "lfm2_moe": _lfm2_moe,
}


def build(name: str, **changes: Any) -> torch.nn.Module:
    """The model with random weights, the same at every call."""
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model: torch.nn.Module = hf.AutoModelForCausalLM.from_config(config).eval()
    return model
