"""Calls like earlier ones start at once, and nobody can tell: same results, same errors, nothing unseen."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import inspect
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from torch_mamba_ops import causal_conv1d_update, register_backend, selective_state_update, set_backend, use_backend
from torch_mamba_ops.dispatch import OPS, Op, repeat, selection
from torch_mamba_ops.ops import launch as launching
from torch_mamba_ops.testing import build, cases
from torch_mamba_ops.testing.check import copied
from torch_mamba_ops.tuning import use_config

DECODE = ("selective_state_update", "causal_conv1d_update")
SSU = OPS["selective_state_update"]
Counter = list[str]


@pytest.fixture
def long_ways(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """The names of the operations that were called the long way."""
    seen: Counter = []
    call = Op.__call__

    def counted(self: Op, *args: Any) -> Any:
        seen.append(self.name)
        return call(self, *args)

    monkeypatch.setattr(Op, "__call__", counted)
    return seen


@pytest.fixture
def step() -> dict[str, Any]:
    """Arguments of a state update."""
    return _step(2)


def _step(batch: int) -> dict[str, Any]:
    (case,) = (case for case in cases(SSU.name) if case.name == "slots_with_padding")
    arguments = build(case)
    for name in ("x", "dt", "B", "C", "z", "state_batch_indices"):
        arguments[name] = arguments[name][:batch].clone()
    return arguments


def _learn(arguments: dict[str, Any], op: str = SSU.name, **more: Any) -> None:
    for _ in range(2):
        OPS[op].function(**copied(arguments), **more)


def _long(op: str) -> Callable[..., Any]:
    """The public function as it is without the memory of earlier calls."""
    return inspect.unwrap(OPS[op].function)


# --- the same results ---


@pytest.mark.parametrize(
    ("op", "case"), [(op, case) for op in DECODE for case in cases(op)], ids=lambda value: getattr(value, "name", value)
)
@pytest.mark.parametrize("grad", [False, True])
def test_every_case_is_repeated_with_the_same_result(op: str, case: Any, grad: bool, long_ways: Counter) -> None:
    arguments = build(case)
    wanted = copied(arguments)
    with torch.set_grad_enabled(grad):
        result = _long(op)(**wanted, backend="reference")
        long_ways.clear()
        for _ in range(5):
            given = copied(arguments)
            again = OPS[op].function(**given, backend="reference")
            assert torch.equal(again, result) and again.stride() == result.stride() and again.dtype == result.dtype
            for name, value in given.items():
                assert not isinstance(value, Tensor) or torch.equal(value, wanted[name]), name
    # A packed tree is checked by the values of parents and of the bounds together, which no repeated call can do.
    packed_tree = "parents" in arguments and arguments["parents"].dim() == 1
    assert len(long_ways) == 5 if packed_tree else len(long_ways) <= 2


def test_new_values_in_the_same_tensors_count(step: dict[str, Any], long_ways: Counter) -> None:
    _learn(step)
    long_ways.clear()
    for fill in (0.5, -1.0):
        step["x"].fill_(fill)
        given, wanted = copied(step), copied(step)
        assert torch.equal(selective_state_update(**given), _long(SSU.name)(**wanted))
        assert torch.equal(given["state"], wanted["state"])
    assert len(long_ways) == 2  # of the long way itself


def test_batches_and_layers_do_not_drive_each_other_out(long_ways: Counter) -> None:
    steps = [_step(batch) for batch in (1, 2, 3)]
    steps += [given | {"D": None} for given in steps] + [given | {"dt_softplus": False} for given in steps]
    for given in steps:
        _learn(given)
    long_ways.clear()
    for _ in range(3):
        for given in steps:
            selective_state_update(**copied(given))
    assert not long_ways


def test_however_the_arguments_are_written(step: dict[str, Any], long_ways: Counter) -> None:
    names = ("state", "x", "dt", "A", "B", "C")
    rest = {name: value for name, value in step.items() if name not in names}
    wanted = _long(SSU.name)(**copied(step))
    for _ in range(3):
        given = copied(step)
        ways = (
            lambda g=given: selective_state_update(**g),
            lambda g=given: selective_state_update(*(g[name] for name in names), **rest),
            lambda g=given: selective_state_update(*(g[name] for name in names), **dict(reversed(rest.items()))),
        )
        for way in ways:
            given["state"].copy_(step["state"])
            assert torch.equal(way(), wanted)
    long_ways.clear()
    for way in ways:
        way()
    assert not long_ways


def test_a_result_is_a_new_tensor_and_nothing_is_kept_alive(step: dict[str, Any]) -> None:
    given = copied(step)
    results = [selective_state_update(**given) for _ in range(4)]
    assert len({result.data_ptr() for result in results}) == 4
    alive = [weakref.ref(value) for value in (*given.values(), *results) if isinstance(value, Tensor)]
    del given, results
    gc.collect()
    assert not any(reference() is not None for reference in alive)


def test_a_given_output_is_filled_and_an_input_of_it_refused(step: dict[str, Any]) -> None:
    wanted = _long(SSU.name)(**copied(step))
    for _ in range(4):
        out = torch.empty_like(step["x"])
        assert selective_state_update(**copied(step), out=out) is out and torch.equal(out, wanted)
        given = copied(step)
        with pytest.raises(ValueError, match="out: shares memory with x"):
            selective_state_update(**given, out=given["x"])


def test_without_torchs_guards_every_call_takes_the_long_way(
    step: dict[str, Any], long_ways: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeat, "_Guards", None)
    function = repeat.repeatable(SSU)(_long(SSU.name))
    for _ in range(4):
        function(**copied(step))
    assert len(long_ways) == 4


# --- the same errors ---


def _bad(step: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"x": step["x"][:1]}
    yield {"x": step["x"].long()}
    yield {"x": None}
    yield {"x": "x"}
    yield {"x": step["x"].to("meta")}
    yield {"dt": step["dt"][0]}
    yield {"B": step["B"][..., :1]}
    yield {"D": 1.0}
    yield {"z": torch.empty(0)}
    yield {"state": step["state"][:, :1].expand_as(step["state"])}
    yield {"state": step["state"].clone().requires_grad_()}
    yield {"state": torch.nn.Parameter(step["state"])}
    yield {"state_batch_indices": step["state_batch_indices"] + 1000}
    yield {"state_batch_indices": torch.full_like(step["state_batch_indices"], 1)}
    yield {"state_batch_indices": None}
    yield {"state_batch_indices": step["state_batch_indices"].float()}
    yield {"pad_slot_id": -2}
    yield {"pad_slot_id": "-1"}
    yield {"pad_slot_id": -1.0}
    yield {"pad_slot_id": torch.tensor(-1)}
    yield {"backend": "none"}
    yield {"max_seqlen": 3}
    yield {"dst_state_batch_indices": step["state_batch_indices"] + 1000}
    yield {"rand_seed": torch.zeros(1, dtype=torch.int64)}


@pytest.mark.parametrize("which", range(24))
@pytest.mark.parametrize("grad", [False, True])
def test_a_wrong_argument_after_good_calls_is_refused_as_ever(step: dict[str, Any], which: int, grad: bool) -> None:
    step["state_batch_indices"] = torch.tensor([3, -1], dtype=torch.int32)
    bad = step | list(_bad(step))[which]
    with torch.set_grad_enabled(grad):
        _learn({name: step.get(name, SSU.defaults[name]) for name in bad})  # right ones, written alike
        with pytest.raises(Exception) as expected:
            _long(SSU.name)(**bad)
        for _ in range(3):
            with pytest.raises(type(expected.value)) as raised:
                selective_state_update(**bad)
            assert str(raised.value) == str(expected.value)


def test_values_are_checked_at_every_call() -> None:
    (case,) = (case for case in cases("causal_conv1d_update") if case.name == "packed")
    arguments = build(case)
    _learn(arguments, "causal_conv1d_update")
    bounds = arguments["query_start_loc"].clone()
    arguments["query_start_loc"][-1] += 1
    with pytest.raises(ValueError, match="query_start_loc: got"):
        causal_conv1d_update(**copied(arguments))
    arguments["query_start_loc"].copy_(bounds)
    causal_conv1d_update(**copied(arguments))
    arguments["conv_state_indices"][0] = arguments["conv_state_indices"][1]
    with pytest.raises(ValueError, match="twice"):
        causal_conv1d_update(**copied(arguments))


def test_an_integer_whose_values_might_be_checked_keeps_the_long_way(long_ways: Counter) -> None:
    (case,) = (case for case in cases(SSU.name) if case.name == "accepted_tokens")
    function = repeat.repeatable(SSU)(_long(SSU.name))  # which does not say that num_accepted_tokens is unread
    for _ in range(4):
        function(**build(case))
    assert len(long_ways) == 4


def test_two_written_tensors_must_lie_apart_at_every_call() -> None:
    (case,) = (case for case in cases(SSU.name) if case.name == "intermediate_states")
    arguments = build(case)
    _learn(arguments)
    rows = arguments["intermediate_states_buffer"]
    together = torch.zeros(arguments["state"].numel() + rows.numel())
    state = together[: arguments["state"].numel()].view(arguments["state"].shape)
    buffer = together[-rows.numel() :].view(rows.shape)
    over = together[: rows.numel()].view(rows.shape)
    for _ in range(3):
        selective_state_update(**arguments | {"state": state, "intermediate_states_buffer": buffer})
        with pytest.raises(ValueError, match="shares memory with state"):
            selective_state_update(**arguments | {"state": state, "intermediate_states_buffer": over})


def test_what_a_public_function_does_around_its_operator_is_not_left_out(long_ways: Counter) -> None:
    (case,) = (case for case in cases(SSU.name) if case.name == "bare")
    given = {name: value for name, value in build(case).items() if isinstance(value, Tensor)}

    @repeat.repeatable(SSU)
    def all_but_the_first(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return _long(SSU.name)(state[1:], x[1:], dt[1:], A, B[1:], C[1:])

    @repeat.repeatable(SSU)
    def twice(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return _long(SSU.name)(state, x, dt, A, B, C) * 2

    wanted = _long(SSU.name)(**copied(given))
    for _ in range(4):
        assert torch.equal(all_but_the_first(**copied(given)), wanted[1:])
        assert torch.equal(twice(**copied(given)), wanted * 2)
    assert len(long_ways) == 9


# --- the choice ---


@pytest.fixture
def ran() -> Iterator[list[str]]:
    """Backends ``one`` and ``two`` of the state update, which note that they ran."""
    seen: list[str] = []
    reference = SSU.backends["reference"]
    for name in ("one", "two"):
        _register(name, seen)
    yield seen
    for name in ("one", "two"):
        SSU.backends.pop(name, None)
    set_backend(SSU.name, None)
    assert SSU.backends["reference"] is reference


def _register(name: str, seen: list[str], label: str | None = None) -> None:
    @register_backend(SSU.name, name, version=label or name)
    def run(**arguments: Any) -> Tensor:
        seen.append(label or name)
        return torch.zeros_like(arguments["x"])


def test_every_way_to_choose_counts_at_once(
    step: dict[str, Any], ran: list[str], long_ways: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(**more: Any) -> str:
        ran.clear()
        selective_state_update(**copied(step), **more)
        return "".join(ran)

    for _ in range(4):
        assert run() == "" and run(backend="one") == "one" and run(backend="two") == "two"
        with use_backend(selective_state_update="one"):
            assert run() == "one" and run(backend="reference") == ""
            with use_backend("two"), use_backend(selective_state_update="two"):
                assert run() == "two"
            assert run() == "one"
        set_backend("*", "two")
        assert run() == "two"
        set_backend(SSU.name, "one")
        assert run() == "one"
        set_backend(SSU.name, None)
        set_backend("*", None)
        monkeypatch.setenv(selection.VARIABLE, f"{SSU.name}=two")
        selection.read_environment()
        assert run() == "two"
        monkeypatch.delenv(selection.VARIABLE)
        selection.read_environment()
    long_ways.clear()
    assert run() == "" and run(backend="one") == "one" and not long_ways


def test_a_backend_registered_again_replaces_the_one_of_earlier_calls(step: dict[str, Any], ran: list[str]) -> None:
    _learn(step, backend="one")
    _register("one", ran, "another")
    ran.clear()
    selective_state_update(**copied(step), backend="one")
    assert ran == ["another"]
    SSU.backends.pop("one")
    with pytest.raises(Exception, match="one"):
        selective_state_update(**copied(step), backend="one")


def test_a_choice_in_one_thread_is_not_anothers(step: dict[str, Any], ran: list[str]) -> None:
    wanted = _long(SSU.name)(**copied(step), backend="reference")
    steps = [_step(batch) for batch in (1, 2, 3)]
    truths = [_long(SSU.name)(**copied(given), backend="reference") for given in steps]
    assert torch.equal(truths[1], wanted)
    wrong: list[str] = []

    def work(name: str) -> None:
        with use_backend(selective_state_update=name):
            for _ in range(60):
                for given, truth in zip(steps, truths, strict=True):
                    result = selective_state_update(**copied(given))
                    if not torch.equal(result, truth if name == "reference" else torch.zeros_like(truth)):
                        wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("reference", "one") * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- who watches sees ---


class _Dispatch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class _Function(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


NAME = "torch_mamba_ops.selective_state_update.default"


def test_modes_see_the_operator(step: dict[str, Any]) -> None:
    for _ in range(3):  # before and after calls that are remembered
        with _Dispatch() as mode:
            selective_state_update(**copied(step))
        assert NAME in mode.seen
        with _Function() as seeing:
            selective_state_update(**copied(step))
        assert NAME in seeing.seen
        _learn(step)


@pytest.mark.parametrize("every_thread", [False, True])
def test_a_profiler_sees_the_operator(step: dict[str, Any], every_thread: bool) -> None:
    _learn(step)
    settings = torch._C._profiler._ExperimentalConfig(profile_all_threads=every_thread)
    with profile(activities=[ProfilerActivity.CPU], experimental_config=settings) as profiled:
        selective_state_update(**copied(step))
    assert any(event.key == "torch_mamba_ops::selective_state_update" for event in profiled.key_averages())


def test_fake_tensors_and_traces_get_the_operator(step: dict[str, Any], long_ways: Counter) -> None:
    _learn(step)
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(value) if isinstance(value, Tensor) else value for n, value in step.items()}
        assert selective_state_update(**fake).shape == step["x"].shape
    tensors = {name: value for name, value in step.items() if isinstance(value, Tensor)}
    options = {name: value for name, value in step.items() if name not in tensors}
    call = lambda given: selective_state_update(**given, **options)  # noqa: E731
    for tracing in ("real", "symbolic"):
        traced = make_fx(call, tracing_mode=tracing)(tensors)
        assert NAME in {str(node.target) for node in traced.graph.nodes}
    outside = selective_state_update(**fake)
    assert outside.shape == step["x"].shape and type(outside).__name__ == "FakeTensor"


def test_a_subclass_sees_the_operator(step: dict[str, Any]) -> None:
    seen: list[str] = []

    class Watching(Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return super().__torch_function__(function, kinds, args, kwargs)

    _learn(step)
    for name in ("x", "A"):
        seen.clear()
        selective_state_update(**copied(step) | {name: step[name].as_subclass(Watching)})
        assert NAME in seen


def test_compiling_after_calls_that_are_remembered_gives_one_graph(step: dict[str, Any], long_ways: Counter) -> None:
    _learn(step)
    torch._dynamo.reset()
    given, wanted = copied(step), copied(step)
    result = torch.compile(selective_state_update, fullgraph=True, backend="aot_eager")(**given)
    assert torch.allclose(result, selective_state_update(**wanted))
    long_ways.clear()
    selective_state_update(**copied(step))
    assert not long_ways


def test_function_transforms_and_gradients_take_the_long_way(step: dict[str, Any], long_ways: Counter) -> None:
    _learn(step)
    long_ways.clear()
    with pytest.raises(ValueError, match="x: requires grad"):
        selective_state_update(**step | {"x": step["x"].clone().requires_grad_()})
    with torch.no_grad():
        parameter = copied(step) | {"x": torch.nn.Parameter(step["x"])}
        for _ in range(3):
            selective_state_update(**parameter)
    with pytest.raises(ValueError, match="x: requires grad"):
        selective_state_update(**parameter)
    long_ways.clear()
    with forward_ad.dual_level():
        selective_state_update(**copied(step) | {"x": forward_ad.make_dual(step["x"], torch.ones_like(step["x"]))})
    assert len(long_ways) == 1
    stacked = torch.stack([step["x"], step["x"]])
    with pytest.raises(Exception):  # noqa: B017 - vmap cannot write an unbatched state
        torch.func.vmap(lambda x: selective_state_update(**copied(step) | {"x": x}))(stacked)
    assert len(long_ways) == 2
    for _ in range(4):
        torch.func.vmap(lambda x: (selective_state_update(**copied(step)), x)[1])(stacked)
    assert len(long_ways) == 6


def test_autograd_sees_the_operator() -> None:
    norm = repeat.repeatable(OPS["rms_norm_gated"])(_long("rms_norm_gated"))
    for requires_grad in (False, True, False, True, True, True, False):
        x = torch.ones(3, 4, requires_grad=requires_grad)
        result = norm(x, torch.ones(4))
        assert result.requires_grad is requires_grad
        assert not requires_grad or "rms_norm_gated" in type(result.grad_fn).__name__


def test_what_only_the_dispatcher_resolves_takes_the_long_way(step: dict[str, Any], long_ways: Counter) -> None:
    _learn(step)
    negated = step | {"x": torch._neg_view(step["x"].neg())}
    wanted = _long(SSU.name)(**copied(step))
    long_ways.clear()
    for _ in range(4):
        assert torch.equal(selective_state_update(**negated | {"state": step["state"].clone()}), wanted)
    assert len(long_ways) == 4
    (case,) = (case for case in cases(SSU.name) if case.name == "bare")
    bare = build(case)
    functional = torch.func.functionalize(lambda x: selective_state_update(**bare | {"x": x}))
    for tracing in ("real", "symbolic"):
        with pytest.raises(RuntimeError, match="functionalizing"):  # which works above the dispatcher only
            make_fx(functional, tracing_mode=tracing)(bare["x"])


def test_a_number_of_another_kind_takes_the_long_way(step: dict[str, Any], long_ways: Counter) -> None:
    class Slot(int):
        pass

    for _ in range(4):
        selective_state_update(**copied(step), pad_slot_id=Slot(-1))
    assert len(long_ways) == 4


def test_inference_mode_and_autocast_are_calls_of_their_own(step: dict[str, Any], long_ways: Counter) -> None:
    wanted = _long(SSU.name)(**copied(step))
    for _ in range(3):
        assert not selective_state_update(**copied(step)).is_inference()
        with torch.inference_mode():
            result = selective_state_update(**copied(step))
            assert result.is_inference() and torch.equal(result, wanted)
        with torch.autocast("cpu"):
            assert torch.equal(selective_state_update(**copied(step)), wanted)
    long_ways.clear()
    with torch.inference_mode():
        selective_state_update(**copied(step))
    assert not long_ways


# --- kernels start from addresses ---


class _Kernel:
    """Stands for a ``triton.jit`` function; ``starts`` lists what its launcher is called with."""

    arg_names = ("x", "out", "none", "SIZE")

    def __init__(self) -> None:
        self.compiled = 0
        self.starts: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def first(**arguments: Any) -> Any:
            self.compiled += 1
            return types.SimpleNamespace(
                run=lambda *given: self.starts.append(given), function="function", packed_metadata="metadata"
            )

        return first


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Kernel]:
    """The backend ``kernel`` of the state update starts this as one on the current GPU would be."""
    made = _Kernel()
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: "stream", raising=False)

    def plan(state: Tensor, x: Tensor, out: Tensor, size: int) -> launching.Launch:
        return launching.Launch(made, (3,), {"x": x, "out": out, "none": None}, {"SIZE": size, "num_warps": 1})

    def run(state: Tensor, x: Tensor, *tensors: Any, **options: Any) -> Tensor:
        out = torch.zeros_like(x)
        launching._start(plan, (state, x, out, 7), out)
        return out

    SSU.add(dataclasses.replace(SSU.backends["reference"], name="kernel", key="kernel", run=run))
    yield made
    SSU.backends.pop("kernel")


def test_a_repeated_call_starts_the_kept_kernel_on_its_own_addresses(
    step: dict[str, Any], kernel: _Kernel, long_ways: Counter
) -> None:
    _learn(step, backend="kernel")
    long_ways.clear()
    given = copied(step)
    results = [selective_state_update(**given, backend="kernel") for _ in range(3)]
    assert kernel.compiled == 1 and not long_ways
    for start, result in zip(kernel.starts[-3:], results, strict=True):
        wanted = (3, 1, 1, "stream", "function", "metadata", None, None, None)
        assert start == (*wanted, given["x"].data_ptr(), result.data_ptr(), None, 7)
        assert result.shape == given["x"].shape and result.dtype == given["x"].dtype


def test_a_backend_that_returns_something_else_is_not_started_so(
    step: dict[str, Any], kernel: _Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = SSU.backends["kernel"].run
    more = dataclasses.replace(SSU.backends["kernel"], run=lambda *tensors, **options: run(*tensors, **options) + 1)
    SSU.add(more)
    for _ in range(4):
        assert torch.equal(selective_state_update(**copied(step), backend="kernel"), torch.ones_like(step["x"]))


def test_another_alignment_another_config_or_another_device_is_another_start(
    step: dict[str, Any], kernel: _Kernel, long_ways: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = torch.zeros(step["x"].numel() + 16)
    shifted = step | {"x": room[1 : 1 + step["x"].numel()].view(step["x"].shape)}
    for arguments in (step, shifted):
        for _ in range(2):
            selective_state_update(**arguments, backend="kernel")
    assert kernel.compiled == 2
    long_ways.clear()
    for arguments in (step, shifted, step):
        selective_state_update(**arguments, backend="kernel")
        assert kernel.starts[-1][9] == arguments["x"].data_ptr()
    assert not long_ways
    with use_config(SSU.name, {}):
        selective_state_update(**step, backend="kernel")
        assert kernel.compiled == 3 and long_ways
    selective_state_update(**step, backend="kernel")
    long_ways.clear()
    selective_state_update(**step, backend="kernel")
    assert not long_ways
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1, raising=False)
    selective_state_update(**step, backend="kernel")
    assert len(long_ways) == 1


@pytest.mark.parametrize(
    ("op", "case"), [(op, case) for op in DECODE for case in cases(op)], ids=lambda value: getattr(value, "name", value)
)
def test_the_kernels_get_the_same_arguments_by_either_way(
    op: str, case: Any, kernel: _Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    backend = importlib.import_module(f"torch_mamba_ops.ops.{op}.triton")

    def launch(plan: Callable[..., launching.Launch], *given: Any, result: Tensor | None = None) -> None:
        def stubbed(*given: Any) -> launching.Launch:
            made = plan(*given)
            kernel.arg_names = made.kernel.arg_names
            return dataclasses.replace(made, kernel=kernel)

        launching._start(plans.setdefault(plan, stubbed), given, result)

    plans: dict[Any, Any] = {}  # one stub each: kept kernels are found by their plan
    monkeypatch.setattr(backend, "launch", launch)
    OPS[op].add(dataclasses.replace(OPS[op].backends["triton"], name="stubbed", key="stubbed", why_not=None))
    arguments = build(case)
    results = [OPS[op].function(**arguments, backend="stubbed") for _ in range(4)]
    results += [_long(op)(**arguments, backend="stubbed") for _ in range(2)]
    OPS[op].backends.pop("stubbed")
    places = {result.data_ptr(): "result" for result in results}
    starts = [[places.get(x, x) if isinstance(x, int) else x for x in start] for start in kernel.starts]
    assert len(starts) >= 4 and all(start == starts[-1] for start in starts)


@pytest.mark.gpu
@pytest.mark.parametrize("op", DECODE)
def test_on_a_gpu_every_case_is_repeated_with_the_same_result(op: str, long_ways: Counter) -> None:
    importlib.import_module("triton")
    for case in cases(op):
        arguments = build(case, "cuda")
        wanted = copied(arguments)
        result = _long(op)(**wanted, backend="triton")
        long_ways.clear()
        for _ in range(5):
            given = copied(arguments)
            again = OPS[op].function(**given, backend="triton")
            assert torch.equal(again, result) and again.stride() == result.stride(), case.name
            for name, value in given.items():
                assert not isinstance(value, Tensor) or torch.equal(value, wanted[name]), (case.name, name)
        assert len(long_ways) <= 2, case.name
