"""Counts what Triton compiles, by whomever it is asked: kernels of this package and those that Inductor writes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Compiles:
    """Names of kernels, once for each time.

    Attributes:
        compiled: compiled from source.
        loaded: read from Triton's disk cache, which a request would wait for as well.
    """

    compiled: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """All variants of kernels that were not there yet."""
        return len(self.compiled) + len(self.loaded)


@contextmanager
def count_compiles() -> Iterator[Compiles]:
    """Counts inside a ``with`` block, in all threads. Needs triton; a listener that is there already still listens."""
    compilation = importlib.import_module("triton").knobs.compilation
    found = Compiles()
    before = compilation.listener

    def listen(*, src: Any, cache_hit: bool, **rest: Any) -> None:
        (found.loaded if cache_hit else found.compiled).append(src.name)
        if before is not None:
            before(src=src, cache_hit=cache_hit, **rest)

    compilation.listener = listen
    try:
        yield found
    finally:
        compilation.listener = before
