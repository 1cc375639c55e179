"""Shapes of states: by hand, from configurations, split over ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torch_mamba_ops import settings
from torch_mamba_ops.state import MambaStateSpec

MAMBA2 = {
    "model_type": "mamba2", "num_hidden_layers": 2, "hidden_size": 64, "num_heads": 8, "head_dim": 16,
    "state_size": 16, "n_groups": 2, "conv_kernel": 4, "chunk_size": 32, "hidden_act": "silu",
}  # fmt: skip
BAMBA = {
    "model_type": "bamba", "num_hidden_layers": 4, "attn_layer_indices": [1], "hidden_size": 64, "mamba_expand": 2,
    "mamba_n_heads": 8, "mamba_d_head": "auto", "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_d_conv": 4,
    "mamba_chunk_size": 32, "hidden_act": "silu", "torch_dtype": "bfloat16",
}  # fmt: skip
NEMOTRON = {
    "model_type": "nemotron_h", "hybrid_override_pattern": "M-M*-M", "mamba_num_heads": 8, "mamba_head_dim": 16,
    "ssm_state_size": 16, "n_groups": 2, "conv_kernel": 4, "chunk_size": 32, "mamba_hidden_act": "silu",
    "mamba_ssm_cache_dtype": "float32", "dtype": "bfloat16",
}  # fmt: skip
MAMBA = {
    "model_type": "mamba", "num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64, "state_size": 16,
    "conv_kernel": 4, "hidden_act": "silu",
}  # fmt: skip
JAMBA = {
    "model_type": "jamba", "num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2, "hidden_size": 32,
    "intermediate_size": 999, "mamba_expand": 2, "mamba_d_state": 16, "mamba_d_conv": 4, "hidden_act": "silu",
}  # fmt: skip
LFM2 = {"model_type": "lfm2", "hidden_size": 32, "conv_L_cache": 3, "layer_types": ["conv", "full_attention", "conv"]}


@pytest.mark.parametrize(
    ("config", "layers", "kind", "conv_shape", "ssm_shape"),
    [
        (MAMBA2, [0, 1], "mamba2", (8 * 16 + 2 * 2 * 16, 3), (8, 16, 16)),
        (BAMBA, [0, 2, 3], "mamba2", (128 + 2 * 16, 3), (8, 16, 16)),
        (NEMOTRON, [0, 2, 5], "mamba2", (8 * 16 + 2 * 2 * 16, 3), (8, 16, 16)),
        (MAMBA, [0, 1, 2], "mamba1", (64, 3), (64, 16)),
        (JAMBA, [0, 1, 3], "mamba1", (64, 3), (64, 16)),
        (LFM2, [0, 2], "short_conv", (32, 2), None),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else None,
)
def test_configurations_tell_layers_and_shapes(
    config: dict[str, Any], layers: list[int], kind: str, conv_shape: tuple[int, ...], ssm_shape: Any
) -> None:
    specs = MambaStateSpec.from_config(config)
    assert list(specs) == layers
    assert {(spec.kind, spec.conv_shape, spec.ssm_shape) for spec in specs.values()} == {(kind, conv_shape, ssm_shape)}


def test_dtypes_are_the_configurations_unless_given() -> None:
    spec = MambaStateSpec.from_config(NEMOTRON)[0]
    assert (spec.conv_dtype, spec.ssm_dtype) == (torch.bfloat16, torch.float32)
    spec = MambaStateSpec.from_config(NEMOTRON, conv_dtype="float16", ssm_dtype=torch.bfloat16)[0]
    assert (spec.conv_dtype, spec.ssm_dtype) == (torch.float16, torch.bfloat16)


def test_a_real_configuration_object_reads_as_its_dictionary() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Mamba2Config(num_hidden_layers=2, hidden_size=64, num_heads=8, head_dim=16, n_groups=2)
    assert MambaStateSpec.from_config(config) == MambaStateSpec.from_config(config.to_dict())
    assert MambaStateSpec.from_config(transformers.LlamaConfig(num_hidden_layers=1)) == {}


def test_a_model_without_states_has_no_specs_and_an_unknown_one_with_some_is_an_error() -> None:
    assert MambaStateSpec.from_config({"model_type": "llama", "num_hidden_layers": 2}) == {}
    with pytest.raises(ValueError, match=r"got a model of type 'new', expected one of .*bamba"):
        MambaStateSpec.from_config({"model_type": "new", "mamba_d_state": 1})
    with pytest.raises(ValueError, match="config: got no chunk_size"):
        MambaStateSpec.from_config({name: value for name, value in MAMBA2.items() if name != "chunk_size"})
    with pytest.raises(ValueError, match="got a layer of type 'new'"):
        MambaStateSpec.from_config({**LFM2, "layer_types": ["new"]})


@pytest.mark.parametrize(("groups", "ranks", "own"), [(8, 1, 8), (8, 2, 4), (8, 4, 2), (2, 4, 1), (1, 8, 1)], ids=str)
def test_ranks_split_heads_and_share_groups(groups: int, ranks: int, own: int) -> None:
    spec = MambaStateSpec.mamba2(16, 4, 8, groups=groups, tensor_parallel_size=ranks)
    assert (spec.heads, spec.groups, spec.conv_dim) == (16 // ranks, own, 64 // ranks + 2 * own * 8)
    assert MambaStateSpec.mamba1(64, 8, tensor_parallel_size=ranks).ssm_shape == (64 // ranks, 8)


def test_drafts_widen_the_window() -> None:
    assert MambaStateSpec.mamba2(2, 4, 8, speculative_tokens=3).conv_shape == (24, 6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MambaStateSpec.mamba2(6, 4, 8, tensor_parallel_size=4), "got 4, expected a number that divides the 6"),
        (lambda: MambaStateSpec.mamba2(12, 4, 8, groups=3, tensor_parallel_size=2), "groups: got 3 with .*size 2"),
        (lambda: MambaStateSpec.mamba2(6, 4, 8, groups=4), "groups: got 4, expected a number that divides the 6"),
        (lambda: MambaStateSpec.mamba2(2, 4, 8, conv_layout="XY"), "conv_layout: got 'XY', expected one of 'SD', 'DS'"),
        (lambda: MambaStateSpec.mamba2(2, 4, 8, ssm_dtype="int8"), "ssm_dtype: got 'int8', expected one of float32"),
        (lambda: MambaStateSpec.mamba2(2, 4, 8, speculative_tokens=-1), "speculative_tokens: got -1"),
        (lambda: MambaStateSpec.mamba2(2, 4, 8, stochastic_rounding=True), "got True with an SSM state of .*float32"),
        (lambda: MambaStateSpec("mamba3", 4, 4), "kind: got 'mamba3', expected one of 'mamba1'"),  # type: ignore[arg-type]
        (lambda: MambaStateSpec("mamba2", 5, 4, heads=1, head_dim=2, state_size=1), "conv_dim: got 5, expected 4"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_specs_are_values_that_follow_the_settings_of_their_making() -> None:
    with settings.use(conv_state_layout="DS", stochastic_rounding=True, philox_rounds=7):
        spec = MambaStateSpec.mamba2(2, 4, 8, ssm_dtype=torch.float16)
        assert MambaStateSpec.short_conv(4).stochastic_rounding is False
    assert (spec.conv_layout, spec.stochastic_rounding, spec.philox_rounds) == ("DS", True, 7)
    given = MambaStateSpec.mamba2(
        2, 4, 8, ssm_dtype=torch.float16, conv_layout="ds", stochastic_rounding=True, philox_rounds=7
    )
    assert spec == given and hash(spec) == hash(given)
    assert spec != MambaStateSpec.mamba2(2, 4, 8, ssm_dtype=torch.float16)
