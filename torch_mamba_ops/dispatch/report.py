"""What is registered, and why a call runs where it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from . import selection
from .errors import BackendError, describe_call
from .op import ASK, Asked, Op, Preference, operation

if TYPE_CHECKING:
    from .backend import Backend


@dataclass(frozen=True)
class Candidate:
    """A backend, every reason why it cannot run the call (none: it can), and whether the automatic choice tries it."""

    name: str
    reasons: tuple[str, ...]
    automatic: bool


@dataclass(frozen=True)
class Explanation:
    """The choice for one call. ``chosen`` is None when nothing can run it or the backend asked for cannot; ``compiled``
    tells what torch.compile makes of the call, ``gradient`` where the gradient comes from, if one is asked for."""

    call: str
    chosen: str | None
    why: str
    candidates: tuple[Candidate, ...]
    compiled: str | None = None
    gradient: str | None = None

    def __str__(self) -> str:
        lines = [self.call]
        for candidate in self.candidates:
            mark = "->" if candidate.name == self.chosen else "  "
            note = "" if candidate.automatic else " (only by name)"
            reasons = candidate.reasons or ("can run it",)
            lines += [f"{mark} {candidate.name}{note}: {reason}" for reason in reasons]
        lines.append(f"{self.chosen or 'nothing'}: {self.why}")
        if self.gradient is not None:
            lines.append(f"gradient: {self.gradient}")
        if self.compiled is not None:
            lines.append(f"under torch.compile: {self.compiled}")
        return "\n".join(lines)


def backends(op: str) -> Mapping[str, Backend]:
    """The registered backends of an operation by name, the automatic choice's order first."""
    target = operation(op)
    order = [name for name in target.auto if name in target.backends]
    order += [name for name in target.backends if name not in target.auto]
    return MappingProxyType({name: target.backends[name] for name in order})


def explain(op: str, /, *args: Any, **kwargs: Any) -> Explanation:
    """Tells for a call of the public function, without running it: each backend, every reason why it cannot run, and
    which one is chosen and why. Fake tensors do.

    Args:
        op: the operation's name.
        *args: the public function's arguments.
        **kwargs: the public function's arguments.

    Raises:
        ValueError: no such operation, or arguments that the public function refuses.
    """
    target = operation(op)
    requested = kwargs.pop("backend", None)
    try:
        target.function(*args, backend=ASK, **kwargs)
    except Asked as asked:
        return _explanation(target, requested, asked.tensors, asked.options)
    raise AssertionError(f"{op}: the public function did not reach its operator")


def _explanation(op: Op, requested: str | None, tensors: tuple[Any, ...], options: dict[str, Any]) -> Explanation:
    wanted, source = selection.choice(op.name, op.backends) if requested is None else (requested, "the call")
    chosen: str | None
    preference: Preference | None = None
    try:
        preference = op.preference(tensors, options) if wanted == "auto" else None
        chosen = op.choose(wanted, tensors, options).partition("@")[0]
        why = _automatic(op, chosen, preference) if wanted == "auto" else f"asked for by {source}"
    except BackendError as error:
        chosen, why = None, str(error).splitlines()[0]
    order = op.order(preference)
    candidates = tuple(
        Candidate(name, tuple(backend.why_not(*tensors, **options)) if backend.why_not else (), name in order)
        for name, backend in backends(op.name).items()
    )
    compiled = _compiled(op, op.backends[chosen], tensors, options) if chosen is not None else None
    call = describe_call(op.name, op.named(tensors, options))
    return Explanation(call, chosen, why, candidates, compiled, _gradient(op, chosen, tensors))


def _gradient(op: Op, chosen: str | None, tensors: tuple[Any, ...]) -> str | None:
    if not torch.is_grad_enabled() or not any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return None
    if chosen == "reference":
        return "the reference is differentiated"
    return f"the reference is run again and differentiated: {chosen} has no backward pass"


def _compiled(op: Op, backend: Backend, tensors: tuple[Any, ...], options: dict[str, Any]) -> str:
    if backend.trace == "opaque":
        return "called as it is"
    if op.lowering is None:
        return "traced through"
    reasons = op.lowering.why_not(backend.name, tensors, options)
    if not reasons:
        return "a template, which takes in what follows"
    return f"traced through (no template: {'; '.join(reasons)})"


def _automatic(op: Op, chosen: str, preference: Preference | None) -> str:
    first = f"automatic: the first of {', '.join(op.auto)} that can run it"
    if preference is None:
        return first
    levels = ", ".join(f"{backend} from {least} on" for least, backend in preference.levels)
    measured = f"measured to be the fastest for {preference.key} and work {preference.work}"
    measured += f" ({preference.table}: {levels})"
    if preference.backend == chosen:
        return f"automatic: {measured}"
    return f"{first}; {preference.backend}, {measured}, cannot"
