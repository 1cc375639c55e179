"""Named arguments of an operation: the one list that tests, benchmarks and tuning share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """Arguments of a public function.

    Attributes:
        name: unique among the operation's cases.
        build: makes the keyword arguments on a device from a generator of that device.
        tags: ``small`` (run everywhere), ``model`` (a real model's shapes), ``opcheck``, ``grad``.
    """

    name: str
    build: Callable[[torch.device, torch.Generator], dict[str, Any]]
    tags: frozenset[str] = frozenset()
