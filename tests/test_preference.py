"""Tables that say which backend was measured to be the fastest: `auto` tries it first, and nothing else changes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import torch_mamba_ops as tmo
from torch_mamba_ops.dispatch import OPS, Op, selection
from torch_mamba_ops.startup import warming
from torch_mamba_ops.startup.batches import Limits
from torch_mamba_ops.startup.layers import layers_of
from torch_mamba_ops.state import MambaStateSpec
from torch_mamba_ops.tuning import files, ladder, preference

SSU = "selective_state_update"
NORM = "rms_norm_gated"
ROOT = Path(__file__).parent.parent
HEADS, KEY = 4, "float32 P8 N16"
Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes what the user's table for a device says of backends, and has it read."""
    folder = tmp_path / "tables"
    folder.mkdir()
    monkeypatch.setenv(files.VARIABLE, str(folder))
    before = {name: dict(op.backends) for name, op in OPS.items()}

    def write(entries: Any, *, op: str = SSU, key: str = KEY, device: str = "cpu") -> Path:
        path = folder / f"{device}.json"
        path.write_text(json.dumps({"backends": {"made_by": "hand", op: {key: entries}}}))
        ladder.reread()
        return path

    ladder.reread()
    yield write
    monkeypatch.undo()
    ladder.reread()
    for name, backends in before.items():
        OPS[name].backends.clear()
        OPS[name].backends.update(backends)
    selection._process.clear()
    selection._environment.clear()


@pytest.fixture(autouse=True)
def three(write: Write) -> None:
    """Backends of the state update that return a number of their own."""
    for name, number in (("one", 1.0), ("two", 2.0), ("three", 3.0)):
        _register(name, number)


def _register(name: str, number: float, **options: Any) -> None:
    @tmo.register_backend(SSU, name, **options)
    def constant(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return x.new_full(x.shape, number)


def _arguments(batch: int, *, head_dim: int = 8, size: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [
        torch.zeros(batch, HEADS, head_dim, size, dtype=dtype),
        torch.ones(batch, HEADS, head_dim),
        torch.ones(batch, HEADS),
        -torch.ones(HEADS),
        torch.ones(batch, 1, size),
        torch.ones(batch, 1, size),
    ]


def _call(batch: int = 1, backend: str | None = None) -> float:
    return float(tmo.selective_state_update(*_arguments(batch), backend=backend).mean())


REFERENCE = 16.0  # what the reference makes of these arguments


# --- the choice ---


def test_the_fastest_from_an_amount_of_work_on(write: Write) -> None:
    assert _call() == REFERENCE
    write([[2 * HEADS, "one"], [4 * HEADS, "two"]])
    assert [_call(batch) for batch in (1, 2, 3, 4, 9)] == [REFERENCE, 1, 1, 2, 2]


def test_the_fastest_is_taken_once_it_is_registered_without_its_reason(write: Write) -> None:
    write([[1, "one"]])
    _register("one", 1.0, why_not=lambda *tensors, **options: ["it is broken"])
    assert [_call() for _ in range(3)] == [REFERENCE] * 3  # the last ones are repeated, not chosen anew
    _register("one", 1.0)
    assert _call() == 1


def test_what_is_measured_of_others_says_nothing(write: Write) -> None:
    write([[1, "one"]])
    for other in ({"head_dim": 4}, {"size": 8}, {"dtype": torch.bfloat16}):
        arguments = _arguments(2, **other)
        assert tmo.explain(SSU, *arguments).chosen == "reference"
    write([[1, "one"]], device="nvidia_h200")
    assert tmo.explain(SSU, *_arguments(2)).chosen == "one", "the table for this device stays"


def test_calls_of_another_kind_than_the_measured_go_by_the_fixed_order(write: Write) -> None:
    write([[1, "one"]])
    state, x, dt, A, B, C = _arguments(2)
    slots = torch.arange(2, dtype=torch.int32)
    several = (state, x[:, None], dt[:, None], A, B[:, None], C[:, None])
    buffer = torch.zeros(2, 1, *state.shape[1:])
    for arguments, more in (
        (several, {}),
        ((state, x, dt, A, B, C), {"cu_seqlens": torch.arange(3, dtype=torch.int32), "max_seqlen": 1}),
        ((state, x, dt, A, B, C), {"state_batch_indices": slots, "dst_state_batch_indices": slots}),
        ((state, x, dt, A, B, C), {"intermediate_states_buffer": buffer}),
        ((state, x, dt, A, B, C), {"state_batch_indices": slots[:, None], "num_accepted_tokens": slots + 1}),
    ):
        told = tmo.explain(SSU, *arguments, **more)
        assert told.chosen == "reference" and "measured" not in told.why, more
    assert tmo.explain(SSU, state, x, dt, A, B, C).chosen == "one"


def test_a_reason_passes_the_fastest_over_and_explain_tells(write: Write) -> None:
    _register("one", 1.0, why_not=lambda **arguments: ["it is not its day"])
    path = write([[1, "one"]])
    assert _call() == REFERENCE
    told = tmo.explain(SSU, *_arguments(1))
    assert told.chosen == "reference"
    assert told.why == (
        "automatic: the first of triton, reference that can run it; one, measured to be the fastest for "
        f"{KEY} and work {HEADS} ({path}: one from 1 on), cannot"
    )
    assert "one: it is not its day" in str(told) and "one (only by name)" not in str(told)


def test_explain_tells_the_table_the_key_and_the_work(write: Write) -> None:
    path = write([[1, "one"], [2 * HEADS, "two"]])
    told = tmo.explain(SSU, *_arguments(3))
    assert told.chosen == "two"
    assert told.why == (
        f"automatic: measured to be the fastest for {KEY} and work {3 * HEADS} "
        f"({path}: one from 1 on, two from {2 * HEADS} on)"
    )
    automatic = {candidate.name: candidate.automatic for candidate in told.candidates}
    assert automatic["two"] and automatic["reference"] and not automatic["one"]


def test_a_choice_by_name_stands_over_the_table(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write([[1, "one"]])
    assert _call() == 1
    monkeypatch.setenv(selection.VARIABLE, f"{SSU}=two")
    selection.read_environment()
    assert _call() == 2
    tmo.set_backend(SSU, "three")
    assert _call() == 3
    with tmo.use_backend(selective_state_update="reference"):
        assert _call() == REFERENCE
        assert _call(backend="two") == 2
        told = tmo.explain(SSU, *_arguments(1))
        assert told.why == "asked for by use_backend" and "measured" not in str(told)
        assert _call(backend="auto") == 1
    with tmo.use_backend("auto"):
        assert _call() == 1


def test_a_users_table_stands_over_the_shipped_one_key_by_key(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    for module in (files, preference):
        monkeypatch.setattr(module, "SHIPPED", shipped)
    both = {KEY: [[1, "one"]], "float32 P4 N16": [[1, "two"]]}
    (shipped / "cpu.json").write_text(json.dumps({"backends": {SSU: both}}))
    write([[1, "three"]])
    assert _call() == 3
    told = tmo.explain(SSU, *_arguments(1, head_dim=4))
    assert told.chosen == "two" and "the shipped cpu.json" in told.why


def test_any_operation_can_ask(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def prefer(x: Tensor, weight: Tensor, *tensors: Tensor | None, **options: Any) -> Any:
        return preference.preferred(NORM, x.shape[0], x.device, x.dtype, D=x.shape[1])

    monkeypatch.setattr(OPS[NORM], "prefer", prefer)

    @tmo.register_backend(NORM, "mine")
    def mine(x: Tensor, weight: Tensor) -> Tensor:
        return x * 7

    write([[3, "mine"]], op=NORM, key="float32 D4")
    for rows, factor in ((2, 1), (3, 7)):
        assert tmo.rms_norm_gated(torch.ones(rows, 4), torch.ones(4)).mean().item() == pytest.approx(factor, abs=1e-5)
    write([[1, "one"]])
    assert not OPS[NORM].swayed


def test_a_repeated_call_notices_another_table(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    long_ways: list[str] = []
    call = Op.__call__

    def counted(self: Op, *args: Any) -> Any:
        long_ways.append(self.name)
        return call(self, *args)

    monkeypatch.setattr(Op, "__call__", counted)
    arguments = _arguments(3)
    for name, number in (("one", 1), ("two", 2), ("one", 1)):
        write([[1, name]])
        for _ in range(4):
            assert tmo.selective_state_update(*arguments).mean() == number
    assert len(long_ways) == 2 + 1 + 1, "other calls are repeated"


def test_a_table_that_names_the_first_of_the_order_costs_calls_nothing(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prefer(*tensors: Any, **options: Any) -> Any:
        raise AssertionError("asked")

    write([[1, "triton"]])
    assert "measured" in tmo.explain(SSU, *_arguments(1)).why
    monkeypatch.setattr(OPS[SSU], "prefer", prefer)
    assert _call() == REFERENCE


# --- what is wrong with a table ---


def test_an_unknown_backend_is_told_with_its_place_and_the_valid_ones(write: Write) -> None:
    path = write([[1, "flashinfr"]])
    with pytest.raises(tmo.BackendError) as error:
        _call()
    for part in (str(path), SSU, KEY, "'flashinfr'", "did you mean 'flashinfer'", "'reference'", "'triton'", "'one'"):
        assert part in str(error.value)
    assert _call(backend="two") == 2
    told = tmo.explain(SSU, *_arguments(1))
    assert told.chosen is None and "flashinfr" in told.why
    with pytest.raises(Exception, match="flashinfr"):
        torch.compile(tmo.selective_state_update, backend="eager", fullgraph=True)(*_arguments(1))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "Expecting property name"),
        ("[]", "backends: expected operations"),
        ('{"backends": []}', "backends: expected operations"),
        ('{"backends": {"selective_state_updat": {}}}', "did you mean 'selective_state_update'"),
        ('{"backends": {"rms_norm_gated": {}}}', "unknown operation 'rms_norm_gated'"),
        ('{"backends": {"selective_state_update": []}}', "expected keys and their entries"),
        ('{"backends": {"selective_state_update": {"k": []}}}', r"selective_state_update: k: got \[\]"),
        ('{"backends": {"selective_state_update": {"k": [[1]]}}}', "the work growing"),
        ('{"backends": {"selective_state_update": {"k": [["1", "triton"]]}}}', "the work growing"),
        ('{"backends": {"selective_state_update": {"k": [[1, {}]]}}}', "the work growing"),
        ('{"backends": {"selective_state_update": {"k": [[2, "triton"], [2, "one"]]}}}', "the work growing"),
    ],
)
def test_a_malformed_table_is_told_by_the_first_choice_for_its_device(text: str, told: str, write: Write) -> None:
    path = write([[1, "one"]])
    path.write_text(text)
    ladder.reread()
    with pytest.raises(ValueError, match=told) as error:
        _call()
    assert str(path) in str(error.value)
    assert _call(backend="two") == 2
    path.rename(path.with_name("nvidia_h200.json"))
    ladder.reread()
    assert _call() == REFERENCE


def test_a_malformed_table_does_not_break_the_import(write: Write) -> None:
    write([[1, "one"]]).write_text('{"backends": 0}')
    program = (
        "import torch, torch_mamba_ops as tmo\n"
        "a, b = torch.ones(1, 2, 4), torch.ones(1, 1, 8)\n"
        "try: tmo.selective_state_update(torch.zeros(1, 2, 4, 8), a, a[..., 0], -a[0, :, 0], b, b)\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "cpu.json: backends: expected operations" in done.stdout


# --- torch.compile ---


class _Graphs:
    """A backend of torch.compile that keeps the graphs."""

    def __init__(self) -> None:
        self.kept: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.kept.append(graph)
        return graph

    @property
    def chosen(self) -> list[str]:
        """The backend that each graph names."""
        nodes = [node for graph in self.kept for node in graph.graph.nodes if node.target is OPS[SSU].overload]
        return [node.kwargs["backend"].partition("@")[0] for node in nodes]


def _compiled(graphs: _Graphs, **options: Any) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    step = torch.compile(lambda *given: tmo.selective_state_update(*given), backend=graphs, fullgraph=True, **options)
    return step  # type: ignore[no-any-return]


def test_the_choice_is_in_the_compiled_graph(write: Write) -> None:
    write([[1, "one"], [4 * HEADS, "two"]])
    graphs = _Graphs()
    step = _compiled(graphs, dynamic=False)
    for batch, number in ((2, 1), (4, 2), (2, 1), (4, 2)):
        assert step(*_arguments(batch)).mean() == number
    assert graphs.chosen == ["one", "two"]
    assert graphs.kept[0].graph.find_nodes(op="call_function", target=OPS[SSU].overload)[0].kwargs["backend"] == (
        OPS[SSU].backends["one"].key
    )


def test_a_symbolic_batch_takes_the_last_entry_and_is_not_guarded(write: Write) -> None:
    write([[1, "one"], [8 * HEADS, "two"], [1024 * HEADS, "three"]])
    graphs = _Graphs()
    step = _compiled(graphs)
    for batch in (2, 5, 9, 2000, 3):
        arguments = _arguments(batch)
        for tensor in (arguments[0], arguments[1], arguments[2], arguments[4], arguments[5]):
            torch._dynamo.mark_dynamic(tensor, 0)
        assert step(*arguments).mean() == 3
    assert graphs.chosen == ["three"]


def test_a_symbolic_batch_that_cannot_reach_an_entry_takes_the_one_before(write: Write) -> None:
    write([[1, "one"], [8 * HEADS, "two"], [1024 * HEADS, "three"]])
    graphs = _Graphs()
    step = _compiled(graphs)
    for batch in (2, 5, 9):
        arguments = _arguments(batch)
        for tensor in (arguments[0], arguments[1], arguments[2], arguments[4], arguments[5]):
            torch._dynamo.mark_dynamic(tensor, 0, min=2, max=512)
        assert step(*arguments).mean() == 2
    assert graphs.chosen == ["two"]


def test_another_table_recompiles_and_the_first_one_again_does_not(write: Write) -> None:
    graphs = _Graphs()
    step = _compiled(graphs, dynamic=False)
    for entries, number in (
        (None, REFERENCE),
        ([[1, "one"]], 1),
        ([[1, "two"]], 2),
        ([[1, "one"]], 1),
        ([[1, "one"], [3, "two"]], 2),
    ):
        if entries is not None:
            write(entries)
        assert step(*_arguments(2)).mean() == number
    assert set(graphs.chosen) == {"reference", "one", "two"} and len(graphs.kept) <= 4


def test_another_table_is_another_name_of_the_backends_that_have_configs(write: Write) -> None:
    def key() -> str:
        return OPS[SSU].backends["triton"].key

    write([[1, "one"]])
    first = key()
    write([[1, "two"]])
    second = key()
    write([[1, "one"]])
    assert key() == first != second


def test_a_name_stands_over_the_table_in_compiled_code(write: Write) -> None:
    write([[1, "one"]])
    graphs = _Graphs()
    step = _compiled(graphs)
    assert step(*_arguments(2)).mean() == 1
    with tmo.use_backend(selective_state_update="two"):
        assert step(*_arguments(2)).mean() == 2
    assert step(*_arguments(2)).mean() == 1
    assert graphs.chosen == ["one", "two"]


def test_a_size_is_a_symbol_unless_a_table_is_asked(write: Write) -> None:
    """With dynamic=True one graph serves layers of all sizes, where no table tells them apart."""
    for entries, most in (([[1, "triton"]], 1), ([[1, "one"]], 3)):
        write(entries)
        graphs = _Graphs()
        step = _compiled(graphs, dynamic=True)
        for head_dim, size in ((8, 16), (12, 24), (20, 40)):
            step(*_arguments(2, head_dim=head_dim, size=size))
        assert len(graphs.kept) == most


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_goes_by_the_fixed_order(strict: bool, write: Write) -> None:
    write([[1, "one"]])

    class Step(torch.nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            return tmo.selective_state_update(*given)

    with torch.no_grad():
        program = torch.export.export(Step(), tuple(_arguments(2)), strict=strict)
    assert "'one@" not in str(program) and "one@" not in program.graph_module.code
    assert _call(2) == 1


def test_another_table_is_another_graph_for_the_disk_cache(tmp_path: Path, write: Write) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import json, torch, torch_mamba_ops as tmo\n"
        "from torch._dynamo.utils import counters\n"
        "def register(name, number):\n"
        "    @tmo.register_backend('selective_state_update', name, trace='inline', version=name)\n"
        "    def constant(state, x, dt, A, B, C): return x * number\n"
        "register('one', 1.0)\n"
        "register('two', 2.0)\n"
        "h, o = torch.ones(2, 4, 8), torch.ones(2, 1, 16)\n"
        "step = torch.compile(lambda *given: tmo.selective_state_update(*given), fullgraph=True)\n"
        "result = float(step(torch.zeros(2, 4, 8, 16), h, h[..., 0], -h[0, :, 0], o, o).mean())\n"
        "caches = {**counters['inductor'], **counters['aot_autograd']}\n"
        "print(json.dumps([result, caches.get('autograd_cache_hit', 0) + caches.get('fxgraph_cache_hit', 0)]))\n"
    )
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
    }

    def run(name: str) -> tuple[float, bool]:
        write([[1, name]])
        done = subprocess.run(
            [sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        result, hits = json.loads(done.stdout.splitlines()[-1])
        return result, hits > 0

    assert run("one") == (1.0, False)
    assert run("two") == (2.0, False)
    assert run("one") == (1.0, True)


def test_a_gpu_is_known_by_its_name_while_the_compiler_traces(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(files._gpus, 0, "pretended_card")
    write([[1, "one"]], device="pretended_card")
    graphs = _Graphs()
    with FakeTensorMode():
        arguments = [torch.empty_like(tensor, device="cuda:0") for tensor in _arguments(2)]
        _compiled(graphs)(*arguments)
    assert graphs.chosen == ["one"]


@pytest.mark.gpu
def test_a_gpu_is_found_by_its_name_and_the_shipped_table_is_honoured(write: Write) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    arguments = [tensor.to(device) for tensor in _arguments(2)]
    write([[1, "one"]], device=files.table_name(device))
    assert tmo.selective_state_update(*arguments).mean() == 1
    graphs = _Graphs()
    assert _compiled(graphs)(*arguments).mean() == 1 and graphs.chosen == ["one"]
    if files.table_name(device) == "nvidia_h200":
        told = tmo.explain(SSU, *(t.to(device) for t in _arguments(12, head_dim=64, size=128)))
        assert told.chosen == "triton" and "measured to be the fastest for float32 P64 N128 and work 48" in told.why


# --- warm-up ---


def test_warm_up_makes_each_call_with_the_backend_of_its_size(write: Write) -> None:
    layer = MambaStateSpec.mamba2(HEADS, 8, 16, conv_dtype=torch.float32)
    # On a machine without a GPU fake CUDA tensors have the table "none".
    device = torch.device("cuda")
    write([[64 * HEADS, "one"]], device=files.table_name(device))

    @tmo.register_backend(SSU, "one")
    def one(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **rest: Any) -> Tensor:
        return x

    jobs, _ = warming._jobs(layers_of(layer), device, None, Limits((8, 256), 64))
    chosen = {job.size.sequences: job.backend for batches in jobs for job in batches if job.name.startswith(SSU)}
    assert chosen[8] == "triton" and chosen[256] == "one"


# --- the rule that makes entries ---


@pytest.fixture
def rule(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tune

    return tune.fastest  # type: ignore[no-any-return]


def _rows(batch: int, case: str = "H4 P64 N128 G1", dtype: str = "float32", **times: float) -> list[dict[str, str]]:
    shared = {"benchmark": "ssu", "case": case, "batch": str(batch), "dtype": dtype}
    return [{**shared, "contender": name, "microseconds": str(time)} for name, time in times.items()]


def test_a_backend_is_entered_where_it_is_faster_by_more_than_the_noise(rule: Callable[..., Any]) -> None:
    rows = [
        *_rows(1, ours=10.0, flashinfer=9.95, vllm=1.0),
        *_rows(2, ours=10.0, flashinfer=9.5, vllm=1.0),
        *_rows(4, ours=10.0, flashinfer=9.0),
        *_rows(8, ours=10.0, flashinfer=11.0),
        *_rows(1, dtype="bfloat16", ours=10.0),
        {"benchmark": "conv", "case": "SD D10240 W4", "batch": "1"},
    ]
    key = "float32 P64 N128"
    assert rule(rows) == {
        SSU: {key: [(4, "triton"), (8, "flashinfer"), (32, "triton")], "bfloat16 P64 N128": [(4, "triton")]}
    }
    both = [*_rows(2, ours=10.0, flashinfer=9.0), *_rows(1, "H8 P64 N128 G1", ours=10.0, flashinfer=9.95)]
    assert rule(both) == {SSU: {key: [(8, "triton")]}}, "in every row of that work"


def test_the_shipped_entries_are_those_of_the_shipped_measurements(rule: Callable[..., Any]) -> None:
    section = json.loads((files.SHIPPED / "nvidia_h200.json").read_text())["backends"]
    with (ROOT / "benchmarks" / "results" / "decode_h200.csv").open(newline="") as file:
        made = rule(list(csv.DictReader(file)))
    assert "decode_h200.csv" in section.pop("made_by")
    assert json.loads(json.dumps(made)) == section


def test_a_call_like_the_shipped_measurements_is_told_to_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preference, "table_name", lambda device: "nvidia_h200")
    with FakeTensorMode():
        given = (
            torch.empty(8, 128, 64, 128, device="cuda"), torch.empty(8, 128, 64, device="cuda"),
            torch.empty(8, 128, device="cuda"), torch.empty(128, device="cuda"),
            torch.empty(8, 8, 128, device="cuda"), torch.empty(8, 8, 128, device="cuda"),
        )  # fmt: skip
        told = tmo.explain(SSU, *given)
    assert told.chosen == "triton"
    assert told.why == (
        "automatic: measured to be the fastest for float32 P64 N128 and work 1024 "
        "(the shipped nvidia_h200.json: triton from 48 on)"
    )
