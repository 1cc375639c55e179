"""The hash that stands behind the name of a backend in compiled graphs: other code, other hash.

Inductor's disk caches are keyed by the graph, not by the code that a rule traces in its place, so a graph must name
that code or a later process is served the old result (measured on torch 2.11 to 2.15).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

# A change of these comes with another version of torch or Python, which the compile caches already key on.
_COVERED_BY_CACHES = frozenset({*sys.stdlib_module_names, "torch", "triton", "numpy", "torch_mamba_ops"})
_PROCESS_NONCE = os.urandom(8).hex()


@lru_cache(maxsize=1)
def of_package() -> str:
    """Hash of every source file of this package: what a built-in backend carries."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def of_function(function: Callable[..., Any]) -> str:
    """Hash of what a user's function does: its code, defaults, closure, and the globals it reads, followed
    through the functions it calls. What cannot be read makes the hash new in every process: never stale, never warm.
    """
    digest = hashlib.sha256()
    for part in _parts(function, set()):
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:12]


def _parts(value: Any, seen: set[int]) -> Iterator[str]:
    if isinstance(value, (types.FunctionType, types.ModuleType, type)):
        if id(value) in seen:
            return
        seen.add(id(value))
    if isinstance(value, (int, float, complex, str, bytes, type(None), type(Ellipsis), types.BuiltinFunctionType)):
        yield repr(value)
    elif isinstance(value, types.ModuleType):
        yield from _module(value.__name__)
    elif isinstance(value, types.FunctionType):
        yield from _function(value, seen)
    elif isinstance(value, types.CodeType):
        yield from _code(value, seen)
    elif isinstance(value, (tuple, list)):
        yield type(value).__name__
        for item in value:
            yield from _parts(item, seen)
    elif isinstance(value, frozenset):
        yield from sorted(map(repr, value))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield repr(key)
            yield from _parts(item, seen)
    elif hasattr(value, "cache_key") and hasattr(value, "fn"):  # a triton.jit function: its key covers what it calls
        yield str(value.cache_key)
    elif isinstance(value, type) or _root(type(value).__module__) in _COVERED_BY_CACHES - {"torch"}:
        yield from _module(value.__module__ if isinstance(value, type) else type(value).__module__)
        yield repr(value)
    elif type(value).__name__ in {"OpOverload", "OpOverloadPacket", "dtype", "device", "layout", "memory_format"}:
        yield str(value)
    else:
        yield _PROCESS_NONCE


def _function(function: types.FunctionType, seen: set[int]) -> Iterator[str]:
    if _root(function.__module__ or "") in _COVERED_BY_CACHES:
        yield f"{function.__module__}.{function.__qualname__}"
        return
    yield from _code(function.__code__, seen)
    yield from _parts(function.__defaults__, seen)
    yield from _parts(function.__kwdefaults__, seen)
    for cell in function.__closure__ or ():
        try:
            held = cell.cell_contents
        except ValueError:  # empty: a name of the enclosing function that gets its value later
            yield _PROCESS_NONCE
        else:
            yield from _parts(held, seen)
    for name in sorted(_names(function.__code__)):
        if name in function.__globals__:
            yield name
            yield from _parts(function.__globals__[name], seen)


def _code(code: types.CodeType, seen: set[int]) -> Iterator[str]:
    yield code.co_code.hex()
    yield repr(code.co_names + code.co_varnames)
    for constant in code.co_consts:
        yield from _parts(constant, seen)


def _names(code: types.CodeType) -> set[str]:
    nested = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(_names, nested))


def _module(name: str) -> Iterator[str]:
    yield name
    if _root(name) in _COVERED_BY_CACHES:
        return
    spec = getattr(sys.modules.get(name), "__spec__", None) or importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None and Path(spec.origin).is_file():
        yield hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()
    else:
        yield _PROCESS_NONCE


def _root(module_name: str) -> str:
    return module_name.partition(".")[0]
