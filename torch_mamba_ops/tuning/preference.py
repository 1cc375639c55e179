"""Which backend was measured to be the fastest: a part of the tables, written by ``benchmarks/tune.py --backends``:

    {"backends": {"made_by": ..., "selective_state_update": {"bfloat16 P64 N128": [[48, "triton"], ...], ...}}, ...}

Each entry holds from that much work on, as those of configs do; below the first nothing is said.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from torch_mamba_ops.dispatch import OPS
from torch_mamba_ops.dispatch.errors import unknown
from torch_mamba_ops.dispatch.op import Op, Preference
from torch_mamba_ops.tuning.files import SHIPPED, folders, key_of, table_name

Levels = tuple[tuple[int, str], ...]
SECTION = "backends"
# Plain dictionaries, filled before anything is traced: Dynamo guards what it reads of them.
_tables: dict[str, dict[str, dict[str, tuple[Levels, str]]]] = {}
_malformed: dict[str, str] = {}


def preferred(op: str, work: Any, device: torch.device, dtype: torch.dtype, **sizes: int) -> Preference | None:
    """What the tables say of a call; None if nothing.

    Args:
        op: the operation.
        work: how much there is to do. The last entry that a symbolic size may reach serves it, and no graph is guarded
            by what it is.
        device: where the call runs.
        dtype: with ``sizes`` the key, see `key_of`. Where a table says something of the operation, a graph is guarded
            by them.
        **sizes: by name.

    Raises:
        ValueError: a table for this device is malformed.
    """
    name = table_name(device)
    if name in _malformed:
        raise ValueError(_malformed[name])
    keys = _tables.get(name, {}).get(op)
    if keys is None:
        return None
    key = key_of(dtype, **sizes)
    levels, table = keys.get(key, ((), ""))
    for least, backend in reversed(levels):
        if not _below(work, least):
            return Preference(backend, key, work, levels, table)
    return None


def read() -> None:
    """Reads all tables. What is wrong with one is raised by the first choice for its device, not by the import."""
    tables: dict[str, dict[str, dict[str, tuple[Levels, str]]]] = {}
    malformed: dict[str, str] = {}
    for folder in folders():
        for path in sorted(folder.glob("*.json")):
            try:
                found = _read(path)
            except ValueError as error:
                malformed[path.stem] = f"{path}: {error}"
                continue
            label = f"the shipped {path.name}" if folder == SHIPPED else str(path)
            for op, keys in found.items():
                merged = tables.setdefault(path.stem, {}).setdefault(op, {})
                merged.update({key: (levels, label) for key, levels in keys.items()})
    _replace(_tables, tables)
    _replace(_malformed, malformed)
    for target in _choosing().values():
        said = (levels for table in _tables.values() for levels, _ in table.get(target.name, {}).values())
        others = any(backend != target.auto[0] for levels in said for _, backend in levels)
        target.swayed = others or bool(_malformed)


def _replace(kept: dict[str, Any], new: dict[str, Any]) -> None:
    """Without a moment in which there is nothing: other threads choose meanwhile."""
    kept.update(new)
    for name in kept.keys() - new.keys():
        del kept[name]


def _below(work: Any, least: int) -> bool:
    """Whether there is certainly less to do. Dynamo has a symbolic size pass for an int, and would guard the answer."""
    if torch.compiler.is_compiling() or isinstance(work, torch.SymInt):
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(work < least)
    return bool(work < least)


def _read(path: Path) -> dict[str, dict[str, Levels]]:
    table = json.loads(path.read_text())
    section = table.get(SECTION, {}) if isinstance(table, dict) else None
    if not isinstance(section, dict):
        raise ValueError(f"{SECTION}: expected operations and what was measured of them")
    found = {}
    for op, keys in section.items():
        if op == "made_by":
            continue
        if op not in _choosing():
            raise ValueError(f"{SECTION}: {unknown('operation', op, _choosing())}")
        if not isinstance(keys, dict):
            raise ValueError(f"{SECTION}: {op}: got {keys!r}, expected keys and their entries")
        found[op] = {key: _levels(f"{SECTION}: {op}: {key}", entries) for key, entries in keys.items()}
    return found


def _choosing() -> dict[str, Op]:
    """The operations that ask."""
    return {name: op for name, op in OPS.items() if op.prefer is not None}


def _levels(place: str, entries: Any) -> Levels:
    try:
        levels = tuple((least, backend) for least, backend in entries)
    except (TypeError, ValueError):
        levels = ()
    rightly = all(type(least) is int and type(backend) is str for least, backend in levels)
    if not levels or not rightly or any(a >= b for (a, _), (b, _) in pairwise(levels)):
        raise ValueError(f"{place}: got {entries!r}, expected [[work, backend], ...], the work growing")
    return levels
