"""A backend is a value: a name, the function that runs it, and the reasons why it cannot."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from . import fingerprint
from .errors import BackendError, unknown
from .op import OPS, Op, operation

Trace = Literal["inline", "opaque"]
WhyNot = Callable[..., Sequence[str]]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, eq=False)
class Backend:
    """One way to run an operation.

    Attributes:
        name: what ``backend="name"`` and ``set_backend`` say.
        key: ``name@hash``, what graphs carry; another hash is another graph.
        run: called with the operator's tensors (positional) and options (keyword), without ``backend``.
        why_not: called alike; every reason why it cannot run them, from metadata alone. None: it always can.
        trace: ``"inline"`` torch code that the compiler traces through, or ``"opaque"``, called as it is.
    """

    name: str
    key: str
    run: Callable[..., Any]
    why_not: WhyNot | None
    trace: Trace


def register_backend(
    op: str, name: str, *, why_not: WhyNot | None = None, trace: Trace = "opaque", version: str | None = None
) -> Callable[[Function], Function]:
    """Registers the decorated function as a backend of an operation.

    The function names the operator's arguments that it supports (``Op.arguments`` lists them; tensors in that order,
    then options) and gets exactly those. An argument that it does not name and that a call uses is a reason why
    it cannot run that call: nothing is dropped in silence. Registering a user's name again replaces it.

    Args:
        op: the operation, e.g. ``"selective_state_update"``.
        name: what the backend is chosen by. Names of built-in backends cannot be replaced.
        why_not: takes what the function takes and returns every reason why it cannot run it (empty: it can). It
            sees metadata only: it must work on fake tensors and symbolic sizes, and must not read data.
        trace: ``"inline"`` if the function is torch code that torch.compile and torch.export should trace through;
            ``"opaque"`` if it must be called as it is.
        version: stands for the function's code in compile caches, in place of the hash made of its bytecode, closure
            and the globals it reads. Give it when the function depends on what that hash cannot see. A built-in
            backend's stands beside the hash of this package's sources.

    Raises:
        ValueError: unknown operation or trace, or the name of a built-in backend.
        TypeError: the function names an argument that the operator does not have.
    """
    target = operation(op)
    if trace not in ("inline", "opaque"):
        raise ValueError(f"trace: got {trace!r}, expected 'inline' or 'opaque'")
    if "@" in name or "=" in name or "," in name or name in ("", "auto", "*"):
        raise ValueError(f"name: got {name!r}, expected a word without '@', '=' or ',' that is not 'auto' or '*'")

    def register(function: Function) -> Function:
        builtin = (function.__module__ or "").startswith(f"{__package__.partition('.')[0]}.ops.")
        if name in target.auto and not builtin:
            raise ValueError(f"name: {name!r} is a built-in backend of {op}; register yours under another name")
        if builtin:
            code = fingerprint.of_package() + (f"-{version}" if version else "")
        else:
            code = version or fingerprint.of_function(function)
        accepted = _accepted(target, function)
        # A built-in's takes all arguments as they come, at a fifth of the time.
        checks = why_not if accepted is None and (builtin or why_not is None) else _reasons(target, accepted, why_not)
        run = function if builtin else _checked(target, name, _narrowed(target, accepted, function))
        target.add(Backend(name, f"{name}@{code}", run, checks, trace))
        return function

    return register


def _accepted(op: Op, function: Callable[..., Any]) -> frozenset[str] | None:
    """The operator's arguments that the function names; None: all of them."""
    parameters = inspect.signature(function).parameters.values()
    named = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    for extra in named - set(op.arguments):
        raise TypeError(f"{function.__qualname__}: {op.name} has an {unknown('argument', extra, op.arguments)}")
    takes_rest = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return None if takes_rest or named == set(op.arguments) else frozenset(named)


def _narrowed(op: Op, accepted: frozenset[str] | None, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*tensors: Any, **options: Any) -> Any:
        arguments = op.named(tensors, options)
        if accepted is not None:
            arguments = {name: value for name, value in arguments.items() if name in accepted}
        return function(**arguments)

    return call


def _reasons(op: Op, accepted: frozenset[str] | None, why_not: WhyNot | None) -> WhyNot:
    def reasons(*tensors: Any, **options: Any) -> list[str]:
        found = []
        arguments = op.named(tensors, options)
        if accepted is not None:
            for name, value in arguments.items():
                if name not in accepted and op.in_use(name, value):
                    found.append(f"it does not take {name}, which this call uses")
            arguments = {name: value for name, value in arguments.items() if name in accepted}
        if why_not is not None:
            found.extend(why_not(**arguments))
        return found

    return reasons


def _checked(op: Op, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Holds a user's backend to the fake function, so that eager fails where the compiled graph would."""

    def call(*tensors: Any, **options: Any) -> Any:
        result = function(*tensors, **options)
        expected = op.fake(*(_meta(tensor) for tensor in tensors), **options)
        if expected is None:
            if result is not None:
                raise BackendError(f"{op.name}: backend {name!r} returned {type(result).__name__}, expected None")
            return None
        several = isinstance(expected, tuple)
        outputs = result if several else (result,)
        wanted = expected if several else (expected,)
        if not isinstance(outputs, tuple) or len(outputs) != len(wanted):
            raise BackendError(f"{op.name}: backend {name!r} must return {len(wanted)} tensor(s)")
        kept = tuple(_conformed(op, name, out, want, tensors) for out, want in zip(outputs, wanted, strict=True))
        return kept if several else kept[0]

    return call


def _meta(tensor: Any) -> Any:
    if not isinstance(tensor, torch.Tensor):
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _conformed(op: Op, name: str, output: Any, expected: torch.Tensor, inputs: Sequence[Any]) -> torch.Tensor:
    if not isinstance(output, torch.Tensor) or output.shape != expected.shape or output.dtype != expected.dtype:
        given = f"{output.dtype}{list(output.shape)}" if isinstance(output, torch.Tensor) else type(output).__name__
        wanted = f"{expected.dtype}{list(expected.shape)}"
        raise BackendError(f"{op.name}: backend {name!r} returned {given}, expected {wanted}")
    if any(output is tensor for tensor in inputs):
        raise BackendError(f"{op.name}: backend {name!r} returned one of its inputs; return a new tensor")
    if output.stride() != expected.stride():
        kept = torch.empty_strided(expected.shape, expected.stride(), dtype=output.dtype, device=output.device)
        return kept.copy_(output)
    return output


def entry_points() -> None:
    """Loads third-party backends: an entry point of ``torch_mamba_ops.backends`` is a function that registers some."""
    import logging
    import os
    from importlib.metadata import entry_points as installed

    if os.environ.get("TORCH_MAMBA_OPS_ENTRY_POINTS", "1") == "0":
        return
    for point in installed(group="torch_mamba_ops.backends"):
        try:
            point.load()()
        except Exception:
            distribution = point.dist.name if point.dist is not None else "an unknown distribution"
            logging.getLogger(__name__).exception("backends of %s (%s) failed to load", distribution, point.value)


__all__ = ["OPS", "Backend", "register_backend"]
