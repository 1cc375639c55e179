"""What runs before the first request: what `prepare` tells, that `warmup` meets every kernel that serving meets, and
what happens to its cache."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_mamba_ops as tmo
from torch_mamba_ops import settings, tuning
from torch_mamba_ops.__main__ import main
from torch_mamba_ops.dispatch import OPS, Op
from torch_mamba_ops.ops import launch as launching
from torch_mamba_ops.startup import batches, count_compiles, searching
from torch_mamba_ops.startup.calls import calls_of
from torch_mamba_ops.startup.layers import layers_of
from torch_mamba_ops.state import MambaStateSpec, StateCopyPlan
from torch_mamba_ops.tuning import cache, ladder, spaces

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
bench = importlib.import_module("warmup")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = MambaStateSpec.mamba2(4, 8, 16, groups=2, chunk_size=16)
CONFIG = {
    "model_type": "mamba2",
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_heads": 4,
    "head_dim": 8,
    "state_size": 16,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 16,
    "hidden_act": "silu",
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's cache is not for tests."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(cache.VARIABLE, str(folder))
    monkeypatch.setattr(cache, "_chosen", [])
    monkeypatch.setattr(cache, "_kept", {})
    monkeypatch.setattr(cache, "_warned", set())
    ladder.reread()
    yield folder
    monkeypatch.undo()
    ladder.reread()


# --- prepare ---


def test_prepare_tells_each_call_its_backend_and_why() -> None:
    report = tmo.prepare([SMALL, SMALL, MambaStateSpec.short_conv(8)], device="cpu")
    found = {(call.op, call.count): call for call in report.calls}
    update = found["selective_state_update", 2]
    assert update.backend == "reference" and "automatic: the first of" in update.why
    reasons = dict(update.reasons)
    assert "it runs on CUDA devices, and the tensors are on cpu" in reasons["triton"]
    assert ("causal_conv1d_update", 1) in found and ("selective_state_update", 1) not in found
    assert str(report).startswith("2 x mamba2 H4 P8 N16 G2, conv 96 x 4 SD, states float32\n")


def test_prepare_is_equal_for_equal_layers_and_knows_no_class() -> None:
    again = MambaStateSpec.mamba2(4, 8, 16, groups=2, chunk_size=16)
    assert tmo.prepare(SMALL, device="cpu") == tmo.prepare({3: again}, device="cpu")
    wider = dataclasses.replace(SMALL, speculative_tokens=2)
    assert tmo.prepare(SMALL, device="cpu") != tmo.prepare(wider, device="cpu")


def test_prepare_tells_of_the_settings_in_force() -> None:
    with settings.use(backends={"*": "triton"}):
        call = tmo.prepare(SMALL, device="cpu").calls[0]
    assert call.backend is None and "cannot run" in call.why
    assert tmo.prepare(SMALL, device="cpu").calls[0].backend == "reference"


def test_prepare_runs_and_allocates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*tensors: Any, **options: Any) -> None:
        raise AssertionError("it ran")

    for op in OPS.values():
        for backend in list(op.backends.values()):
            monkeypatch.setitem(op.backends, backend.name, dataclasses.replace(backend, run=refuse))
    huge = MambaStateSpec.mamba2(1 << 16, 64, 256, groups=8)  # 4 GiB a state
    assert tmo.prepare(huge, device="cuda").calls


@pytest.mark.parametrize("none", [{}, [], {"model_type": "llama", "num_hidden_layers": 2}])
def test_without_such_layers_nothing_is_done_or_said(none: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    report, warmed = tmo.prepare(none), tmo.warmup(none, strict=True)
    assert report.calls == () and not report.unknown and "nothing to do" in str(report)
    assert warmed.calls == () and warmed.skipped == ()
    assert not caplog.records


def test_layers_that_are_none_are_refused() -> None:
    for function in (tmo.prepare, tmo.warmup):
        with pytest.raises(TypeError, match="layers: got int, expected a model, its configuration or MambaStateSpecs"):
            function([3])


# --- warm-up on a CPU ---


def test_each_variant_runs_once_and_one_line_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    layer = MambaStateSpec.mamba2(
        4,
        8,
        16,
        chunk_size=16,
        speculative_tokens=3,
        conv_layout="DS",
        ssm_dtype=torch.float16,
        stochastic_rounding=True,
    )
    report = tmo.warmup([layer, layer], device="cpu", batch_sizes=(4, 2), max_tokens=32, strict=True)
    planned = {f"{call.op}, {call.variant}" for call in tmo.prepare(layer, device="cpu").calls}
    assert {name.partition(" (")[0] for name, _, _ in report.calls} == planned
    assert {made for _, made, _ in report.calls} == {1}
    assert [record.getMessage() for record in caplog.records] == [report.summary]
    assert report.seconds > 0 and report.memory == 0 and report.compiled == report.loaded == 0


@pytest.mark.parametrize("kind", ["mamba1", "mamba2", "short_conv"])
@pytest.mark.parametrize("layout", ["SD", "DS"])
def test_every_kind_of_layer_is_known(kind: str, layout: str) -> None:
    options: dict[str, Any] = {"conv_layout": layout, "conv_dtype": torch.bfloat16, "speculative_tokens": 1}
    layer = {
        "mamba1": lambda: MambaStateSpec.mamba1(32, 8, ssm_dtype=torch.bfloat16, **options),
        "mamba2": lambda: MambaStateSpec.mamba2(4, 8, 16, groups=2, **options),
        "short_conv": lambda: MambaStateSpec.short_conv(32, **options),
    }[kind]()
    assert tmo.warmup(layer, device="cpu", strict=True).calls


def test_random_numbers_drawn_later_are_those_without() -> None:
    torch.manual_seed(0)
    alone = torch.rand(3)
    torch.manual_seed(0)
    tmo.warmup(SMALL, device="cpu")
    assert torch.equal(torch.rand(3), alone)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_sizes": ()}, "batch_sizes: got (), expected positive numbers"),
        ({"batch_sizes": (4, 0)}, "batch_sizes: got (4, 0), expected positive numbers"),
        ({"max_tokens": 0}, "max_tokens: got 0, expected a positive number"),
        ({"workers": 0}, "workers: got 0, expected a positive number or None"),
        ({"tuning": "fast"}, "tuning: got 'fast', expected 'table' or 'search'"),
    ],
)
def test_wrong_values_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        tmo.warmup(SMALL, device="cpu", **wrong)


def test_what_is_not_known_or_cannot_run_is_skipped_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    unknown = {"model_type": "mamba9", "mamba_state": 3}
    assert "got a model of type 'mamba9', expected one of" in tmo.warmup(unknown).skipped[0]
    plain = torch.nn.Linear(2, 2)
    assert tmo.warmup(plain).skipped == ("Linear has no configuration: give the MambaStateSpecs of its layers",)
    with settings.use(backends={"copy_states": "triton"}):
        skipped = tmo.warmup(SMALL, device="cpu").skipped
        assert len(skipped) == 2 and all(each.startswith("copy_states, ") for each in skipped)
        with pytest.raises(ValueError, match=r"copy_states, .*: backend 'triton' cannot run"):
            tmo.warmup(SMALL, device="cpu", strict=True)
    assert len(caplog.records) == 3 and all("skipped: " in record.getMessage() for record in caplog.records)
    with pytest.raises(ValueError, match="mamba9"):
        tmo.warmup(unknown, strict=True)


def test_what_a_call_raises_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*tensors: Any, **options: Any) -> None:
        raise RuntimeError("broken")

    backend = OPS["selective_state_update"].backends["reference"]
    changed = dataclasses.replace(backend, run=broken)
    monkeypatch.setitem(OPS["selective_state_update"].backends, "reference", changed)
    with pytest.raises(RuntimeError, match="broken"):
        tmo.warmup(SMALL, device="cpu")


def test_the_bar_ends_at_the_last_call(capsys: pytest.CaptureFixture[str]) -> None:
    report = tmo.warmup(SMALL, device="cpu", progress=True)
    count = len(report.calls)
    assert f"warm-up {count}/{count} " in capsys.readouterr().err
    tmo.warmup(SMALL, device="cpu")  # no terminal here
    assert not capsys.readouterr().err


# --- every kernel that serving meets ---


def _variant(made: launching.Launch) -> tuple[Any, ...]:
    """What Triton compiles apart: constants, types, numbers that are 1 or divisible by 16, where tensors begin."""
    parts: list[Any] = [made.kernel.fn.__name__, made.options.get("num_warps"), made.options.get("num_stages")]
    for parameter in made.kernel.params:
        tensor, value = made.tensors.get(parameter.name), made.options.get(parameter.name)
        kind: Any
        if tensor is not None:
            aligned = tensor.storage_offset() * tensor.element_size() % 16 == 0
            kind = tensor.dtype, aligned or parameter.do_not_specialize_on_alignment
        elif parameter.is_constexpr or value is None:
            kind = value
        elif isinstance(value, int) and not parameter.do_not_specialize:
            kind = "1" if value == 1 else "16" if value % 16 == 0 else "other", abs(value) < 2**31
        else:
            kind = type(value)
        parts.append((parameter.name, kind))
    return tuple(parts)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[tuple[Any, ...]]:
    """Variants of kernels that calls would start; nothing runs, and tensors are on the CPU."""
    pytest.importorskip("triton")
    found: set[tuple[Any, ...]] = set()
    started = launching.launch

    def launch(plan: Callable[..., launching.Launch], *given: Any, **_: Any) -> None:
        made = plan(*given)
        if 0 not in made.grid:
            found.add(_variant(made))

    def call(op: Op, backend: Any, tensors: tuple[Any, ...], options: dict[str, Any]) -> Any:
        chosen = op.backends.get("triton", op.backends["reference"])
        return chosen.run(*tensors, **options)

    for name, module in list(sys.modules.items()):
        if name.startswith("torch_mamba_ops.ops.") and getattr(module, "launch", None) is started:
            monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(Op, "__call__", call)
    return found


def _warmed(
    launched: set[tuple[Any, ...]], spec: MambaStateSpec, dtype: torch.dtype, limits: batches.Limits, *, pooled: bool
) -> set[tuple[Any, ...]]:
    for call in calls_of(spec, dtype, pooled=pooled):
        for size in batches.sizes(call.phase, limits, CUDA, few_slots=pooled):
            OPS[call.op].function(**call.arguments(CPU, size))
    found = set(launched)
    launched.clear()
    return found


def _not_warmed(launched: set[tuple[Any, ...]], warmed: set[tuple[Any, ...]]) -> list[str]:
    """Kernels that were met first in serving, and how each differs from what is nearest to it."""
    found = []
    for variant in launched - warmed:
        different = [
            [(own, other) for own, other in zip(variant, known, strict=True) if own != other]
            for known in warmed
            if known[0] == variant[0]
        ]
        found.append(f"{variant[0]}: {min(different, key=len, default='no variant was warmed')}")
    return sorted(found)


@pytest.mark.parametrize(
    "options",
    [{}, {"conv_layout": "DS"}, {"ssm_dtype": torch.float16, "stochastic_rounding": True}],
    ids=["SD", "DS", "rounded"],
)
def test_mixed_batches_meet_no_kernel_that_was_not_warmed(
    options: dict[str, Any], launched: set[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "randn", torch.empty)  # nobody looks at the numbers
    spec = MambaStateSpec.mamba2(128, 64, 16, groups=8, conv_dtype=torch.bfloat16, **options)
    limits = batches.Limits([1 << n for n in range(7)], 8192)
    warmed = _warmed(launched, spec, torch.bfloat16, limits, pooled=True)
    layers = bench.Layers(spec, 2, 120, CPU, torch.bfloat16)
    rows = layers.projected(bench.Batch(64, (8192,), (False,)))
    for batch in bench.mixed(1000, 0, 64, 8192):
        layers.step(batch, rows[: batch.decodes + sum(batch.lengths)], bench.slots_of(batch, 120))
    assert len(launched) > 10
    assert _not_warmed(launched, warmed) == []
    assert len(warmed) < 50, "each is a second of compiling"


def test_steps_with_drafts_meet_no_kernel_that_was_not_warmed(launched: set[tuple[Any, ...]]) -> None:
    drafts, slots, block = 3, 70, 64
    spec = MambaStateSpec.mamba2(16, 16, 16, conv_dtype=torch.bfloat16, speculative_tokens=drafts)
    warmed = _warmed(launched, spec, torch.bfloat16, batches.Limits((1, 64), 512), pooled=True)
    layers = bench.Layers(spec, 2, slots, CPU, torch.bfloat16)
    buffer = layers.pool.intermediate(64, 1 + drafts)
    plan = StateCopyPlan(layers.pool, intermediate=buffer, block_size=block)
    for count in (1, 2, 3, 5, 16, 17, 48, 64):
        table = torch.arange(count, dtype=torch.int32)[:, None]  # everything is in the first block
        computed, scheduled = torch.full((count,), 8, dtype=torch.int32), torch.full((count,), 1 + drafts)
        accepted = torch.randint(1, 2 + drafts, (count,), dtype=torch.int32)
        running = plan.preprocess(table, computed, scheduled.int()).int()
        _, xbc, dt = torch.randn(count, 1 + drafts, sum(layers.widths), dtype=torch.bfloat16).split(layers.widths, -1)
        for index, layer in layers.pool.items():
            x = xbc.transpose(1, 2)
            options = {"conv_state_indices": running, "num_accepted_tokens": torch.ones_like(accepted)}
            out = tmo.causal_conv1d_update(x, layer.conv_state, layers.weight, layers.bias, "silu", **options)
            x, B, C = layers._split(out.transpose(1, 2))
            tmo.selective_state_update(
                layer.ssm_state, x, dt, layers.A, B, C, layers.D, None, layers.dt_bias, True, running,
                intermediate_states_buffer=buffer[index].ssm_state, disable_state_update=True,
            )  # fmt: skip
        plan.commit(running, running, accepted)
        plan.postprocess(table, computed, scheduled.int(), accepted)
    assert len(launched) > 3
    assert _not_warmed(launched, warmed) == []


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("name", ["mamba2", "bamba", "falcon_h1", "nemotron_h_mlp", "mamba", "jamba", "lfm2"])
def test_hugging_face_models_meet_no_kernel_that_was_not_warmed(name: str, launched: set[tuple[Any, ...]]) -> None:
    import small_models

    from torch_mamba_ops.integrations import transformers as integration

    model = small_models.build(name).to(torch.bfloat16).eval()
    found = layers_of(model)
    assert not found.pooled and found.dtype is torch.bfloat16 and not found.unknown
    warmed: set[tuple[Any, ...]] = set()
    for spec, _ in found.counts:
        warmed |= _warmed(launched, spec, torch.bfloat16, batches.Limits((1, 2, 4), 128), pooled=False)
    integration.enable()
    try:
        with torch.no_grad():
            for batch, length in ((1, 5), (1, 32), (2, 16), (3, 7), (4, 9)):
                model.generate(torch.full((batch, length), 5), max_new_tokens=3, do_sample=False, eos_token_id=None)
    finally:
        integration.disable()
    assert launched and _not_warmed(launched, warmed) == []


def test_the_sizes_at_which_configs_change_are_met() -> None:
    limits = batches.Limits((1, 64), 4096)

    def met(phase: Any, size: batches.Size, work: int, levels: tuple[int, ...]) -> set[tuple[int, int]]:
        found = batches.sizes_of_levels(phase, limits, size, [ladder.Lookup("op", "key", work, levels)])
        assert all(each.sequences <= 64 and each.tokens <= 4096 for each in found)
        return {(each.sequences, each.tokens) for each in found}

    levels = (128, 512, 8192, 1 << 20)
    assert met("decode", batches.Size(3, 3), 3 * 128, levels) == {(1, 3), (4, 4), (64, 64)}
    by_tokens = met("packed", batches.Size(1, 16), 16 * 10240, (10240, 10240 * 999, 10240 * 9999))
    assert {(1, 1), (1, 999)} <= by_tokens
    by_sequences = met("packed", batches.Size(1, 16), 128, (128, 4096))
    assert {(1, 16), (32, 32)} <= by_sequences


@pytest.mark.gpu
def test_nothing_is_compiled_after_a_warm_up() -> None:
    spec = bench.eight_billion()
    report = tmo.warmup(spec, batch_sizes=(1, 2, 4, 8, 16, 32), max_tokens=2048)
    assert not report.skipped and report.memory >= 0
    layers = bench.Layers(spec, 2, 80, CUDA, torch.bfloat16)
    with torch.no_grad(), count_compiles() as compiles:
        for batch in bench.mixed(200, 1, 32, 2048):
            layers.step(batch, layers.projected(batch), bench.slots_of(batch, 80))
    assert compiles.total == 0, compiles
    assert tmo.warmup(spec, batch_sizes=(1, 2, 4, 8, 16, 32), max_tokens=2048).compiled == 0


# --- tuning and its cache ---


@pytest.mark.gpu
def test_a_search_after_a_warm_up_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "table_name", lambda device: "no_card")
    monkeypatch.setattr(searching, "space", lambda op, key: spaces.space(op, key)[:2])
    layer = MambaStateSpec.mamba2(16, 32, 48, conv_dtype=torch.bfloat16)
    few: dict[str, Any] = {"batch_sizes": (1, 4), "max_tokens": 64}
    assert tmo.warmup(layer, **few).tuned == ()
    assert {name.partition(" ")[0] for name in tmo.warmup(layer, tuning="search", **few).tuned} == {
        "selective_state_update",
        "causal_conv1d_update",
        "causal_conv1d_varlen_fn",
        "mamba_chunk_scan_combined",
    }
    assert tmo.warmup(layer, tuning="search", **few).tuned == ()


# Kernels run in Triton's interpreter; the first two configs are tried, and the clock prefers the second.
TUNE = """
import itertools, json, logging, sys, torch, torch_mamba_ops as tmo
from torch_mamba_ops.startup import searching
from torch_mamba_ops.state import MambaStateSpec
from torch_mamba_ops.tuning import spaces
said = []
class Handler(logging.Handler):
    emit = lambda self, record: said.append(record.getMessage()) if record.levelno >= logging.WARNING else None
logging.getLogger("torch_mamba_ops").addHandler(Handler())
clock = itertools.count(0, -1)
searching._time = lambda step: next(clock)
searching.space = lambda op, key: spaces.space(op, key)[:2]
layers = [MambaStateSpec.mamba2(2, 16, 16, chunk_size=16, conv_layout="DS"), MambaStateSpec.mamba1(16, 8)]
told = []
for _ in range(2):
    told.append(tmo.warmup(layers, device="cpu", tuning="search", batch_sizes=(1, 3), max_tokens=16, strict=True).tuned)
print(json.dumps([told, said]))
"""
TUNED = set(spaces.SPACES)
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def _start(folder: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"TRITON_INTERPRET": "1", cache.VARIABLE: str(folder)}
    command = [sys.executable, "-c", TUNE]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _tuned(process: subprocess.Popen[str]) -> tuple[list[set[str]], list[str]]:
    """The operations that each of two warm-ups of a process tuned, and its warnings."""
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    told, said = json.loads(out.splitlines()[-1])
    return [{name.partition(" ")[0] for name in tuned} for tuned in told], said


@needs_triton
def test_a_second_warm_up_tunes_nothing_in_this_process_and_in_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "configs"
    (first, second), said = _tuned(_start(folder))
    assert first == TUNED and second == set() and not said
    assert {path.suffix for path in folder.rglob("*.*")} == {".json"}
    assert _tuned(_start(folder)) == ([set(), set()], [])

    damaged = next(folder.rglob("causal_conv1d_update/*.json"))
    damaged.write_text('[[1, {"SEQUENCES"')
    (first, second), said = _tuned(_start(folder))
    assert first == {"causal_conv1d_update"} and second == set()
    assert len(said) == 1 and str(damaged) in said[0] and "is damaged" in said[0]
    assert json.loads(damaged.read_text()), "it was replaced"


@needs_triton
def test_two_processes_tune_into_one_cache(tmp_path: Path) -> None:
    folder = tmp_path / "configs"
    for (first, second), said in [_tuned(process) for process in [_start(folder), _start(folder)]]:
        assert first == TUNED and second == set() and not said
    files = list(folder.rglob("*.*"))
    assert files and all(path.suffix == ".json" and json.loads(path.read_text()) for path in files)


@needs_triton
def test_a_cache_that_cannot_be_written_costs_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (first, second), said = _tuned(_start(tmp_path / "file" / "cache"))
    assert first == TUNED and second == set()
    assert len(said) == 1 and "cannot be written (Not a directory)" in said[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="everything can be written by root")
def test_a_read_only_cache_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tmp_path.chmod(0o500)
    cache.use_folder(tmp_path)
    for key in ("a", "b"):
        cache.keep("cpu", "op", key, [(1, {})])
        assert cache.load("cpu", "op", key) == [(1, {})]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path} cannot be written (Permission denied): configs found now last as long as this process"
    ]


@pytest.mark.parametrize("text", ["", "[[", "{}x", "3", "[3]", '[["a", {}]]', "[[1, 2]]", "\udcff"])
def test_a_damaged_file_is_left_out_and_warned_about_once(
    text: str, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.keep("cpu", "op", "key", [(1, {"BLOCK": 2})])
    (file,) = own_cache.rglob("*.json")
    file.write_bytes(text.encode(errors="surrogateescape"))
    cache.use_folder(own_cache)
    assert [cache.load("cpu", "op", "key") for _ in range(3)] == [[]] * 3
    (record,) = caplog.records
    assert record.getMessage().startswith(str(file)) and record.levelno == logging.WARNING


def test_a_process_keeps_to_what_it_read(own_cache: Path) -> None:
    before = cache.digest()
    cache.keep("cpu", "op", "key", [(1, {"BLOCK": 2})])
    after = cache.digest()
    (file,) = own_cache.rglob("*.json")
    file.write_text('[[1, {"BLOCK": 4}]]')  # another process
    assert cache.load("cpu", "op", "key") == [(1, {"BLOCK": 2})] and cache.digest() == after != before
    cache.use_folder(own_cache)
    assert cache.load("cpu", "op", "key") == [(1, {"BLOCK": 4})] and cache.digest() != after


def test_other_configs_are_another_backend_for_compiled_graphs(own_cache: Path, tmp_path: Path) -> None:
    def keys() -> set[str]:
        return {OPS[op].backends["triton"].key for op in ("selective_state_update", "causal_conv1d_update")}

    before = keys()
    cache.use_folder(tmp_path / "other")
    cache.keep("cpu", "op", "key", [(1, {"BLOCK": 2})])
    cache.use_folder(own_cache)
    tmo.warmup({}, cache_dir=tmp_path / "other")
    assert all(key not in before for key in keys())
    tmo.warmup({}, cache_dir=own_cache)
    assert keys() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_known_card_tunes_no_decode_step_of_an_8b_model(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "table_name", lambda device: "nvidia_h200")
    with ladder.watch() as seen:
        tuning.configs_for("selective_state_update", tuning.key_of(dtype, P=64, N=128), 128, CUDA)
        for layout in (0, 1):
            key = tuning.key_of(torch.bfloat16, W=4, K=3, DS=layout)
            tuning.configs_for("causal_conv1d_update", key, 10240, CUDA)
    assert len(seen) == 3 and all(asked.levels for asked in seen)


# --- counting ---

KERNEL = """
import triton, triton.language as tl
@triton.jit
def kernel(out, SIZE: tl.constexpr):
    tl.store(out + tl.arange(0, SIZE), 1.0)
"""


@needs_triton
def test_compiles_and_loads_are_counted_and_other_listeners_still_listen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    (tmp_path / "one_kernel.py").write_text(KERNEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    kernel = importlib.import_module("one_kernel").kernel
    heard: list[str] = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda *, src, **rest: heard.append(src.name))

    def compile_(size: int) -> None:
        source = triton.compiler.ASTSource(kernel, {"out": "*fp32", "SIZE": "constexpr"}, {"SIZE": size})
        triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 90, 32))

    with count_compiles() as first:
        compile_(16)
        compile_(32)
    with count_compiles() as second:
        compile_(16)
    compile_(64)
    assert (first.compiled, first.loaded) == (["kernel", "kernel"], []) and first.total == 2
    assert (second.compiled, second.loaded) == ([], ["kernel"]) and second.total == 1
    assert heard == ["kernel"] * 4


# --- the command line, the page and the benchmark ---


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Runs a subcommand over a ``config.json``; status, output and errors."""
    file = tmp_path / "config.json"

    def run(name: str, text: str | None, *options: str) -> tuple[int, str, str]:
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
        status = main([name, "--config", str(file), *options])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def test_the_command_line_warms_a_configuration(command: Callable[..., tuple[int, str, str]]) -> None:
    few = ("--batch-sizes", "1,2", "--max-tokens", "32", "--speculative-tokens", "1", "--conv-layout", "ds")
    status, out, _ = command("warmup", json.dumps(CONFIG), "--device", "cpu", *few)
    assert status == 0 and out.startswith("warm-up on cpu: ")
    assert "verify, 2 tokens (mamba2 H4 P8 N16 G2, conv 96 x 4 DS" in out
    status, out, _ = command("prepare", json.dumps(CONFIG), "--device", "cuda")
    assert status == 0 and out.startswith("2 x mamba2")


def test_the_command_line_skips_what_is_not_known(command: Callable[..., tuple[int, str, str]]) -> None:
    status, out, _ = command("warmup", '{"model_type": "mamba9", "mamba_state": 3}')
    assert status == 0 and out.startswith("skipped: config: got a model of type 'mamba9'")
    status, out, _ = command("warmup", '{"model_type": "llama", "num_hidden_layers": 2}')
    assert status == 0 and "nothing to do" in out


@pytest.mark.parametrize("text", ["{", None])
def test_the_command_line_needs_a_configuration(text: str | None, command: Callable[..., tuple[int, str, str]]) -> None:
    status, _, errors = command("warmup", text)
    assert status == 2 and errors.startswith("config: ") and "config.json cannot be read" in errors


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--tuning", "fast", "tuning: got 'fast', expected 'table' or 'search'"),
        ("--conv-layout", "NHD", "conv_layout: got 'NHD', expected one of 'SD', 'DS'"),
        ("--max-tokens", "0", "max_tokens: got 0, expected a positive number"),
        ("--ssm-dtype", "float8", "ssm_dtype: got 'float8', expected one of float32"),
    ],
)
def test_the_command_line_names_a_wrong_option(
    option: str, value: str, message: str, command: Callable[..., tuple[int, str, str]]
) -> None:
    status, _, errors = command("warmup", json.dumps(CONFIG), option, value)
    assert status == 2 and message in errors


def test_the_page_runs() -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "warmup.md").read_text(), re.DOTALL))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_benchmark_runs_dry(tmp_path: Path) -> None:
    out = tmp_path / "warmup.csv"
    command = [sys.executable, str(ROOT / "benchmarks" / "warmup.py"), "--dry", "--layers=1", "--batches=3"]
    done = subprocess.run([*command, f"--out={out}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(out.read_text().splitlines()) == 4
