"""The steps a config is looked for on. Tables are JSON files by device, written by ``benchmarks/tune.py``:

    {"made_by": ..., "selective_state_update": {"bfloat16 P64 N128": [[48, {"BLOCK_P": 8, ...}], ...], ...}}

Each entry holds from that much work on: sequences x heads, or x channels.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

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


def generation() -> int:
    """A number that is another one after every change of what this module says."""
    return _changes[0]


@functools.cache
def version() -> str:
    """A hash of all tables: compiled graphs hold configs, and a graph with other ones is another graph."""
    digest = hashlib.sha256()
    for folder in _folders():
        for path in sorted(folder.glob("*.json")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def table_name(device: torch.device) -> str:
    """The file's name for a device: ``nvidia_h200``."""
    name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else "none"
    return "_".join(name.lower().replace("-", " ").split())


def _entries(op: str, key: str, device: torch.device) -> list[tuple[int, Config]]:
    if device.type != "cuda":
        return []
    entries: list[tuple[int, Config]] = _table(table_name(device)).get(op, {}).get(key, [])
    return entries


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
