"""The errors a choice of backend can end in, and the words they share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch


class BackendError(RuntimeError):
    """The backend asked for by name is unknown, cannot run these arguments, or broke the operation's contract."""


class NoBackendError(BackendError):
    """No backend can run these arguments; the message lists every backend with every reason."""


def unknown(kind: str, given: str, valid: Iterable[str]) -> str:
    """Says that ``given`` is no ``kind``, naming the nearest valid one and all of them."""
    names = sorted(valid)
    # Dynamo cannot trace the search.
    nearest = [] if torch.compiler.is_compiling() else difflib.get_close_matches(str(given), names, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown {kind} {given!r}{hint} (known: {', '.join(map(repr, names)) or 'none'})"


def describe_call(op_name: str, arguments: Mapping[str, Any]) -> str:
    """One line with the metadata of the tensors and the options that differ from None."""
    shown = ", ".join(f"{name}: {_describe(value)}" for name, value in arguments.items() if value is not None)
    return f"{op_name}({shown})"


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(str(size) for size in value.shape)
        return f"{value.device.type} {str(value.dtype).removeprefix('torch.')}[{sizes}]"
    return repr(value)
