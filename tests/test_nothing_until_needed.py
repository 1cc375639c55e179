"""A process that needs no kernel of ours loads no kernel package, tunes nothing and logs nothing: fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
WATCHED = ("triton", "flashinfer", "mamba_ssm", "causal_conv1d", "torch._inductor", "torch._dynamo")

needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")

LINEAR = """
class GatedDelta(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.beta = torch.nn.Linear(16, 48), torch.nn.Linear(16, 1)
    def forward(self, x):
        (q, k, v), beta = self.qkv(x).chunk(3, -1), self.beta(x).sigmoid()
        state, out = x.new_zeros(x.shape[0], 16, 16), []
        for t in range(x.shape[1]):
            error = v[:, t] - torch.einsum("bk,bkv->bv", k[:, t], state)
            state = state + torch.einsum("bk,bv->bkv", k[:, t], beta[:, t] * error)
            out.append(torch.einsum("bk,bkv->bv", q[:, t], state))
        return torch.stack(out, 1)
model = GatedDelta()
run = lambda: model(torch.randn(2, 5, 16))
"""
ATTENTION = """
model = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
run = lambda: model(torch.randn(2, 5, 16))
"""
LLAMA = """
import transformers
config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2)
model = transformers.LlamaForCausalLM(config).eval()
run = lambda: model.generate(torch.arange(3, 9)[None], max_new_tokens=3, do_sample=False)
"""
LFM2 = """
import small_models
model = small_models.build("lfm2")
run = lambda: model.generate(torch.arange(3, 9)[None], max_new_tokens=3, do_sample=False)
"""
IMPORT = "import torch_mamba_ops"
PREPARED = """
import torch_mamba_ops
layers = model if hasattr(model, "config") else {}
report, warmed = torch_mamba_ops.prepare(layers), torch_mamba_ops.warmup(layers)
assert not (report.calls or report.unknown or warmed.calls or warmed.skipped), (report, warmed)
"""
ENABLED = """
from torch_mamba_ops.integrations import transformers as integration
integration.enable()
"""
# What the integration touches, without the integration.
MODELING = """
import importlib
for name in {models!r}:
    importlib.import_module(f"transformers.models.{{name}}.modeling_{{name}}")
"""


def loaded(*parts: str, cache: Path) -> set[str]:
    """The modules of a process that makes and runs a model, which must log nothing and write nothing to the cache."""
    program = "\n".join(
        [
            "import json, logging, sys, torch",
            "said = []",
            "class Handler(logging.Handler):",
            "    emit = lambda self, record: said.append(record.getMessage())",
            "logging.getLogger('torch_mamba_ops').addHandler(Handler())",
            "logging.getLogger('torch_mamba_ops').setLevel(logging.DEBUG)",
            *parts,
            "with torch.no_grad():",
            "    run()",
            "assert not said, said",
            "print(json.dumps(sorted(sys.modules)))",
        ]
    )
    environment = os.environ | {"TORCH_MAMBA_OPS_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE, env=environment)
    assert done.returncode == 0, done.stderr
    assert not cache.exists()
    return set(json.loads(done.stdout.splitlines()[-1]))


def packages(modules: set[str]) -> set[str]:
    return {name for name in WATCHED if name in modules}


@pytest.mark.parametrize("model", [ATTENTION, LINEAR], ids=["attention", "gated_delta"])
def test_layers_of_others_load_no_kernel_package(model: str, tmp_path: Path) -> None:
    alone = loaded(model, cache=tmp_path / "cache")
    ours = loaded(IMPORT, model, PREPARED, cache=tmp_path / "cache")
    assert packages(ours) == packages(alone)
    assert not {name for name in ours if name.startswith("torch_mamba_ops") and name.endswith("kernels")}
    assert "torch_mamba_ops.startup" in ours and "torch_mamba_ops.integrations.transformers" not in ours


@needs_transformers
@pytest.mark.parametrize("model", [LLAMA, LFM2], ids=["llama", "lfm2"])
def test_the_integration_loads_no_kernel_package(model: str, tmp_path: Path) -> None:
    from torch_mamba_ops.integrations.transformers import MODELS

    alone = loaded(MODELING.format(models=tuple(MODELS)), model, cache=tmp_path / "cache")
    ours = loaded(ENABLED, model, *([PREPARED] if model is LLAMA else []), cache=tmp_path / "cache")
    assert packages(ours) == packages(alone)
    assert not {name for name in ours if name.startswith("torch_mamba_ops") and name.endswith("kernels")}


NOTHING_TO_PREPARE = """
import json, sys, torch, torch_mamba_ops
before = set(sys.modules)
torch_mamba_ops.prepare({layers}), torch_mamba_ops.warmup({layers})
print(json.dumps(sorted(set(sys.modules) - before)))
"""


@pytest.mark.parametrize("layers", ["{}", "[]", "{'model_type': 'llama', 'num_hidden_layers': 2}"])
def test_preparing_nothing_imports_nothing(layers: str) -> None:
    command = [sys.executable, "-c", NOTHING_TO_PREPARE.replace("{layers}", layers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [name for name in json.loads(done.stdout) if not name.startswith("torch_mamba_ops.state")] == []


PREPARED_FOR_A_GPU = """
from torch_mamba_ops.state import MambaStateSpec
report = torch_mamba_ops.prepare(MambaStateSpec.mamba2(8, 64, 128), device="cuda")
run = lambda: str(report)
"""


def test_telling_what_will_run_loads_no_kernel(tmp_path: Path) -> None:
    ours = loaded(IMPORT, PREPARED_FOR_A_GPU, cache=tmp_path / "cache")
    assert "flashinfer" not in ours  # torch's own fake tensors load triton
    assert not {name for name in ours if name.startswith("torch_mamba_ops") and name.endswith("kernels")}
