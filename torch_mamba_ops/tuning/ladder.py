"""The steps a config is looked for on. Tables are JSON files by device, written by ``benchmarks/tune.py``:

    {"made_by": ..., "selective_state_update": {"bfloat16 P64 N128": [[48, {"BLOCK_P": 8, ...}], ...], ...}}

Each entry holds from that much work on: sequences x heads, or x channels. What warm-up found itself stands in `cache`,
below them. What they say of backends is read by `preference`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from torch_mamba_ops.dispatch import OPS
from torch_mamba_ops.dispatch.repeat import forget
from torch_mamba_ops.tuning import cache, preference
from torch_mamba_ops.tuning.files import folders, table_name

Config = dict[str, Any]
_given: dict[str, Config] = {}


def configs_for(op: str, key: str, work: Any, device: torch.device) -> Config | None:
    """The config for a call, or None where the kernel's own rule of thumb is all there is.

    Args:
        op: the operation.
        key: what the kernel's code depends on, see `key_of`.
        work: how much there is to do, sequences x heads or channels. The last entry serves a symbolic size, which must
            not be compared.
        device: where the kernel runs.
    """
    if op in _given:
        return _given[op]
    entries = _entries(op, key, device)
    if _watch.seen is not None and isinstance(work, int):
        _watch.seen.append(Lookup(op, key, work, tuple(least for least, _ in entries)))
    if not entries:
        return None
    if not isinstance(work, int):
        return entries[-1][1]
    fitting = [config for least, config in entries if least <= work]
    return fitting[-1] if fitting else entries[0][1]


@contextmanager
def use_config(op: str, config: Config) -> Iterator[None]:
    """Gives an operation's kernel its config inside a ``with`` block: for tuning and for tests of single configs."""
    before = _given.get(op)
    _given[op] = config
    forget()
    try:
        yield
    finally:
        if before is None:
            del _given[op]
        else:
            _given[op] = before
        forget()


@dataclass(frozen=True)
class Lookup:
    """One question to `configs_for`, and the amounts of work from which a config holds; none where none is known."""

    op: str
    key: str
    work: int
    levels: tuple[int, ...]


class _Watch(threading.local):
    seen: list[Lookup] | None = None


_watch = _Watch()


@contextmanager
def watch() -> Iterator[list[Lookup]]:
    """Lists what this thread looks up inside a ``with`` block: warm-up reaches every config and tunes the rest."""
    before, _watch.seen = _watch.seen, []
    try:
        yield _watch.seen
    finally:
        _watch.seen = before


def keep(op: str, key: str, device: torch.device, entries: cache.Entries) -> None:
    """Keeps what tuning found for a key, for this process and the next ones."""
    cache.keep(table_name(device), op, key, entries)
    reread()


def reread() -> None:
    """To call after a change of what is on disk, or of where that is. Backends are named for what is there now, and
    calls that are kept are found out anew."""
    before = version()
    version.cache_clear()
    _table.cache_clear()
    preference.read()
    now = version()
    for op in OPS.values():
        for backend in list(op.backends.values()):
            if now != before and backend.key.endswith(f"-{before}"):
                op.add(replace(backend, key=backend.key.removesuffix(before) + now))
    forget()


@functools.cache
def version() -> str:
    """A hash of all tables, part of the names of backends that have configs: a graph with others is another graph."""
    digest = hashlib.sha256(cache.digest().encode())
    for folder in folders():
        for path in sorted(folder.glob("*.json")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def _entries(op: str, key: str, device: torch.device) -> cache.Entries:
    name = table_name(device)
    entries: cache.Entries = _table(name).get(op, {}).get(key, [])
    return entries or cache.load(name, op, key)


@functools.cache
def _table(name: str) -> Mapping[str, Any]:
    """The shipped table, under the user's (a folder named by ``TORCH_MAMBA_OPS_CONFIGS``)."""
    merged: dict[str, dict[str, Any]] = {}
    for folder in folders():
        path = folder / f"{name}.json"
        if path.exists():
            for op, keys in json.loads(path.read_text()).items():
                if isinstance(keys, dict):
                    merged.setdefault(op, {}).update(keys)
    return merged
