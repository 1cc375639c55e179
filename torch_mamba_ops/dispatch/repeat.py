"""A call like an earlier one starts at once: what follows from metadata alone is not found out again.

A public function checks its arguments, chooses a backend and goes through torch's dispatcher, which takes the host
longer than a decode step takes the device. `repeatable` remembers calls that did all that. A call is like one of them
if its tensors agree in everything but their values and addresses (torch.compile's own guards compare them), its other
arguments are equal and the choice of the backend still holds (see `forget`, too); it then runs the backend directly,
after the checks of values (`each_time`).

Leaving the dispatcher out must not show, so a call that anybody watches takes the long way: the compiler, modes,
subclasses, function transforms, autograd, a profiler.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler

from . import selection
from .mutation import check_disjoint

if TYPE_CHECKING:
    from .backend import Backend
    from .op import Op

Function = TypeVar("Function", bound=Callable[..., Any])
Values = Sequence[Any]
# Compares type, dtype, device, sizes, strides, dispatch keys and requires_grad of many tensors in half a microsecond.
# Private: without it every call takes the long way.
_Guards: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)
_TENSORS = (Tensor, torch.nn.Parameter)
_OTHERS = (type(None), bool, int, float, str)
_UNWATCHED = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect).add(torch._C.DispatchKey.ADInplaceOrView)
_MOST = 16  # calls remembered, or refused, for one way to write the arguments and one size
_WAYS = 2048
_forgotten = [0]


def forget() -> None:
    """Has every call take the long way once more. To call after a change of what calls go by beside their arguments and
    what `selection` holds: tables of what was measured."""
    _forgotten[0] += 1


def generation() -> int:
    """A number that is another one after each `forget`."""
    return _forgotten[0]


@dataclass
class Record:
    """What a call did, while it is watched to be repeated.

    Attributes:
        op: the operation that was called.
        tensors: its operator's; empty until it is called.
        options: its operator's.
        wanted: the name that the backend was chosen by, or ``"auto"``.
        key: of the backend that ran it.
        result: what that returned.
        checks: of values: function, name, the tensor, other arguments.
        start: the tensors and the function of `offer`.
        generation: when it began.
    """

    op: Op
    tensors: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    wanted: str = "auto"
    key: str = ""
    result: Any = None
    checks: list[tuple[Callable[..., None], str, Tensor, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    start: tuple[Tensor, Sequence[Tensor], Callable[[list[int]], Any]] | None = None
    generation: int = field(default_factory=generation)


@dataclass(frozen=True, slots=True)
class Known:
    """A call that took the long way, and how to run another like it.

    Attributes:
        others: picks the arguments that are no tensors.
        types: what they were.
        given: and of what value.
        tensors: picks the tensors.
        alike: whether tensors have the same metadata.
        written: the arguments that are mutated, and which they are.
        wanted: the backend that was chosen outside of the call, if the call did not name one.
        backend: that ran it.
        generation: what holds no longer after a `forget`.
        checks: of values: function, name, which argument, other arguments.
        run: runs the arguments; NotImplemented if they must take the long way.
    """

    others: Callable[[Values], tuple[Any, ...]]
    types: list[type]
    given: tuple[Any, ...]
    tensors: Callable[[Values], tuple[Tensor, ...]]
    alike: Callable[..., bool]
    written: Mapping[str, int]
    wanted: str | None
    backend: Backend
    generation: int
    checks: tuple[tuple[Callable[..., None], str, int, tuple[Any, ...], dict[str, Any]], ...]
    run: Callable[[Values], Any]


class _Here(threading.local):
    record: Record | None = None


_here = _Here()


def each_time(check: Callable[..., None], name: str, tensor: Tensor, *rest: Any, **options: Any) -> None:
    """Runs a check that reads values, ``check(name, tensor, *rest, **options)``, now and, where they can be read, when
    the call is repeated. What else it is given must follow from metadata."""
    check(name, tensor, *rest, **options)
    if not torch.compiler.is_compiling() and _here.record is not None and _has_indices(tensor):
        assert not any(isinstance(value, Tensor) for value in (*rest, *options.values())), "it would be kept"
        _here.record.checks.append((check, name, tensor, rest, options))


def note(op: Op, tensors: tuple[Any, ...], options: Mapping[str, Any], wanted: str, key: str, result: Any) -> None:
    """Tells what the operator was called with, how its backend was chosen and what it returned."""
    record = _here.record
    if record is not None and record.op is op:
        record.tensors, record.options, record.wanted, record.key = tensors, options, wanted, key
        record.result = result


def offer(result: Tensor, tensors: Sequence[Tensor], start: Callable[[list[int]], Any]) -> None:
    """Tells a backend's shorter way to run a call like the one that is being run, and do nothing else.

    Args:
        result: what the backend is about to return.
        tensors: arguments of the operator, as they are.
        start: gets the addresses of tensors like those and returns a new result, or NotImplemented if it cannot.
    """
    if _here.record is not None:
        _here.record.start = (result, tensors, start)


def recording() -> bool:
    """Whether this call is being recorded, so that an offer counts."""
    return _here.record is not None


def repeatable(op: Op, *, unread: Sequence[str] = ()) -> Callable[[Function], Function]:
    """Decorates a public function that calls its operator once and returns what that returns. Calls are repeated whose
    tensors the operator gets by the same names, as they are or as views of them.

    Checks of values must run by `each_time`; checks of addresses (overlap) only where two arguments are written.

    Args:
        op: the operation.
        unread: integer arguments whose values no check reads. A call with another one on the CPU, whose values could
            be checked and were not by `each_time`, takes the long way.
    """

    def decorate(function: Function) -> Function:
        return cast(Function, _repeating(op, function, frozenset(unread)))

    return decorate


def _repeating(op: Op, function: Callable[..., Any], unread: frozenset[str]) -> Callable[..., Any]:
    parameters = tuple(inspect.signature(function).parameters)
    telling = next(name for i, name in enumerate(op.tensors) if i not in op.mutated)  # its sizes: every batch's own
    place = parameters.index(telling)
    known_calls: dict[tuple[Any, ...], tuple[Known, ...]] = {}
    refused: dict[tuple[Any, ...], int] = {}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or profiler._is_profiler_enabled
            or torch._C._is_torch_function_mode_enabled()
            or forward_ad._current_level >= 0
        ):
            return function(*args, **kwargs)
        first: Any = args[place] if len(args) > place else kwargs.get(telling)
        if type(first) not in _TENSORS:
            return function(*args, **kwargs)
        values = (*args, *kwargs.values())
        way = (torch.is_grad_enabled(), first.shape, len(args), *kwargs)
        calls = known_calls.get(way, ())
        for known in calls:
            if known.generation != _forgotten[0]:
                continue
            others = known.others(values)
            if list(map(type, others)) != known.types or others != known.given:  # a tensor must not be compared
                continue
            if not known.alike(*known.tensors(values)) or op.backends.get(known.backend.name) is not known.backend:
                continue
            if known.wanted is None or known.wanted == selection.wanted(op.name, op.backends):
                for check, name, which, rest, options in known.checks:
                    check(name, values[which], *rest, **options)
                if len(known.written) > 1:
                    _check_apart(known.written, values)
                result = known.run(values)
                if result is not NotImplemented:
                    if known is not calls[0]:  # the latest first: layers of a model call alike
                        known_calls[way] = (known, *(other for other in calls if other is not known))
                    return result
        if not _may_be_known(values) or refused.get(way, 0) >= _MOST:
            return _recorded(None, function, args, kwargs)
        if way not in known_calls:  # nothing is learnt from the first: packed batches have ever new sizes
            remember(way, ())
            return _recorded(None, function, args, kwargs)
        record = Record(op)
        result = _recorded(record, function, args, kwargs)
        learnt = _known(record, result, (*parameters[: len(args)], *kwargs), values, unread)
        if learnt is not None:
            remember(way, (learnt, *calls[: _MOST - 1]))
        else:
            refused[way] = refused.get(way, 0) + 1
        return result

    def remember(way: tuple[Any, ...], calls: tuple[Known, ...]) -> None:
        if way not in known_calls and len(known_calls) >= _WAYS:
            known_calls.clear()
            refused.clear()
        known_calls[way] = calls

    return call


def _check_apart(written: Mapping[str, int], values: Values) -> None:
    earlier: dict[str, Tensor] = {}
    for name, which in written.items():
        check_disjoint(name, values[which], earlier)
        earlier[name] = values[which]


def _recorded(record: Record | None, function: Callable[..., Any], args: Values, kwargs: Mapping[str, Any]) -> Any:
    """A call that this record, and no call around it, is told of."""
    before, _here.record = _here.record, record
    try:
        return function(*args, **kwargs)
    finally:
        _here.record = before


def _may_be_known(values: Values) -> bool:
    """Whether nobody watches this call: plain tensors that need no gradient, and no other dispatch key in force."""
    if _Guards is None:
        return False
    if torch._C._dispatch_tls_local_include_set() | _UNWATCHED != _UNWATCHED:
        return False
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors or len(set(map(id, tensors))) < len(tensors):
        return False
    if not all(type(value) in _TENSORS or _compares(value) for value in values):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return all(torch._C._dispatch_keys(tensor) | _plain(tensor.device) == _plain(tensor.device) for tensor in tensors)


def _compares(value: Any) -> bool:
    """Whether equality tells all about a value, for good."""
    return type(value) in _OTHERS or (type(value) is tuple and all(type(part) in _OTHERS for part in value))


@functools.cache
def _plain(device: torch.device) -> torch._C.DispatchKeySet:
    with torch.inference_mode(False):
        return torch._C._dispatch_keys(torch.empty(0, device=device))


def _known(record: Record, result: Any, names: Sequence[str], values: Values, unread: frozenset[str]) -> Known | None:
    """What to keep of a recorded call; None if there is more to it than its metadata."""
    if not record.key or record.result is not result:
        return None
    op, backend, public = record.op, record.op.resolve(record.key), dict(zip(names, values, strict=True))
    if backend.key != record.key:  # replaced meanwhile
        return None
    operator = dict(zip(op.tensors, record.tensors, strict=True))
    tensors = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    others = [i for i, value in enumerate(values) if not isinstance(value, Tensor)]
    if any(operator.get(names[i]) is None for i in tensors):  # `out`, for one
        return None
    if any(tensor is not None and not _same_place(tensor, public.get(name)) for name, tensor in operator.items()):
        return None
    written = {op.tensors[i]: names.index(op.tensors[i]) for i in op.mutated if record.tensors[i] is not None}
    places = {id(values[i]): i for i in tensors}
    checked = {id(tensor) for _, _, tensor, _, _ in record.checks}
    readable = {id(values[i]) for i in tensors if names[i] not in unread and _has_indices(values[i])}
    if not readable <= checked <= places.keys():
        return None
    return Known(
        others=_picker(others),
        types=[type(values[i]) for i in others],
        given=tuple(values[i] for i in others),
        tensors=_picker(tensors),
        alike=_Guards(*(values[i] for i in tensors), dynamic_dims_sizes=None, dynamic_dims_strides=None).check,
        written=written,
        wanted=record.wanted if public.get("backend") is None else None,
        backend=backend,
        generation=record.generation,
        checks=tuple(
            (check, name, places[id(tensor)], rest, more) for check, name, tensor, rest, more in record.checks
        ),
        run=_started(record, names) or _run_again(record, backend.run, names, public),
    )


def _run_again(
    record: Record, run: Callable[..., Any], names: Sequence[str], public: Mapping[str, Any]
) -> Callable[[Values], Any]:
    """Runs the backend on the operator's tensors: the public function's, and views of them from their first element."""
    options = record.options
    operator = dict(zip(record.op.tensors, record.tensors, strict=True))
    pick = _picker([-1 if tensor is None else names.index(name) for name, tensor in operator.items()])
    views = [
        (place, tensor.shape, tensor.stride())
        for place, (name, tensor) in enumerate(operator.items())
        if tensor is not None and tensor is not public[name]
    ]

    def again(values: Values) -> Any:
        tensors: Any = pick((*values, None))
        if views:
            tensors = list(tensors)
            for place, size, stride in views:
                tensors[place] = tensors[place].as_strided(size, stride)
        return run(*tensors, **options)

    return again


def _started(record: Record, names: Sequence[str]) -> Callable[[Values], Any] | None:
    """Runs what the backend offered, if it did."""
    if record.start is None:
        return None
    offered, tensors, start = record.start
    operator = {id(tensor): name for name, tensor in zip(record.op.tensors, record.tensors, strict=True)}
    if offered is not record.result or any(id(tensor) not in operator for tensor in tensors):
        return None
    pick = _picker([names.index(operator[id(tensor)]) for tensor in tensors])
    return lambda values: start(list(map(Tensor.data_ptr, pick(values))))


def _same_place(tensor: Tensor, public: Any) -> bool:
    """Whether a tensor is the one that was given or a view of it that begins where it does."""
    if tensor is public:
        return True
    return (
        isinstance(public, Tensor)
        and tensor.dtype == public.dtype
        and tensor.untyped_storage()._cdata == public.untyped_storage()._cdata
        and tensor.storage_offset() == public.storage_offset()
    )


def _has_indices(tensor: Tensor) -> bool:
    """Whether these may be values that a check can read."""
    return tensor.device.type == "cpu" and not tensor.is_floating_point()


def _picker(places: Sequence[int]) -> Callable[[Values], tuple[Any, ...]]:
    """Takes those elements of a tuple."""
    if len(places) > 1:
        return itemgetter(*places)
    return itemgetter(slice(places[0], places[0] + 1) if places else slice(0))
