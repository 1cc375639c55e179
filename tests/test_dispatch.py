"""Choosing a backend: precedence, user backends, explanations and errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import torch_mamba_ops as tmo
from torch_mamba_ops.dispatch import OPS, selection
from torch_mamba_ops.testing import check

OP = "rms_norm_gated"


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    before = dict(OPS[OP].backends)
    yield
    OPS[OP].backends.clear()
    OPS[OP].backends.update(before)
    selection._process.clear()
    selection._environment.clear()
    selection._malformed.clear()


def _register(name: str, factor: float, trace: Any = "inline", **options: Any) -> None:
    @tmo.register_backend(OP, name, trace=trace, **options)
    def scaled(x: Tensor, weight: Tensor) -> Tensor:
        return x * weight * factor


def _call(backend: str | None = None) -> float:
    return float(tmo.rms_norm_gated(torch.ones(1, 4), torch.ones(4), backend=backend).mean())


def test_call_beats_context_beats_process_beats_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for factor in (2.0, 3.0, 4.0, 5.0):
        _register(f"times{factor:.0f}", factor)
    assert _call() == pytest.approx(1.0, abs=1e-5)
    monkeypatch.setenv("TORCH_MAMBA_OPS_BACKEND", f"{OP}=times2")
    selection.read_environment()
    assert _call() == 2
    tmo.set_backend(OP, "times3")
    assert _call() == 3
    with tmo.use_backend(rms_norm_gated="times4"):
        assert _call() == 4
        assert _call("times5") == 5
        with tmo.use_backend("auto"):
            assert _call() == 4, "a choice for this operation stands over one for every operation"
        with tmo.use_backend(rms_norm_gated="auto"):
            assert _call() == pytest.approx(1.0, abs=1e-5)
    assert _call() == 3
    tmo.set_backend(OP, None)
    assert _call() == 2


def test_a_choice_for_every_operation_holds_where_there_is_such_a_backend() -> None:
    _register("mine", 7.0)
    with tmo.use_backend("mine"):
        assert _call() == 7
        pool, slots = torch.zeros(2, 3), torch.tensor([0])
        tmo.copy_states(torch.ones(2, 3), pool, slots, slots)  # has no backend of that name
        assert pool[0].eq(1).all()


def test_explain_names_who_made_the_choice_that_holds() -> None:
    _register("mine", 2.0)
    tmo.set_backend("rms_norm_gated", "reference")
    with tmo.use_backend("mine"):
        told = tmo.explain("rms_norm_gated", torch.ones(2, 4), torch.ones(4))
    assert told.chosen == "mine" and "asked for by use_backend" in str(told)
    assert "asked for by set_backend" in str(tmo.explain("rms_norm_gated", torch.ones(2, 4), torch.ones(4)))


def test_a_context_is_left_when_its_block_raises() -> None:
    _register("mine", 7.0)
    with pytest.raises(RuntimeError, match="boom"), tmo.use_backend(rms_norm_gated="mine"):
        raise RuntimeError("boom")
    assert _call() == pytest.approx(1.0, abs=1e-5)


def test_a_context_belongs_to_its_thread() -> None:
    _register("mine", 7.0)
    seen: list[float] = []
    with tmo.use_backend(rms_norm_gated="mine"):
        thread = threading.Thread(target=lambda: seen.append(_call()))
        thread.start()
        thread.join()
    assert seen == [pytest.approx(1.0, abs=1e-5)]


@pytest.mark.parametrize("trace", ["inline", "opaque"])
def test_switching_recompiles_once_a_choice_and_never_on_return(trace: str) -> None:
    _register("two", 2.0, trace)
    _register("three", 3.0, trace)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda x, w: tmo.rms_norm_gated(x, w), backend=counter, fullgraph=True)
    x, w = torch.ones(2, 4), torch.ones(4)
    for _ in range(2):
        for name, want in (("two", 2.0), ("three", 3.0), ("reference", 1.0)):
            tmo.set_backend(OP, name)
            assert compiled(x, w).mean().item() == pytest.approx(want, abs=1e-5)
    assert counter.frame_count == 3


@pytest.mark.parametrize("trace", ["inline", "opaque"])
def test_a_users_backend_is_in_the_compiled_graph(trace: str) -> None:
    _register("mine", 2.0, trace)
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def keep_aten(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        keep(graph, inputs)
        return make_boxed_func(graph)

    compiled = torch.compile(
        lambda x, w: tmo.rms_norm_gated(x, w), backend=aot_autograd(fw_compiler=keep_aten), fullgraph=True
    )
    with tmo.use_backend(rms_norm_gated="mine"):
        assert compiled(torch.ones(2, 4), torch.ones(4)).eq(2).all()
    ours = [node for node in graphs[0].graph.nodes if node.target is OPS[OP].overload]
    if trace == "opaque":
        assert [node.kwargs["backend"] for node in ours] == [OPS[OP].backends["mine"].key]
    else:
        assert not ours
        assert [n.target for n in graphs[0].graph.nodes if n.op == "call_function"] == [torch.ops.aten.mul.Tensor] * 2


def test_registering_again_takes_effect_in_compiled_code() -> None:
    _register("mine", 2.0)
    compiled = torch.compile(lambda x, w: tmo.rms_norm_gated(x, w, backend="mine"), backend="aot_eager", fullgraph=True)
    x, w = torch.ones(2, 4), torch.ones(4)
    assert compiled(x, w).eq(2).all()
    _register("mine", 3.0)
    assert compiled(x, w).eq(3).all()


def test_a_backend_may_use_a_name_that_gets_its_value_later() -> None:
    @tmo.register_backend("rms_norm_gated", "counted")
    def counted(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
        calls.append(len(calls))
        return torch.zeros_like(x)

    calls: list[int] = []
    assert not tmo.rms_norm_gated(torch.ones(2, 8), torch.ones(8), backend="counted").any()
    assert calls == [0]


def test_a_choice_inside_the_compiled_region() -> None:
    _register("mine", 2.0)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(x: Tensor, w: Tensor) -> Tensor:
        with tmo.use_backend(rms_norm_gated="mine"):
            return tmo.rms_norm_gated(x, w)

    assert compiled(torch.ones(2, 4), torch.ones(4)).eq(2).all()


def test_why_not_sees_metadata_and_every_reason_is_told() -> None:
    def why_not(x: Tensor, weight: Tensor) -> list[str]:
        reasons = [] if x.shape[-1] % 8 == 0 else [f"channels={x.shape[-1]}, a multiple of 8 is needed"]
        return reasons if x.dtype == torch.bfloat16 else [*reasons, f"dtype={x.dtype}, bfloat16 is needed"]

    _register("picky", 2.0, why_not=why_not)
    with pytest.raises(tmo.BackendError) as error:
        tmo.rms_norm_gated(torch.ones(1, 4), torch.ones(4), bias=torch.ones(4), backend="picky")
    for part in ("picky", "float32[1, 4]", "does not take bias", "multiple of 8", "bfloat16 is needed"):
        assert part in str(error.value)
    with torch._subclasses.FakeTensorMode():
        told = tmo.explain(OP, torch.empty(1, 12, device="cuda"), torch.empty(12, device="cuda"))
    assert told.chosen == "reference"
    picky = next(candidate for candidate in told.candidates if candidate.name == "picky")
    assert len(picky.reasons) == 2 and not picky.automatic
    assert "only by name" in str(told) and "channels=12" in str(told)


def test_nothing_fits_lists_every_backend_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS[OP]
    refuse = {name: [f"{name} says no", f"{name} says never"] for name in ("fast", "faster")}
    for name, reasons in refuse.items():
        _register(name, 1.0, why_not=lambda x, weight, reasons=reasons: reasons)
    monkeypatch.setattr(op, "auto", ("faster", "fast"))
    with pytest.raises(tmo.NoBackendError) as error:
        _call()
    for reason in (*refuse["fast"], *refuse["faster"], "rms_norm_gated(x: cpu float32[1, 4]"):
        assert reason in str(error.value)
    assert tmo.explain(OP, torch.ones(1, 4), torch.ones(4)).chosen is None


def test_an_argument_that_a_backend_does_not_name_is_never_dropped() -> None:
    _register("mine", 2.0)
    x, w = torch.ones(1, 4), torch.ones(4)
    for used in ({"z": x}, {"bias": w}, {"eps": 1e-3}, {"norm_before_gate": False}, {"group_size": 2}):
        with pytest.raises(tmo.BackendError, match=f"does not take {next(iter(used))}"):
            tmo.rms_norm_gated(x, w, **used, backend="mine")


def test_a_backend_that_breaks_the_contract_is_refused() -> None:
    x, w = torch.ones(1, 4), torch.ones(4)
    for name, result in (("shape", x[:, :2]), ("dtype", x.half()), ("nothing", None), ("input", x)):

        @tmo.register_backend(OP, name)
        def broken(x: Tensor, weight: Tensor) -> Any:
            return x if name == "input" else result  # noqa: B023 - called in this turn of the loop

        with pytest.raises(tmo.BackendError, match=f"backend '{name}'"):
            tmo.rms_norm_gated(x, w, backend=name)


def test_wrong_registrations() -> None:
    def fine(x: Tensor, weight: Tensor) -> Tensor:
        return x

    def misspelt(x: Tensor, wieght: Tensor) -> Tensor:
        return x

    with pytest.raises(TypeError, match="did you mean 'weight'"):
        tmo.register_backend(OP, "mine")(misspelt)
    with pytest.raises(ValueError, match="did you mean 'rms_norm_gated'"):
        tmo.register_backend("rms_norm_gate", "mine")
    with pytest.raises(ValueError, match="built-in"):
        tmo.register_backend(OP, "reference")(fine)
    with pytest.raises(ValueError, match="'inline' or 'opaque'"):
        tmo.register_backend(OP, "mine", trace="fused")  # type: ignore[arg-type]
    for name in ("auto", "*", "", "a@b", "a=b"):
        with pytest.raises(ValueError, match="expected a word"):
            tmo.register_backend(OP, name)


def test_unknown_names_are_told_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'rms_norm_gated'"):
        tmo.set_backend("rms_norm_gate", "reference")
    with pytest.raises(tmo.BackendError, match="did you mean 'reference'"):
        tmo.set_backend(OP, "referense")
    with pytest.raises(tmo.BackendError, match="did you mean 'reference'"):
        _call("referense")
    with pytest.raises(tmo.BackendError, match="unknown backend 'nowhere'"):
        tmo.set_backend("*", "nowhere")
    with pytest.raises(ValueError, match="unknown operation"), tmo.use_backend(no_such_op="reference"):
        pass
    with pytest.raises(ValueError, match="unknown operation"):
        tmo.explain("no_such_op")


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("rms_norm_gated", "expected operation=backend"),
        ("rms_norm_gated=", "expected operation=backend"),
        ("rms_norm_gatd=reference", "did you mean 'rms_norm_gated'"),
        ("rms_norm_gated=referense", "did you mean 'reference'"),
    ],
)
def test_a_malformed_environment_is_told_by_the_first_call(
    value: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_MAMBA_OPS_BACKEND", value)
    selection.read_environment()
    with pytest.raises(ValueError, match=told) as error:
        _call()
    assert "TORCH_MAMBA_OPS_BACKEND" in str(error.value)
    assert _call("reference") == pytest.approx(1.0, abs=1e-5)


def test_a_program_saved_with_another_hash_still_runs() -> None:
    x, w = torch.ones(1, 4), torch.ones(4)
    options = {"eps": 1e-6, "group_size": None, "norm_before_gate": True}
    assert OPS[OP].overload(x, w, None, None, **options, backend="reference@000000000000").mean() == pytest.approx(
        1.0, abs=1e-5
    )
    with pytest.raises(tmo.BackendError, match="unknown backend 'gone'"):
        OPS[OP].overload(x, w, None, None, **options, backend="gone@000000000000")


def test_the_operator_demands_a_backend() -> None:
    with pytest.raises(RuntimeError, match="backend"):
        OPS[OP].overload(torch.ones(1, 4), torch.ones(4), None, None, eps=1e-6, group_size=None, norm_before_gate=True)


def test_a_third_party_backend_can_check_itself() -> None:
    from torch_mamba_ops.ops.rms_norm_gated.reference import rms_norm_gated

    @tmo.register_backend(OP, "copy", trace="inline")
    def copy(x: Tensor, weight: Tensor, z: Tensor | None, eps: float) -> Tensor:
        return rms_norm_gated(x, weight, None, z, eps=eps, group_size=None, norm_before_gate=True)

    skipped = check.check_backend(OP, "copy")
    assert any("group_size" in reason for reason in skipped) and len(skipped) < len(check.cases(OP))
    _register("wrong", 2.0)
    with pytest.raises(AssertionError):
        tmo.register_backend(OP, "wrong")(lambda x, weight, z, eps: 1.01 * copy(x, weight, z, eps))
        check.check_backend(OP, "wrong")
