"""Checks a backend against the equations, on the operation's own cases. A third-party backend can run it on itself."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from torch_mamba_ops.dispatch import Op, explain, operation
from torch_mamba_ops.dispatch.op import ASK, Asked
from torch_mamba_ops.ops.case import Case

# How much worse than the same recurrence run in float32, token by token, a backend may be.
ERROR_BUDGET = 8.0

Arguments = dict[str, Any]


def cases(op: str, tag: str = "small") -> list[Case]:
    """The operation's cases with a tag."""
    module = importlib.import_module(f"torch_mamba_ops.ops.{operation(op).name}.cases")
    return [case for case in module.CASES if tag in case.tags]


def oracle(op: str) -> Callable[..., Any]:
    """The operation's sequential recurrence; it computes in the dtype of what it is given."""
    module = importlib.import_module(f"torch_mamba_ops.testing.oracles.{operation(op).name}")
    return getattr(module, op)


def build(case: Case, device: str | torch.device = "cpu", seed: int = 0) -> Arguments:
    """The case's arguments, the same for the same seed."""
    device = torch.device(device)
    return case.build(device, torch.Generator(device).manual_seed(seed))


def copied(arguments: Arguments, dtype: torch.dtype | None = None) -> Arguments:
    """Arguments that can be mutated: with their strides, or in another dtype. One tensor given twice stays one."""
    made: dict[int, Tensor] = {}

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in made:
            made[id(value)] = _copy_tensor(value, dtype if dtype is not None and value.is_floating_point() else None)
        return made[id(value)]

    return tree_map(copy, arguments)


def _copy_tensor(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if 0 in tensor.stride() or tensor.numel() == 0:
        return tensor.to(dtype or tensor.dtype)  # expanded arguments are never mutated; expansion must survive
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    # Guard values around and between the elements, as a pool's page would have; see `assert_guards_hold`.
    storage = torch.full((extent,), GUARD, dtype=dtype or tensor.dtype, device=tensor.device)
    return storage.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


GUARD = 113.0


def guard_intact(tensor: Tensor) -> bool:
    """Whether what lies between the elements of a copied tensor still holds the guard value."""
    extent = tensor.untyped_storage().nbytes() // tensor.element_size()
    storage = tensor.as_strided((extent,), (1,), 0)
    inside = torch.zeros(extent, dtype=torch.bool, device=tensor.device)
    inside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    return bool((storage[~inside] == GUARD).all())


@dataclass(frozen=True)
class Truth:
    """What a call must return and leave behind, in float64, and how far lower precision strays from it."""

    outputs: tuple[Tensor, ...]
    output_errors: tuple[float, ...]
    mutated: dict[str, Tensor]
    mutated_errors: dict[str, float]
    untouched: dict[str, Tensor]


def operator_arguments(op: str, arguments: Arguments) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operator's tensors and options that the public function makes of its arguments."""
    try:
        operation(op).function(**arguments, backend=ASK)
    except Asked as asked:
        return asked.tensors, asked.options
    raise AssertionError(f"{op}: the public function did not reach its operator")


def truth(op: str, arguments: Arguments, backend: str = "reference") -> Truth:
    """Runs the oracle in float64, and in the precision that a backend may compute with.

    That is float32 for all. But a backend with kernels has matrix units multiply 16-bit inputs in their own dtype, and
    rounds what it makes of them to that once more: where the oracle's module names such ``FACTORS``, the oracle also
    runs in float64 with each of them off by up to half a unit of its last place.
    """
    mutated = _mutated_names(operation(op), arguments)
    exact_arguments = copied(arguments, torch.float64)
    exact = _as_tuple(oracle(op)(**exact_arguments))
    rough_arguments = [copied(arguments, torch.float32)]
    if backend != "reference" and (factors := _factors(op, arguments)):
        rough_arguments.append(copied(arguments | factors, torch.float64))
    roughs = [_as_tuple(oracle(op)(**given)) for given in rough_arguments]
    return Truth(
        exact,
        tuple(max(_worst(e, r) for r in rough) for e, *rough in zip(exact, *roughs, strict=True)),
        {name: exact_arguments[name] for name in mutated},
        {name: max(_worst(exact_arguments[name], given[name]) for given in rough_arguments) for name in mutated},
        {name: exact_arguments[name] == arguments[name].double() for name in mutated},
    )


def _factors(op: str, arguments: Arguments) -> Arguments:
    """The 16-bit inputs of matrix products, rounded once more."""
    names = getattr(importlib.import_module(f"torch_mamba_ops.testing.oracles.{op}"), "FACTORS", ())
    made = {}
    for name in names:
        given = arguments[name]
        if given.dtype.itemsize == 2:
            noise = torch.rand(given.shape, generator=torch.Generator().manual_seed(0)).to(given.device)
            made[name] = given.double() * (1 + torch.finfo(given.dtype).eps * (noise - 0.5))
    return made


def poison_unused_rows(arguments: Arguments, expected: Truth, op: str) -> None:
    """Fills rows of mutated pools that the call neither changes nor reads with NaN, in place."""
    used = {int(i) for name, t in arguments.items() if _is_index(name, t) for i in t.flatten().tolist()}
    for name, untouched in expected.untouched.items():
        pool = arguments[name]
        for row in range(pool.shape[0]):
            if row not in used and bool(untouched[row].all()):
                pool[row] = torch.nan
                expected.mutated[name][row] = torch.nan


def _is_index(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and "indices" in name


def assert_right(op: str, arguments: Arguments, outputs: Any, expected: Truth) -> None:
    """Compares a call's outputs and its mutated arguments with the truth, within the error budget."""
    actual = _as_tuple(outputs)
    assert len(actual) == len(expected.outputs), f"{op}: {len(actual)} outputs, expected {len(expected.outputs)}"
    for position, (given, want, error) in enumerate(zip(actual, expected.outputs, expected.output_errors, strict=True)):
        _assert_close(f"{op} output {position}", given, want, error)
    for name, want in expected.mutated.items():
        _assert_close(f"{op} {name}", arguments[name], want, expected.mutated_errors[name])
        unchanged = expected.untouched[name]
        kept = arguments[name].double()[unchanged]
        assert torch.equal(kept.nan_to_num(GUARD), want[unchanged].nan_to_num(GUARD)), (
            f"{op} {name}: wrote where nothing changes"
        )
        assert guard_intact(arguments[name]), f"{op} {name}: memory between its elements was written"


def check_backend(
    op: str, backend: str, device: str | torch.device = "cpu", names: Sequence[str] | None = None
) -> list[str]:
    """Runs the operation's small cases on a backend and compares with the truth.

    Args:
        op: the operation.
        backend: the backend's name.
        device: where the tensors are.
        names: cases to run; None: all small ones.

    Returns:
        The names of the cases that the backend cannot run, each with its reasons.

    Raises:
        AssertionError: a result is wrong.
    """
    target, skipped = operation(op), []
    for case in cases(op):
        if names is not None and case.name not in names:
            continue
        arguments = build(case, device)
        if reasons := why_not(target, backend, arguments):
            skipped.append(f"{case.name}: {'; '.join(reasons)}")
            continue
        given = copied(arguments)
        assert_right(op, given, target.function(**given, backend=backend), truth(op, arguments, backend))
    return skipped


def why_not(op: Op, backend: str, arguments: Arguments) -> tuple[str, ...]:
    """The backend's own reasons why it cannot run these arguments."""
    found = {candidate.name: candidate.reasons for candidate in explain(op.name, **arguments).candidates}
    return found[backend]


def _mutated_names(op: Op, arguments: Arguments) -> list[str]:
    return [name for i in op.mutated if arguments.get(name := op.tensors[i]) is not None]


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    if outputs is None:
        return ()
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def _worst(exact: Tensor, rough: Tensor) -> float:
    return float((exact - rough.double()).abs().max()) if exact.numel() else 0.0


def _assert_close(what: str, actual: Tensor, exact: Tensor, error: float) -> None:
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if not exact.numel():
        return
    scale = float(exact.nan_to_num(0.0).abs().max())
    rounding = torch.finfo(actual.dtype).eps * exact.abs()
    allowed = rounding + ERROR_BUDGET * max(error, torch.finfo(torch.float32).eps * scale)
    difference = (actual.double() - exact).abs()
    wrong = ~(difference <= allowed) & ~exact.isnan()  # NaN is wrong where it was not put by `poison_unused_rows`
    worst = float(difference.nan_to_num(torch.inf).max())
    assert not bool(wrong.any()), (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are off; worst {worst:.3e}, "
        f"allowed {float(allowed.nan_to_num(0.0).max()):.3e}"
    )
