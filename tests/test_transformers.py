"""Hugging Face models on these operations: same tokens, one graph, dynamic lengths, exports and packages."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

transformers = pytest.importorskip("transformers")

import small_models  # noqa: E402

from torch_mamba_ops import export  # noqa: E402
from torch_mamba_ops.dispatch import OPS  # noqa: E402
from torch_mamba_ops.integrations import transformers as integration  # noqa: E402

EVERY = tuple(small_models.CONFIGS)
LENGTHS = (2, 3, 5, 9, 17, 33, 40, 64, 77, 96)
# What the compiler makes of the graph is tested op by op; these models go through Inductor whole.
THROUGH_INDUCTOR = ("bamba", "falcon_mamba")


@pytest.fixture(autouse=True)
def _integration() -> Iterator[None]:
    torch._dynamo.reset()
    integration.enable()
    yield
    integration.disable()


def _prompt(length: int, batch: int = 2) -> Tensor:
    return torch.randint(3, small_models.VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


def _cache(model: Any, length: int = 128) -> Any:
    return transformers.StaticCache(config=model.config, max_cache_len=length)


def _forward(model: Any, ids: Tensor, cache: Any, start: int = 0) -> Tensor:
    accepted = inspect.signature(model.forward).parameters
    given = {"past_key_values" if "past_key_values" in accepted else "cache_params": cache, "use_cache": True}
    if "position_ids" in accepted:
        given["position_ids"] = torch.arange(start, start + ids.shape[1], device=ids.device)[None].expand(
            ids.shape[0], -1
        )
    logits: Tensor = model(ids, **given).logits
    return logits


def _close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_greedy_generation_gives_the_same_tokens(name: str) -> None:
    model, ids = small_models.build(name), _prompt(21)
    more = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    ours = model.generate(ids, **more)
    integration.disable()
    assert torch.equal(ours, model.generate(ids, **more))


@pytest.mark.parametrize("name", EVERY)
def test_prefill_and_decode_compile_without_a_break_in_few_graphs(name: str) -> None:
    model = small_models.build(name)
    backend = "inductor" if name in THROUGH_INDUCTOR else "aot_eager"
    prefill, decode = (CompileCounterWithBackend(backend) for _ in range(2))
    compiled_prefill = torch.compile(_forward, backend=prefill, fullgraph=True)
    compiled_decode = torch.compile(_forward, backend=decode, fullgraph=True)
    with torch.no_grad():
        for length in LENGTHS:
            ids, cache, other = _prompt(length), _cache(model), _cache(model)
            _close(compiled_prefill(model, ids, cache), _forward(model, ids, other))
            if length in (9, 40):
                for step in range(2):
                    token = _prompt(1)
                    _close(
                        compiled_decode(model, token, cache, length + step),
                        _forward(model, token, other, length + step),
                    )
    assert prefill.frame_count <= 3
    assert decode.frame_count <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", EVERY)
def test_prefill_and_decode_compile_on_a_gpu(name: str) -> None:
    """The models' own fallback dies inside Inductor there (a cumsum along an outer dimension, torch 2.11)."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = small_models.build(name).cuda()
    compiled = torch.compile(_forward, fullgraph=True)
    with torch.no_grad():
        ids, cache, other = _prompt(200).cuda(), _cache(model, 256), _cache(model, 256)
        torch.testing.assert_close(compiled(model, ids, cache), _forward(model, ids, other), rtol=1e-3, atol=1e-4)
        token = _prompt(1).cuda()
        for step in (200, 201):
            got, want = compiled(model, token, cache, step), _forward(model, token, other, step)
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


class _Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids, use_cache=False).logits
        return logits


def _export(name: str) -> tuple[torch.nn.Module, torch.export.ExportedProgram]:
    model = _Logits(small_models.build(name))
    with torch.no_grad():
        length = Dim("length", min=5, max=4096)
        return model, torch.export.export(model, (_prompt(40),), dynamic_shapes=({1: length},), strict=False)


@pytest.mark.parametrize("name", EVERY)
def test_exports_with_a_dynamic_length(name: str) -> None:
    model, program = _export(name)
    assert export.backends_of(program)
    with torch.no_grad():
        for length in (5, 40, 77):
            _close(program.module()(_prompt(length)), model(_prompt(length)))


@pytest.mark.aoti
@pytest.mark.parametrize("name", EVERY)
def test_the_exported_program_makes_a_package_with_the_same_logits(name: str, tmp_path: Path) -> None:
    model, program = _export(name)
    path = export.package(program, tmp_path / "model.pt2", verify=name in THROUGH_INDUCTOR)
    loaded = torch._inductor.aoti_load_package(str(path))
    with torch.no_grad():
        for length in (5, 77):
            _close(loaded(_prompt(length)), model(_prompt(length)))


def test_training_goes_through_the_operations() -> None:
    model = small_models.build("bamba").train()
    ids = _prompt(21)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    ours = gradients()
    integration.disable()
    theirs = gradients()
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_it_is_reversible_idempotent_and_works_on_models_made_before() -> None:
    from transformers.models.bamba import modeling_bamba

    model = small_models.build("bamba")
    patched = integration.enable()
    assert integration.enabled() and patched == integration.enable()
    assert "bamba.mamba2_chunk_scan" in patched
    calls: list[str] = []
    op = OPS["mamba_chunk_scan_combined"]
    original = op.choose
    op.choose = lambda *args: calls.append("scan") or original(*args)  # type: ignore[method-assign, func-returns-value]
    try:
        model(_prompt(9))
        assert calls
        integration.disable()
        calls.clear()
        model(_prompt(9))
        assert not calls
    finally:
        del op.choose
    untouched = modeling_bamba.mamba2_chunk_scan
    integration.disable()
    assert not integration.enabled() and modeling_bamba.mamba2_chunk_scan is untouched
    integration.enable()
    assert modeling_bamba.mamba2_chunk_scan is not untouched


def test_another_version_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("5.16.1", "5.24.0", "4.57.0"):
        monkeypatch.setattr(integration, "version", lambda name, other=other: other)
        with pytest.raises(ImportError, match=f"got {other}, expected >=5.17,<5.24"):
            integration.enable()


def test_importing_the_integration_loads_no_model() -> None:
    program = "import sys, torch_mamba_ops.integrations.transformers as i; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
