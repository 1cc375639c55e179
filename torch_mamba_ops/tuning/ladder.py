"""The steps a config is looked for on. Tables are JSON files by device, written by ``benchmarks/tune.py``:

    {"made_by": ..., "selective_state_update": {"bfloat16 P64 N128": [[48, {"BLOCK_P": 8, ...}], ...], ...}}

Each entry holds from that much work on: sequences x heads, or x channels. What warm-up found itself stands in `cache`,
below them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torch_mamba_ops.tuning import cache

Config = dict[str, Any]
VARIABLE = "TORCH_MAMBA_OPS_CONFIGS"
_SHIPPED = Path(__file__).parent / "tables"
_given: dict[str, Config] = {}
_changes = [0]


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


def key_of(dtype: torch.dtype, **sizes: int) -> str:
    """For example ``bfloat16 P64 N128``."""
    return " ".join([str(dtype).removeprefix("torch."), *(f"{name}{size}" for name, size in sizes.items())])


@contextmanager
def use_config(op: str, config: Config) -> Iterator[None]:
    """Gives an operation's kernel its config inside a ``with`` block: for tuning and for tests of single configs."""
    before = _given.get(op)
    _given[op] = config
    _changes[0] += 1
    try:
        yield
    finally:
        _changes[0] += 1
        if before is None:
            del _given[op]
        else:
            _given[op] = before


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
    """To call after a change of what is on disk, or of where that is. Plans of calls that are kept are made anew."""
    version.cache_clear()
    _changes[0] += 1


def generation() -> int:
    """A number that is another one after every change of what this module says."""
    return _changes[0]


@functools.cache
def version() -> str:
    """A hash of all tables: compiled graphs hold configs, and a graph with other ones is another graph."""
    digest = hashlib.sha256(cache.digest().encode())
    for folder in _folders():
        for path in sorted(folder.glob("*.json")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def table_name(device: torch.device) -> str:
    """The file's name for a device: ``nvidia_h200``."""
    if device.type != "cuda":
        return device.type
    name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else "none"
    return "_".join(name.lower().replace("-", " ").split())


def _entries(op: str, key: str, device: torch.device) -> cache.Entries:
    name = table_name(device)
    entries: cache.Entries = _table(name).get(op, {}).get(key, [])
    return entries or cache.load(name, op, key)


@functools.cache
def _table(name: str) -> Mapping[str, Any]:
    """The shipped table, under the user's (a folder named by ``TORCH_MAMBA_OPS_CONFIGS``)."""
    merged: dict[str, dict[str, Any]] = {}
    for folder in _folders():
        path = folder / f"{name}.json"
        if path.exists():
            for op, keys in json.loads(path.read_text()).items():
                if isinstance(keys, dict):
                    merged.setdefault(op, {}).update(keys)
    return merged


def _folders() -> list[Path]:
    return [_SHIPPED, *([Path(os.environ[VARIABLE])] if os.environ.get(VARIABLE) else [])]
