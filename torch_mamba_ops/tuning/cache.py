"""Configs that warm-up found on this machine, kept for the next process: a file for each kernel and key.

    <folder>/configs/<hash of this package>/<device>/<operation>/<key>.json    [[48, {"BLOCK_P": 8, ...}], ...]

The folder is read once, so that what a process compiles is what its `digest` says, whatever other processes find
meanwhile. A file is written whole or not at all, so processes that tune at once do not disturb each other, and one that
cannot be read or written costs a warning and the time it would have saved.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from torch_mamba_ops.dispatch.fingerprint import of_package

Entries = list[tuple[int, dict[str, Any]]]
VARIABLE = "TORCH_MAMBA_OPS_CACHE_DIR"
_log = logging.getLogger(__name__)
_chosen: list[Path] = []
_kept: dict[Path, dict[str, str]] = {}  # of each folder: files and what they say; nothing for one that is not readable
_warned: set[Path] = set()


def folder() -> Path:
    """Where configs are kept: `use_folder` over ``TORCH_MAMBA_OPS_CACHE_DIR`` over ``~/.cache/torch_mamba_ops``."""
    if _chosen:
        return _chosen[-1]
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "torch_mamba_ops"


def use_folder(path: str | os.PathLike[str]) -> None:
    """Keeps configs in another folder from now on, in this process. It is read again, if it was before."""
    _chosen[:] = [Path(path)]
    _kept.pop(_versioned(), None)


def load(device: str, op: str, key: str) -> Entries:
    """What is known of a key; nothing if its file is damaged."""
    text = _texts().get(_name(device, op, key))
    if text is None:
        return []
    try:
        return [(int(least), dict(config)) for least, config in json.loads(text)]
    except (ValueError, TypeError):
        path = _versioned() / _name(device, op, key)
        _warn(path, f"{path} cannot be read or is damaged: its configs are not used; remove it to tune again")
        return []


def keep(device: str, op: str, key: str, entries: Entries) -> None:
    """Keeps what was found, in this process and, where it can be written, on disk."""
    path = _versioned() / _name(device, op, key)
    text = _texts()[_name(device, op, key)] = json.dumps(entries)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as part:
            part.write(text)
        os.replace(part.name, path)
    except OSError as error:
        why = error.strerror
        _warn(folder(), f"{folder()} cannot be written ({why}): configs found now last as long as this process")


def digest() -> str:
    """A hash of all that is kept."""
    return hashlib.sha256(json.dumps(_texts(), sort_keys=True).encode()).hexdigest()


def _versioned() -> Path:
    return folder() / "configs" / of_package()


def _name(device: str, op: str, key: str) -> str:
    return f"{device}/{op}/{key.replace(' ', '_')}.json"


def _texts() -> dict[str, str]:
    root = _versioned()
    if root not in _kept:
        _kept[root] = {path.relative_to(root).as_posix(): _text(path) for path in root.rglob("*.json")}
    return _kept[root]


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _warn(place: Path, message: str) -> None:
    if place not in _warned:
        _warned.add(place)
        _log.warning(message)
