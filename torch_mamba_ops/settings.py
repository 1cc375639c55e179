"""What holds for a process, a thread or a block: backends, stochastic rounding, layout of convolution states, tuning.

A setting is looked for in `use` over `configure` over the environment over the default, as backends are. Backends are
kept by `dispatch.selection` alone: setting one here is `set_backend`, and whatever `set_backend` says shows here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor

from torch_mamba_ops.dispatch import OPS, BackendError, backends, explain, selection

PREFIX = "TORCH_MAMBA_OPS_"
ROUNDED = (torch.float16, torch.bfloat16)  # the dtypes of states that can be rounded stochastically


@dataclass(frozen=True)
class Settings:
    """All settings at one moment, checked. Strings are taken in any case; values of settings compare and hash.

    Attributes:
        backends: (operation, backend) for every choice in force; the operation ``"*"`` is every one that has it.
        stochastic_rounding: whether states of the SSM are rounded stochastically, see `rand_seed`.
        philox_rounds: of the generator that stochastic rounding draws from; at least 1.
        conv_state_layout: ``"SD"``, memory ``[slots, columns, dim]``, or ``"DS"``, memory ``[slots, dim, columns]``.
        tuning: ``"table"``: configs come from the user's tables, the shipped ones, else a rule of thumb.
            ``"search"``: `warmup` also times the configs of shapes that no table has, and keeps the best.

    Raises:
        ValueError: a value is not one of the valid ones, which the message lists.
        TypeError: a value is of another type.
    """

    backends: tuple[tuple[str, str], ...] = ()
    stochastic_rounding: bool = False
    philox_rounds: int = 10
    conv_state_layout: Literal["SD", "DS"] = "SD"
    tuning: Literal["table", "search"] = "table"

    def __post_init__(self) -> None:
        for name in _PARSERS:
            object.__setattr__(self, name, _parsed(name, getattr(self, name)))
        object.__setattr__(self, "backends", tuple(_chosen(op, name) for op, name in self.backends))


class Changes(TypedDict, total=False):
    """What `configure` and `use` take."""

    backends: Mapping[str, str | None]
    stochastic_rounding: bool | str | None
    philox_rounds: int | str | None
    conv_state_layout: str | None
    tuning: str | None
    ssm_dtype: torch.dtype | None


def current() -> Settings:
    """The settings in force here. Under torch.compile the graph is guarded by them."""
    if _malformed:
        raise ValueError(_malformed[0])
    chosen = tuple((op, name) for op, (name, _) in selection.current().items())
    return Settings(backends=chosen, **{**_everywhere, **_context.values})


def configure(**changes: Unpack[Changes]) -> None:
    """Changes settings for this process, all threads. None takes an earlier change back; what is not named stays.

    Args:
        **changes: the fields of `Settings`, ``backends`` as {operation: backend or None}; and ``ssm_dtype``, the dtype
            of the states that these settings are for, which is checked and not kept.

    Raises:
        ValueError: an unknown setting or value, or values that cannot work together. Nothing is changed then.
        TypeError: a value of another type.
        BackendError: an operation has no backend of that name, or it cannot round stochastically.
    """
    _check_names(changes)
    given: dict[str, Any] = dict(changes)
    before, before_backends = dict(_process), dict(selection._process)
    try:
        for op, name in given.get("backends", {}).items():
            selection.set_backend(op, _spelled(op, name))
        for name, value in given.items():
            if name in _PARSERS and value is None:
                _process.pop(name, None)
            elif name in _PARSERS:
                _process[name] = _parsed(name, value)
        _settle()
        _check_together(given.get("ssm_dtype"))
    except Exception:
        for kept, earlier in ((_process, before), (selection._process, before_backends)):
            kept.clear()
            kept.update(earlier)
        _settle()
        raise


@contextmanager
def use(**changes: Unpack[Changes]) -> Iterator[Settings]:
    """Changes settings inside a ``with`` block, for this thread. Takes and raises what `configure` does, but None."""
    _check_names(changes)
    new = {name: _parsed(name, value) for name, value in changes.items() if name in _PARSERS}
    chosen: dict[str, Any] = {op: _spelled(op, name) for op, name in changes.get("backends", {}).items()}
    with ExitStack() as stack:
        stack.enter_context(selection.use_backend(chosen.pop("*", None), **chosen))
        before = _context.values
        _context.values = {**before, **new}
        stack.callback(setattr, _context, "values", before)
        _check_together(changes.get("ssm_dtype"))
        yield current()


def check_state(dtype: torch.dtype) -> None:
    """Refuses an SSM state of this dtype under the settings in force.

    Raises:
        ValueError: stochastic rounding is on and states of this dtype are not rounded.
    """
    if current().stochastic_rounding and dtype not in ROUNDED:
        raise ValueError(
            f"stochastic_rounding: got True with an SSM state of {dtype}, which is not rounded; "
            f"expected {' or '.join(map(str, ROUNDED))}, or stochastic_rounding=False"
        )


def rand_seed(device: torch.device | str) -> Tensor | None:
    """What to pass as ``rand_seed`` to one call of `selective_state_update`: None without stochastic rounding, else a
    new int64 seed ``[1]`` from torch's own generator of that device, so that every call, and every replay of a CUDA
    graph, rounds afresh, and ``torch.manual_seed`` makes it repeatable. Nothing waits for the device."""
    if not current().stochastic_rounding:
        return None
    return torch.randint(torch.iinfo(torch.int64).max, (1,), dtype=torch.int64, device=device)


class _Context(threading.local):
    def __init__(self) -> None:
        self.values: dict[str, Any] = {}


# Plain dictionaries and a thread-local: Dynamo guards reads of those. What holds outside of blocks has all keys at all
# times, so that setting what holds anyway is not another graph.
_context = _Context()
_everywhere: dict[str, Any] = {}
_process: dict[str, Any] = {}
_environment: dict[str, Any] = {}
_malformed: list[str] = []


def read_environment() -> None:
    """Reads ``TORCH_MAMBA_OPS_<SETTING>``. What is wrong with it is raised where a setting is first read."""
    _environment.clear()
    _malformed.clear()
    for name in _PARSERS:
        given = os.environ.get(PREFIX + name.upper(), "").strip()
        if given:
            try:
                _environment[name] = _parsed(name, given)
            except ValueError as error:
                _malformed.append(f"{PREFIX}{name.upper()}: {error}")
    _settle()


def _settle() -> None:
    defaults = {field.name: field.default for field in fields(Settings) if field.name in _PARSERS}
    _everywhere.update({**defaults, **_environment, **_process})


def _chosen(op: str, name: str) -> tuple[str, str]:
    spelled: Any = _spelled(op, name)
    selection._check(op, spelled)
    return op, spelled


def _spelled(op: str, name: str | None) -> str | None:
    """A backend's name as it was registered, whatever its case; an unknown one as it is, for the error."""
    known = {"auto", *(backend for each in (OPS if op == "*" else (op,)) for backend in backends(each))}
    by_lower = {backend.lower(): backend for backend in known}
    return by_lower.get(name.lower(), name) if isinstance(name, str) else name


def _one_of(*valid: str) -> Callable[[Any], str | None]:
    by_lower = {value.lower(): value for value in valid}
    return lambda given: by_lower.get(given.lower()) if isinstance(given, str) else None


def _bool(given: Any) -> bool | None:
    if isinstance(given, bool):
        return given
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    return words.get(given.lower()) if isinstance(given, str) else None


def _positive(given: Any) -> int | None:
    if isinstance(given, str) and given.strip().isdecimal():
        given = int(given)
    return given if isinstance(given, int) and not isinstance(given, bool) and given > 0 else None


_PARSERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "stochastic_rounding": (_bool, "True or False"),
    "philox_rounds": (_positive, "an integer of at least 1"),
    "conv_state_layout": (_one_of("SD", "DS"), "'SD' or 'DS'"),
    "tuning": (_one_of("table", "search"), "'table' or 'search'"),
}


def _parsed(name: str, given: Any) -> Any:
    parse, valid = _PARSERS[name]
    value = parse(given)
    if value is None:
        raise ValueError(f"{name}: got {given!r}, expected {valid}")
    return value


def _check_names(changes: Mapping[str, Any]) -> None:
    valid = [field.name for field in fields(Settings)]
    for name in changes:
        if name not in (*valid, "ssm_dtype"):
            raise ValueError(f"{name}: no such setting, expected one of {', '.join(valid)}, or ssm_dtype")
    if not isinstance(changes.get("backends", {}), Mapping):
        raise TypeError(f"backends: got {changes['backends']!r}, expected a mapping from operations to backends")


def _check_together(ssm_dtype: torch.dtype | None) -> None:
    """With stochastic rounding, states of ``ssm_dtype``, or of some dtype, must be ones that can be rounded, and by the
    backend that is named for the state update, if one is."""
    if ssm_dtype is not None:
        check_state(ssm_dtype)
    op = "selective_state_update"
    name = selection.wanted(op, backends(op))
    if not current().stochastic_rounding or name == "auto":
        return
    against = [_reasons_against_rounding(op, name, dtype) for dtype in ([ssm_dtype] if ssm_dtype else ROUNDED)]
    if all(against):
        reasons = "; ".join(dict.fromkeys(reason for found in against for reason in found))
        raise BackendError(f"stochastic_rounding: got True with the backend {name!r} of {op}, which cannot: {reasons}")


def _reasons_against_rounding(op: str, name: str, dtype: torch.dtype) -> list[str]:
    """Why a backend cannot run a call with a seed, less why it cannot run the same call without."""
    with torch._subclasses.FakeTensorMode():

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda" if torch.cuda.is_available() else "cpu")

        step = [empty(1, 8, 64, 128, dtype=dtype), empty(1, 8, 64), empty(1, 8), empty(8), empty(1, 1, 128)]
        seed, rounds = empty(1, dtype=torch.int64), current().philox_rounds
        with_seed, without = (
            next(c.reasons for c in explain(op, *step, step[-1], **options).candidates if c.name == name)
            for options in ({"rand_seed": seed, "philox_rounds": rounds}, {})
        )
    return [reason for reason in with_seed if reason not in without]


read_environment()
