"""Settings: one checked value, where it comes from, and that a change takes effect everywhere."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import torch_mamba_ops as tmo
from torch_mamba_ops import settings
from torch_mamba_ops.dispatch import OPS

OP = "selective_state_update"
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    settings.configure(
        stochastic_rounding=None,
        philox_rounds=None,
        conv_state_layout=None,
        tuning=None,
        backends={OP: None, "*": None},
    )
    OPS[OP].backends.pop("Plain", None)


def test_it_is_one_immutable_value_that_compares_by_value() -> None:
    now = settings.current()
    assert now == settings.Settings() and hash(now) == hash(settings.Settings())
    with pytest.raises(dataclasses.FrozenInstanceError):
        now.philox_rounds = 3  # type: ignore[misc]
    assert settings.Settings(conv_state_layout="ds", tuning="Search") == settings.Settings(  # type: ignore[arg-type]
        conv_state_layout="DS", tuning="search"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv_state_layout": "NHD"}, "conv_state_layout: got 'NHD', expected 'SD' or 'DS'"),
        ({"tuning": "fast"}, "tuning: got 'fast', expected 'table' or 'search'"),
        ({"stochastic_rounding": "maybe"}, "stochastic_rounding: got 'maybe', expected True or False"),
        ({"stochastic_rounding": 1}, "stochastic_rounding: got 1, expected True or False"),
        ({"philox_rounds": 0}, "philox_rounds: got 0, expected an integer of at least 1"),
        ({"philox_rounds": True}, "philox_rounds: got True, expected an integer of at least 1"),
        ({"layout": "SD"}, "layout: no such setting, expected one of backends, stochastic_rounding"),
        ({"backends": {OP: "cuda"}}, "unknown backend 'cuda' (known: 'flashinfer', 'reference', 'triton')"),
        ({"backends": {"state_update": "triton"}}, "unknown operation 'state_update'"),
    ],
)
def test_every_wrong_value_names_the_valid_ones(change: dict[str, Any], message: str) -> None:
    for setter in (settings.configure, settings.use):
        with pytest.raises((ValueError, tmo.BackendError), match=re.escape(message)):
            made: Any = setter(**change)
            with made:
                pass
    assert settings.current() == settings.Settings()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"conv_state_layout": "NHD"}, "conv_state_layout: got 'NHD', expected 'SD' or 'DS'"),
        ({"philox_rounds": -1}, "philox_rounds: got -1, expected an integer of at least 1"),
        ({"backends": ((OP, "cuda"),)}, "unknown backend 'cuda' (known: 'flashinfer', 'reference', 'triton')"),
        ({"backends": (("state_update", "triton"),)}, "unknown operation 'state_update'"),
    ],
)
def test_the_value_itself_is_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, tmo.BackendError), match=re.escape(message)):
        settings.Settings(**fields)
    assert settings.Settings(backends=((OP, "Triton"),)).backends == ((OP, "triton"),)


def test_backends_are_a_mapping() -> None:
    for wrong in (None, "triton"):
        with pytest.raises(TypeError, match=r"backends: got .*, expected a mapping from operations to backends"):
            settings.configure(backends=wrong)  # type: ignore[typeddict-item]


def test_a_wrong_value_changes_nothing_of_what_is_set_with_it() -> None:
    with pytest.raises(ValueError, match="philox_rounds"):
        settings.configure(conv_state_layout="DS", backends={OP: "reference"}, philox_rounds=-1)
    assert settings.current() == settings.Settings()


def test_a_block_over_the_process_over_the_environment_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounds() -> int:
        return settings.current().philox_rounds

    assert rounds() == 10
    monkeypatch.setenv("TORCH_MAMBA_OPS_PHILOX_ROUNDS", "9")
    settings.read_environment()
    try:
        assert rounds() == 9
        settings.configure(philox_rounds=8)
        assert rounds() == 8
        with settings.use(philox_rounds=7):
            settings.configure(philox_rounds=6)
            assert rounds() == 7
        assert rounds() == 6
        settings.configure(philox_rounds=None)
        assert rounds() == 9
    finally:
        monkeypatch.undo()
        settings.read_environment()
    assert rounds() == 10


def test_the_environment_is_read_in_any_case_and_a_wrong_one_is_raised_where_it_is_first_used() -> None:
    def told(**environment: str) -> str:
        program = "from torch_mamba_ops import settings; print('imported'); print(settings.current())"
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    assert "conv_state_layout='DS'" in told(TORCH_MAMBA_OPS_CONV_STATE_LAYOUT="ds")
    wrong = told(TORCH_MAMBA_OPS_CONV_STATE_LAYOUT="HND")
    assert "TORCH_MAMBA_OPS_CONV_STATE_LAYOUT: conv_state_layout: got 'HND', expected 'SD' or 'DS'" in wrong
    assert wrong.startswith("imported")


def test_a_block_is_one_thread_and_the_process_is_all() -> None:
    seen: list[settings.Settings] = []

    def look() -> None:
        thread = threading.Thread(target=lambda: seen.append(settings.current()))
        thread.start()
        thread.join()

    settings.configure(tuning="search")
    with settings.use(conv_state_layout="DS", backends={OP: "reference"}):
        look()
    assert seen == [settings.Settings(tuning="search")]


def test_backends_are_kept_once() -> None:
    tmo.set_backend(OP, "triton")
    assert settings.current().backends == ((OP, "triton"),)
    settings.configure(backends={OP: "REFERENCE"})
    assert settings.current().backends == ((OP, "reference"),)
    assert tmo.explain(OP, **_step()).why == "asked for by set_backend"
    with settings.use(backends={"*": "Reference", OP: "auto"}):
        assert settings.current().backends == ((OP, "auto"), ("*", "reference"))
    tmo.set_backend(OP, None)
    assert settings.current().backends == ()


def test_rounding_and_a_state_that_is_not_rounded_are_refused_together() -> None:
    message = "got True with an SSM state of torch.float32, which is not rounded; expected torch.float16 or"
    with pytest.raises(ValueError, match=message):
        settings.configure(stochastic_rounding=True, ssm_dtype=torch.float32)
    settings.configure(stochastic_rounding=True, ssm_dtype=torch.float16)
    with pytest.raises(ValueError, match=message):
        settings.check_state(torch.float32)
    settings.check_state(torch.bfloat16)
    with settings.use(stochastic_rounding=False, ssm_dtype=torch.float32):
        settings.check_state(torch.float32)


def test_rounding_and_a_backend_that_cannot_are_refused_together_in_either_order() -> None:
    @tmo.register_backend(OP, "Plain")
    def plain(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return x.clone()

    message = "got True with the backend 'Plain' of selective_state_update, which cannot: .*rand_seed"
    with pytest.raises(tmo.BackendError, match=message):
        settings.configure(stochastic_rounding=True, backends={OP: "plain"})
    settings.configure(backends={OP: "plain"})
    with pytest.raises(tmo.BackendError, match=message):
        settings.configure(stochastic_rounding=True)
    with settings.use(backends={OP: "reference"}, stochastic_rounding=True):
        pass
    settings.configure(backends={OP: None}, stochastic_rounding=True)
    with pytest.raises(tmo.BackendError, match=message):
        settings.configure(backends={OP: "plain"})
    assert settings.current() == settings.Settings(stochastic_rounding=True)


def test_flashinfer_is_told_apart_by_the_dtype_it_rounds() -> None:
    with settings.use(backends={OP: "flashinfer"}):
        with pytest.raises(tmo.BackendError, match=r"it rounds float16 states .*, not torch\.bfloat16"):
            settings.configure(stochastic_rounding=True, ssm_dtype=torch.bfloat16)
        if not torch.cuda.is_available():  # else it depends on the GPU
            with settings.use(stochastic_rounding=True, ssm_dtype=torch.float16):
                pass


# --- a change takes effect ---


def _step(dtype: torch.dtype = torch.float16) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "state": torch.randn(2, 4, 8, 16).to(dtype),
        "x": torch.randn(2, 4, 8),
        "dt": torch.rand(2, 4),
        "A": -torch.rand(4),
        "B": torch.randn(2, 1, 16),
        "C": torch.randn(2, 1, 16),
    }


def _next_state(run: Any) -> Tensor:
    given = _step()
    torch.manual_seed(1)
    run(**given)
    state: Tensor = given["state"]
    return state


def _decode(**given: Tensor) -> Tensor:
    seed, rounds = settings.rand_seed("cpu"), settings.current().philox_rounds
    return tmo.selective_state_update(**given, rand_seed=seed, philox_rounds=rounds)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_same_backend_with_other_rounding_rounds_otherwise(compiled: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(_decode, fullgraph=True, backend=counter) if compiled else _decode
    settings.configure(backends={OP: "reference"})
    nearest = _next_state(run)
    settings.configure(backends={OP: "reference"}, stochastic_rounding=True)
    rounded = _next_state(run)
    settings.configure(backends={OP: "reference"}, philox_rounds=3)
    fewer = _next_state(run)
    if compiled:
        assert counter.frame_count == 3  # one graph for each change
    assert not torch.equal(nearest, rounded) and not torch.equal(rounded, fewer)
    torch.testing.assert_close(nearest.float(), rounded.float(), rtol=2**-9, atol=2**-23)  # neighbours in float16
    settings.configure(stochastic_rounding=False)
    assert torch.equal(_next_state(run), nearest)
    with settings.use(stochastic_rounding=True):
        assert torch.equal(_next_state(run), fewer)
    if compiled:
        made = counter.frame_count
        settings.configure(stochastic_rounding=True, philox_rounds=10)
        assert torch.equal(_next_state(run), rounded)
        assert counter.frame_count == made  # a graph that is there is used again


def test_a_graph_reads_the_layout() -> None:
    counter = CompileCounterWithBackend("eager")

    @torch.compile(fullgraph=True, backend=counter)
    def first(pool: Tensor) -> Tensor:
        return pool[0] if settings.current().conv_state_layout == "DS" else pool[0].T

    pool = torch.randn(2, 3, 5)
    assert first(pool).shape == (5, 3)
    settings.configure(conv_state_layout="DS")
    assert first(pool).shape == (3, 5) and counter.frame_count == 2


def test_a_seed_is_there_when_rounding_is_new_at_each_call_and_repeatable() -> None:
    assert settings.rand_seed("cpu") is None
    with settings.use(stochastic_rounding=True):
        torch.manual_seed(0)
        first, second = settings.rand_seed("cpu"), settings.rand_seed("cpu")
        torch.manual_seed(0)
        again = settings.rand_seed("cpu")
    assert first is not None and second is not None and again is not None
    assert first.shape == (1,) and first.dtype == torch.int64
    assert torch.equal(first, again) and not torch.equal(first, second)


@pytest.mark.gpu
def test_replays_of_a_cuda_graph_round_afresh() -> None:
    with settings.use(stochastic_rounding=True):
        settings.rand_seed("cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            seed = settings.rand_seed("cuda")
    assert seed is not None
    drawn = set()
    for _ in range(8):
        graph.replay()
        drawn.add(int(seed))
    assert len(drawn) == 8


def test_the_page_runs() -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "settings.md").read_text(), re.DOTALL))
    code = code.replace("fullgraph=True)", 'fullgraph=True, backend="eager")')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
