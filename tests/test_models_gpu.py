"""Hugging Face models on a GPU: CUDA graphs, no copy of a state, and one operation switched at a time."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

transformers = pytest.importorskip("transformers")

import small_models  # noqa: E402

import torch_mamba_ops as tmo  # noqa: E402
from torch_mamba_ops import export  # noqa: E402
from torch_mamba_ops.dispatch import OPS  # noqa: E402
from torch_mamba_ops.integrations import transformers as integration  # noqa: E402

DECODED = ("mamba2", "bamba", "falcon_h1", "zamba2", "nemotron_h_mlp", "granitemoehybrid", "falcon_mamba")
PROMPT, LENGTH = 40, 64
on_gpu = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _integration() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.backends.cuda.matmul.allow_tf32 = False
    integration.enable()
    with torch.no_grad():
        yield
    integration.disable()


def _step(model: Any) -> Callable[[Tensor, Any, Tensor], Tensor]:
    names = inspect.signature(model.forward).parameters
    cache_name = "past_key_values" if "past_key_values" in names else "cache_params"

    def step(ids: Tensor, cache: Any, positions: Tensor) -> Tensor:
        more = {"position_ids": positions} if "position_ids" in names else {}
        logits: Tensor = model(ids, **{cache_name: cache}, use_cache=True, **more).logits
        return logits

    return step


def _ids(batch: int, length: int, device: str) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, small_models.VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))
    return ids.to(device), torch.arange(length, device=device).expand(batch, -1)


def _token(batch: int, position: int, device: str) -> tuple[Tensor, Tensor]:
    return _ids(batch, 1, device)[0], torch.full((batch, 1), position, device=device)


def _fill(model: Any, cache: Any, batch: int, device: str) -> None:
    cache.reset()
    ids, positions = _ids(batch, PROMPT, device)
    _step(model)(ids, cache, positions)


def _decoded(model: Any, step: Callable[..., Tensor], cache: Any, batch: int, device: str) -> Tensor:
    _fill(model, cache, batch, device)
    logits = []
    for position in range(PROMPT, PROMPT + 5):  # compile, record and replay
        ids, positions = _token(batch, position, device)
        logits.append(step(ids, cache, positions).clone())
    return torch.stack(logits)


@pytest.mark.parametrize("name", DECODED)
def test_a_static_cache_is_filled_again_after_a_reset(name: str) -> None:
    model = small_models.build(name)
    cache = integration.static_cache(model, 2, LENGTH)
    own = transformers.StaticCache(config=model.config, max_cache_len=LENGTH)
    wanted = _decoded(model, _step(model), own, 2, "cpu")
    addresses = [tensor.data_ptr() for tensor in integration.states_of(cache).values()]
    for _ in range(2):
        torch.testing.assert_close(_decoded(model, _step(model), cache, 2, "cpu"), wanted)
    assert [tensor.data_ptr() for tensor in integration.states_of(cache).values()] == addresses


@pytest.mark.parametrize("name", ["bamba", "falcon_mamba"])
def test_a_prefill_that_is_told_so_is_one_graph_for_all_lengths(name: str) -> None:
    model = small_models.build(name)
    cache = integration.static_cache(model, 2, LENGTH)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(_step(model), backend=counter, fullgraph=True)
    for length in (40, 17, 61):
        given = _ids(2, length, "cpu")[0], torch.arange(length).repeat(2, 1)
        for tensor in given:
            torch._dynamo.mark_dynamic(tensor, 1)
        cache.reset()
        got = step(given[0], cache, given[1])
        cache.reset()
        torch.testing.assert_close(got, _step(model)(given[0], cache, given[1]))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", DECODED)
def test_a_cache_made_of_states_goes_on_where_they_are_and_updates_them(name: str) -> None:
    model = small_models.build(name)
    cache = integration.static_cache(model, 2, LENGTH)
    _fill(model, cache, 2, "cpu")
    states = {key: tensor.clone() for key, tensor in integration.states_of(cache).items()}
    other = integration.cache_of(model.config, LENGTH, states)
    ids, positions = _token(2, PROMPT, "cpu")
    torch.testing.assert_close(_step(model)(ids, other, positions), _step(model)(ids, cache, positions))
    for key, tensor in integration.states_of(cache).items():
        torch.testing.assert_close(states[key], tensor, msg=lambda text, key=key: f"{key}: {text}")


@on_gpu
@pytest.mark.parametrize("name", DECODED)
def test_steps_run_as_cuda_graphs_without_a_copy_of_a_state(name: str) -> None:
    model = small_models.build(name).cuda()
    if name == "granitemoehybrid":  # transformers' default asks the host how many tokens each float32 expert has
        model.set_experts_implementation("batched_mm")
    cache = integration.static_cache(model, 4, LENGTH)
    step = torch.compile(_step(model), mode="reduce-overhead", fullgraph=True, dynamic=False)
    with torch._inductor.config.patch(force_disable_caches=True):  # what comes from a cache is not looked at
        got = _decoded(model, step, cache, 4, "cuda")
    assert torch._dynamo.utils.ReinplaceCounters.get_total_missed() == 0
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    own = transformers.StaticCache(config=model.config, max_cache_len=LENGTH)
    torch.testing.assert_close(got, _decoded(model, _step(model), own, 4, "cuda"), rtol=1e-3, atol=1e-4)
    ids, positions = _token(4, PROMPT + 5, "cuda")
    with torch.profiler.profile() as profile:
        step(ids, cache, positions)
        torch.cuda.synchronize()
    assert sum(event.name == "cudaGraphLaunch" for event in profile.events()) == 1


def _kernels(call: Callable[[], object]) -> set[str]:
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profile:
        call()
        torch.cuda.synchronize()
    return {event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA}


@on_gpu
def test_switching_one_operation_changes_that_one_alone_with_one_recompile() -> None:
    @tmo.register_backend("selective_state_update", "theirs")
    def theirs(**arguments: Any) -> Tensor:
        ran.append("theirs")
        return OPS["selective_state_update"].backends["triton"].run(**arguments)

    ran: list[str] = []
    model = small_models.build("bamba").cuda()
    cache = integration.static_cache(model, 2, LENGTH)
    counter = CompileCounterWithBackend("inductor")
    step = torch.compile(_step(model), backend=counter, fullgraph=True, dynamic=False)
    _fill(model, cache, 2, "cuda")
    given = _token(2, PROMPT, "cuda")

    def once() -> None:
        step(given[0], cache, given[1])

    def backends() -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for node in counter.graphs[-1].graph.nodes:
            if str(node.target).startswith("torch_mamba_ops."):
                found.setdefault(str(node.target).split(".")[1], set()).add(node.kwargs["backend"].partition("@")[0])
        return found

    once()
    assert backends() == {"causal_conv1d_update": {"triton"}, "selective_state_update": {"triton"}}
    ours = _kernels(once)
    assert "selective_state_update" not in ours, "Inductor's template goes by another name"
    for name in ("reference", "theirs"):
        compiled = counter.frame_count
        with tmo.use_backend(selective_state_update=name):
            once()
            assert counter.frame_count == compiled + 1
            assert backends() == {"causal_conv1d_update": {"triton"}, "selective_state_update": {name}}
            ran.clear()
            other = _kernels(once)
        assert bool(ran) == (name == "theirs")
        assert _convolutions(ours) == _convolutions(other) != set()
        assert ("selective_state_update" in other) == (name == "theirs"), "the eager kernel's own name"
        once()
        assert counter.frame_count == compiled + 1, "back without compiling"


def _convolutions(kernels: set[str]) -> set[str]:
    """Which it is depends on the strides: the template takes rows of a multiple of 16 elements."""
    template = {"template" for name in kernels if name.startswith("triton_tem") and "causal_conv1d_update" in name}
    return kernels & {"update_one_token", "update_tokens"} | template


@on_gpu
@pytest.mark.aoti
@pytest.mark.parametrize("name", ["bamba", "falcon_mamba"])
def test_a_step_packaged_for_the_gpu_updates_its_states_in_a_clean_process(name: str, tmp_path: Path) -> None:
    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor, positions: Tensor, states: dict[str, Tensor]) -> Tensor:
            return _step(self.model)(ids, integration.cache_of(self.model.config, LENGTH, states), positions)

    model = small_models.build(name).cuda()
    cache = integration.static_cache(model, 2, LENGTH)
    _fill(model, cache, 2, "cuda")
    given = (*_token(2, PROMPT, "cuda"), {key: t.clone() for key, t in integration.states_of(cache).items()})
    export.package(Step().eval(), tmp_path / "step.pt2", given, verify=True, portable_compiler=sys.platform == "linux")
