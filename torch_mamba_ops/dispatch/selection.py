"""Which backend is wanted: call argument over context over ``set_backend`` over environment over ``auto``.

Plain dictionaries and a thread-local, because Dynamo guards reads of those; a ContextVar breaks ``fullgraph``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager

from .errors import BackendError, unknown

VARIABLE = "TORCH_MAMBA_OPS_BACKEND"
EVERY = "*"


class _Context(threading.local):
    def __init__(self) -> None:
        self.choices: dict[str, str] = {}


_context = _Context()
_process: dict[str, str] = {}
_environment: dict[str, str] = {}
_malformed: list[str] = []


def wanted(op: str, registered: Container[str]) -> str:
    """The name chosen for this operation, or ``"auto"``. A choice for every operation (``*``) holds for the
    operations that have a backend of that name."""
    return choice(op, registered)[0]


def choice(op: str, registered: Container[str]) -> tuple[str, str]:
    """What is `wanted`, and by whom."""
    if _malformed:
        raise ValueError(_malformed[0])
    for choices, source in ((_context.choices, "use_backend"), (_process, "set_backend"), (_environment, VARIABLE)):
        if op in choices:
            return choices[op], source
        if EVERY in choices and (choices[EVERY] == "auto" or choices[EVERY] in registered):
            return choices[EVERY], source
    return "auto", "nobody"


def set_backend(op: str, name: str | None) -> None:
    """Chooses the backend of an operation for this process, all threads.

    Args:
        op: the operation, or ``"*"`` for every operation that has a backend of that name.
        name: the backend, ``"auto"``, or None to take an earlier choice back.

    Raises:
        ValueError: no such operation.
        BackendError: the operation has no backend of that name.
    """
    if name is None:
        _check(op, "auto")
        _process.pop(op, None)
    else:
        _check(op, name)
        _process[op] = name


@contextmanager
def use_backend(every: str | None = None, /, **choices: str) -> Iterator[None]:
    """Chooses backends inside a ``with`` block, for this thread: ``use_backend(selective_state_update="triton")``.

    Args:
        every: a backend for every operation that has one of that name.
        **choices: operation = backend (or ``"auto"``).

    Raises:
        ValueError: no such operation.
        BackendError: the operation has no backend of that name.
    """
    new = dict(choices) if every is None else {EVERY: every, **choices}
    for op, name in new.items():
        _check(op, name)
    before = _context.choices
    _context.choices = {**before, **new}
    try:
        yield
    finally:
        _context.choices = before


def current() -> Mapping[str, tuple[str, str]]:
    """Every choice in force: operation -> (backend, where it was made)."""
    found: dict[str, tuple[str, str]] = {}
    for source, choices in ((VARIABLE, _environment), ("set_backend", _process), ("use_backend", _context.choices)):
        found.update({op: (name, source) for op, name in choices.items()})
    return found


def read_environment() -> None:
    """Reads ``TORCH_MAMBA_OPS_BACKEND="operation=backend,*=backend"``. What is wrong with it is raised by the first
    choice, not by the import, so that ``python -m torch_mamba_ops`` can still tell."""
    _environment.clear()
    _malformed.clear()
    for entry in filter(None, map(str.strip, os.environ.get(VARIABLE, "").split(","))):
        op, equals, name = (part.strip() for part in entry.partition("="))
        if not (op and equals and name):
            _malformed.append(f"{VARIABLE}: got {entry!r}, expected operation=backend[,operation=backend]")
            return
        try:
            _check(op, name)
        except (ValueError, BackendError) as error:
            _malformed.append(f"{VARIABLE}: {error}")
            return
        _environment[op] = name


def _check(op: str, name: str) -> None:
    from .op import OPS, operation

    if not isinstance(name, str):
        raise TypeError(f"name: got {type(name).__name__}, expected the name of a backend")
    targets = OPS.values() if op == EVERY else (operation(op),)
    known = {backend for target in targets for backend in target.backends}
    if name != "auto" and name not in known:
        raise BackendError(f"{op}: {unknown('backend', name, known)}")
