"""An operator: its schema in ``torch.ops``, its fake, its backends, and the one rule the compiler follows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

from . import repeat, selection
from .errors import BackendError, NoBackendError, describe_call, unknown
from .mutation import check_disjoint, check_writable

if TYPE_CHECKING:
    from .backend import Backend

NAMESPACE = "torch_mamba_ops"
OPS: dict[str, Op] = {}
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
ASK = "?"  # as `backend`: do not run, tell what was about to (see report.explain)
_PLAIN_TENSORS = (torch.Tensor, torch._subclasses.FakeTensor, FunctionalTensor)


def operation(name: str) -> Op:
    """The operation of that name; a ValueError names the nearest one."""
    if name not in OPS:
        raise ValueError(unknown("operation", name, OPS))
    return OPS[name]


def _exporting() -> bool:
    # Not is_exporting(), which is always true to Dynamo of torch 2.11.
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


class Asked(Exception):
    """Carries the operator's arguments from a public function called with ``backend=ASK``."""

    def __init__(self, tensors: tuple[Any, ...], options: dict[str, Any]) -> None:
        super().__init__()
        self.tensors = tensors
        self.options = options


@dataclass(frozen=True)
class Lowering:
    """A compiler's own way with an operator, which it then gets as it is and not as the code of an inline backend.

    Attributes:
        why_not: called with a backend's name, the tensors and the options; every reason why a call is none for it, from
            metadata alone.
        tracing: whether that compiler is tracing now.
    """

    why_not: Callable[[str, Sequence[Any], Mapping[str, Any]], Sequence[str]]
    tracing: Callable[[], bool]

    def takes(self, backend: str, tensors: Sequence[Any], options: Mapping[str, Any]) -> bool:
        """Whether a call that is being traced is left to that compiler."""
        return not self.why_not(backend, tensors, options) and self.tracing()


class Preference(NamedTuple):
    """What a table of measurements says of a call.

    Attributes:
        backend: the fastest.
        key: what was measured.
        work: how much of that this call is; may be symbolic.
        levels: all that the table says of it: amounts of work, and the backend that is the fastest from each on.
        table: which one.
    """

    backend: str
    key: str
    work: Any
    levels: tuple[tuple[int, str], ...]
    table: str


class Op:
    """One operation, registered as ``torch.ops.torch_mamba_ops.<name>``.

    Args:
        schema: of the operator. Tensors are positional, options keyword-only, the last one is ``str backend``.
        fake: called with the operator's arguments without ``backend``; returns empty outputs with the shapes, dtypes
            and strides that every backend returns.
        auto: the order in which the automatic choice tries the built-in backends, after the one that ``prefer`` names.
        differentiable: the backward pass differentiates the ``reference`` backend, recomputed. Only for operators
            that mutate nothing.
        hints: options that change no result, so that a backend need not take them.
        prefer: called with the operator's arguments by name, without ``backend``; what was measured of such calls, or
            None. From metadata alone. Dynamo traces it: it must guard no symbolic size, and read plain dictionaries
            only, after whose change ``repeat.forget`` is called.
    """

    def __init__(
        self,
        schema: str,
        *,
        fake: Callable[..., Any],
        auto: Sequence[str],
        differentiable: bool = False,
        hints: Sequence[str] = (),
        prefer: Callable[..., Preference | None] | None = None,
    ) -> None:
        self.name = _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        qualified = f"{NAMESPACE}::{self.name}"
        self.overload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        arguments = self.overload._schema.arguments
        self.tensors = tuple(a.name for a in arguments if not a.kwarg_only)
        self.options = tuple(a.name for a in arguments if a.kwarg_only and a.name != "backend")
        self.arguments = self.tensors + self.options
        self.mutated = tuple(i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)
        self.fake = fake
        self.auto = tuple(auto)
        self.hints = tuple(hints)
        self.differentiable = differentiable
        self.prefer = prefer
        self.swayed = False  # whether some table prefers another backend than the first of `auto`; set by `tuning`
        self.defaults: dict[str, Any] = {}
        self.function: Callable[..., Any]
        self.backends: dict[str, Backend] = {}
        self.lowering: Lowering | None = None
        _LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(
            qualified, lambda *tensors, backend, **options: fake(*tensors, **options), lib=_LIBRARY
        )
        torch.library.register_torch_dispatch(qualified, FunctionalTensorMode, self._trace, lib=_LIBRARY)
        if differentiable:
            torch.library.register_autograd(qualified, self._backward, setup_context=self._save, lib=_LIBRARY)
        OPS[self.name] = self

    def __call__(self, backend: str | None, tensors: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Chooses a backend for these arguments and calls the operator with it."""
        if backend is ASK:
            raise Asked(tensors, options)
        if self.mutated:
            self._check_mutated(tensors)
        wanted = selection.wanted(self.name, self.backends) if backend is None else backend
        key = self.choose(wanted, tensors, options)
        if self.differentiable and not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            with torch._C._AutoDispatchBelowAutograd():  # autograd's own kernel is Python: 6 us to find nothing to do
                result = self.overload(*tensors, **options, backend=key)
        else:
            result = self.overload(*tensors, **options, backend=key)
        if not torch.compiler.is_compiling():
            repeat.note(self, tensors, options, wanted, key, result)
        return result

    def choose(self, requested: str | None, tensors: tuple[Any, ...], options: dict[str, Any]) -> str:
        """The key of the backend that runs these arguments.

        Dynamo traces this and guards every value it reads, so that another choice is another graph.
        """
        name = selection.wanted(self.name, self.backends) if requested is None else requested
        if name != "auto":
            return self._named(name, tensors, options).key
        for candidate in self.order(self.preference(tensors, options) if self.swayed else None):
            backend = self.backends.get(candidate)
            if backend is not None and (backend.why_not is None or not backend.why_not(*tensors, **options)):
                return backend.key
        raise NoBackendError(self._nothing_fits(tensors, options))

    def preference(self, tensors: Sequence[Any], options: Mapping[str, Any]) -> Preference | None:
        """What was measured of such calls, if anything was. A program that is exported may run on another device."""
        if self.prefer is None or _exporting():
            return None
        found = self.prefer(**self.named(tensors, options))
        if found is not None and found.backend not in self.backends:
            name = unknown("backend", found.backend, self.backends)
            raise BackendError(f"{found.table}: backends: {self.name}: {found.key}: {name}")
        return found

    def order(self, preference: Preference | None) -> tuple[str, ...]:
        """The backends that the automatic choice tries, the first that can run a call runs it."""
        if preference is None or preference.backend == self.auto[0]:
            return self.auto
        return (preference.backend, *self.auto)

    def publish(self, function: Callable[..., Any]) -> None:
        """Sets the public function; an option at its default there is one that a call does not use."""
        self.function = function
        self.defaults = {name: p.default for name, p in inspect.signature(function).parameters.items()}

    def add(self, backend: Backend) -> None:
        """Makes a backend known, in place of one of the same name."""
        self.backends[backend.name] = backend
        repeat.forget()

    def resolve(self, key: str) -> Backend:
        """The backend a graph names. The name counts, not the hash: a program saved before an upgrade still runs."""
        name = key.partition("@")[0]
        backend = self.backends.get(name)
        if backend is None:
            raise BackendError(f"{self.name}: {unknown('backend', name, self.backends)}")
        return backend

    def named(self, tensors: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments by name."""
        return dict(zip(self.tensors, tensors, strict=True)) | dict(options)

    def in_use(self, name: str, value: Any) -> bool:
        """Whether a call depends on this argument."""
        if isinstance(value, torch.Tensor):
            return True
        return value is not None and name not in self.hints and value != self.defaults.get(name, False)

    def _check_mutated(self, tensors: tuple[Any, ...]) -> None:
        written: dict[str, torch.Tensor] = {}
        for position in self.mutated:
            tensor, name = tensors[position], self.tensors[position]
            if tensor is not None:
                check_writable(name, tensor)
                if written:
                    check_disjoint(name, tensor, written)
                written[name] = tensor
        if torch.is_grad_enabled():
            for name, tensor in zip(self.tensors, tensors, strict=True):
                if tensor is not None and tensor.requires_grad:
                    raise ValueError(
                        f"{name}: requires grad, but {self.name} updates a state in place and has no gradient; "
                        "expected a call under torch.no_grad()"
                    )

    def _named(self, name: str, tensors: tuple[Any, ...], options: dict[str, Any]) -> Backend:
        backend = self.backends.get(name)
        if backend is None:
            raise BackendError(f"{self.name}: {unknown('backend', name, self.backends)}")
        reasons = backend.why_not(*tensors, **options) if backend.why_not is not None else ()
        if reasons:
            listed = "".join(f"\n  {reason}" for reason in reasons)
            raise BackendError(f"backend {name!r} cannot run {self._described(tensors, options)}:{listed}")
        return backend

    def _nothing_fits(self, tensors: tuple[Any, ...], options: dict[str, Any]) -> str:
        lines = [f"no backend can run {self._described(tensors, options)}"]
        for name in dict.fromkeys(self.order(self.preference(tensors, options))):
            if name in self.backends:
                why_not = self.backends[name].why_not
                reasons = why_not(*tensors, **options) if why_not is not None else ()
                lines += [f"  {name}: {reason}" for reason in reasons]
            else:
                lines.append(f"  {name}: not registered")
        return "\n".join(lines)

    def _described(self, tensors: tuple[Any, ...], options: dict[str, Any]) -> str:
        if torch.compiler.is_compiling():  # Dynamo cannot print symbolic sizes
            return self.name
        return describe_call(self.name, self.named(tensors, options))

    def _run(self, *tensors: Any, backend: str, **options: Any) -> Any:
        return self.resolve(backend).run(*tensors, **options)

    def _trace(
        self, mode: Any, overload: Any, types: Sequence[type], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """What AOTAutograd records: the code of an inline backend, or the operator itself."""
        if not all(given in _PLAIN_TENSORS for given in types):  # a DTensor is a Tensor, and has rules of its own
            return NotImplemented
        backend = self.resolve(kwargs["backend"])
        if backend.trace == "opaque" or (self.lowering is not None and self.lowering.takes(backend.name, args, kwargs)):
            return mode.__torch_dispatch__(overload, types, args, kwargs)
        with mode:
            return self._run(*args, **kwargs)

    def _save(self, ctx: Any, inputs: Sequence[Any], keyword_only_inputs: Mapping[str, Any], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        ctx.options = {name: value for name, value in keyword_only_inputs.items() if name != "backend"}

    def _backward(self, ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        needed = [i for i, wanted in enumerate(ctx.needs_input_grad[: len(self.tensors)]) if wanted]
        with torch.enable_grad():
            # Views, so that a tensor passed as two arguments gets two gradients.
            tensors = [t.view_as(t) if i in needed else t for i, t in enumerate(ctx.saved_tensors)]
            result = self.backends["reference"].run(*tensors, **ctx.options)
        outputs = result if isinstance(result, tuple) else (result,)
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            [tensors[i] for i in needed],
            [g for _, g in pairs],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
        by_index = dict(zip(needed, found, strict=True))
        return tuple(by_index.get(i) for i in range(len(self.tensors)))
