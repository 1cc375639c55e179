"""A model, or a program exported from one, as an AOTInductor package that runs without this package."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_flatten

from torch_mamba_ops.dispatch import NAMESPACE, OPS, BackendError

# Loads a package and runs it where this package was never imported.
_CLEAN_PROCESS = f"""
import sys, torch
package, given, told = sys.argv[1:]
args, kwargs = torch.load(given, weights_only=False)
outputs = torch._inductor.aoti_load_package(package)(*args, **kwargs)
assert "{NAMESPACE}" not in sys.modules
torch.save((torch.utils._pytree.tree_leaves(outputs), args, kwargs), told)
"""

_COMPILE_ALONE = f"""
import sys, torch, {NAMESPACE}
saved, target, configs = sys.argv[1:]
program = torch.export.load(saved)
torch._inductor.aoti_compile_and_package(program, package_path=target, inductor_configs=torch.load(configs))
"""

_REGEX_CLASH = (
    "A known cause: a compiler that links libstdc++ statically, whose std::regex clashes with that of torch's "
    "libstdc++ and crashes in parse_device_str, whatever the model. package(..., portable_compiler=True) links the "
    "shared one."
)


class PackageError(RuntimeError):
    """A package does not load, does not run, or gives other results than the program it was made from."""


def package(
    model_or_program: torch.nn.Module | ExportedProgram,
    path: str | os.PathLike[str],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    verify: bool = False,
    portable_compiler: bool = False,
    inductor_configs: Mapping[str, Any] | None = None,
) -> Path:
    """Compiles a model ahead of time into a ``.pt2`` package: ``torch._inductor.aoti_load_package`` or the C++ loader
    run it in processes that never import this package.

    States that the model updates in place may be inputs (the caller's tensors are updated) or buffers (they live in
    the loaded package).

    Args:
        model_or_program: a module, exported here with ``torch.export.export``, or an exported program.
        path: of the package, ending in ``.pt2``.
        args: example arguments; for a program, those it was exported with unless given.
        kwargs: example keyword arguments, likewise.
        dynamic_shapes: as in ``torch.export.export``; for modules.
        verify: load and run the package on the example arguments in a process without this package, and compare
            outputs and updated arguments with the program's.
        portable_compiler: build in another process, with a wrapper around the compiler that links the shared
            libstdc++. For compilers without it, which take the static one: such packages crash at load inside
            ``std::regex``.
        inductor_configs: options of Inductor for this compilation.

    Returns:
        The package's path.

    Raises:
        BackendError: an operation's backend is opaque, which a package cannot hold; raised before compiling.
        PackageError: with ``verify``, what went wrong in the clean process.
        ValueError: the path does not end in ``.pt2``, or arguments are missing.
    """
    target = Path(path).absolute()
    if target.suffix != ".pt2":
        raise ValueError(f"path: got {str(path)!r}, expected a name that ends in .pt2")
    if isinstance(model_or_program, ExportedProgram):
        program = model_or_program
        if dynamic_shapes is not None:
            raise ValueError("dynamic_shapes: given with an exported program, expected a module with it")
    else:
        if not args and not kwargs:
            raise ValueError("args: got none, expected example arguments to export the module with")
        with torch.no_grad():
            program = torch.export.export(
                model_or_program,
                tuple(args),
                dict(kwargs or {}),
                dynamic_shapes=dynamic_shapes,
                strict=False,
                # Conditions on a size that always hold, but that torch cannot prove, become checks at run time.
                prefer_deferred_runtime_asserts_over_guards=True,
            )
    _refuse_opaque(program)
    if not args and not kwargs and program.example_inputs is not None:
        args, kwargs = program.example_inputs
    expected = _run(copy.deepcopy(program).module(), args, kwargs) if verify else None
    (_compile_portably if portable_compiler else _compile)(program, target, inductor_configs or {})
    if expected is not None:
        _compare(expected, _run_in_clean_process(target, args, kwargs))
    return target


def backends_of(program: ExportedProgram) -> list[tuple[str, str]]:
    """(operation, backend) of every operator of this package in a program, in order."""
    by_overload = {op.overload: op for op in OPS.values()}
    found = []
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            if node.target in by_overload:
                op = by_overload[node.target]
                found.append((op.name, op.resolve(node.kwargs["backend"]).name))
    return found


def _refuse_opaque(program: ExportedProgram) -> None:
    refused = []
    for name, backend in dict.fromkeys(backends_of(program)):
        op = OPS[name]
        if op.backends[backend].trace == "opaque":
            inline = [other for other in op.backends.values() if other.trace == "inline"]
            refused.append(f"{name} uses {backend!r}; export with one of {', '.join(repr(b.name) for b in inline)}")
    if refused:
        raise BackendError(
            "a package cannot hold an opaque backend, which would need Python and this package where it is loaded: "
            + "; ".join(refused)
            + " (use_backend(...) around torch.export.export)"
        )


def _compile(program: ExportedProgram, target: Path, inductor_configs: Mapping[str, Any]) -> None:
    torch._inductor.aoti_compile_and_package(program, package_path=str(target), inductor_configs=dict(inductor_configs))


def _compile_portably(program: ExportedProgram, target: Path, inductor_configs: Mapping[str, Any]) -> None:
    """Compiles in a process that has the wrapped compiler from its start: Inductor reads ``CXX`` at its import."""
    if any(backend not in OPS[name].auto for name, backend in backends_of(program)):
        program = program.run_decompositions({})  # that process does not know this one's backends
    with tempfile.TemporaryDirectory(prefix="torch_mamba_ops_") as folder:
        saved, configs = Path(folder) / "program.pt2", Path(folder) / "configs.pt"
        torch.export.save(program, saved)
        torch.save(dict(inductor_configs), configs)
        environment = {**os.environ, "CXX": str(_wrapped_compiler(Path(folder)))}
        command = [sys.executable, "-c", _COMPILE_ALONE, str(saved), str(target), str(configs)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = "\n".join(done.stderr.strip().splitlines()[-12:])
            raise PackageError(f"{target.name}: the process that compiled it ended with {done.returncode}\n{last}")


def _wrapped_compiler(folder: Path) -> Path:
    """A script around the compiler (``CXX``, else g++) that links shared libraries with the shared libstdc++. Only with
    ``-shared``, since Inductor also calls the compiler for headers."""
    compiler = os.environ.get("CXX", "g++")
    wrapper = folder / "cxx"
    wrapper.write_text(
        "#!/bin/sh\n"
        'for argument in "$@"; do\n'
        '  [ "$argument" = -shared ] &&\n'
        f'    exec {compiler} -Wl,--no-as-needed -l:libstdc++.so.6 -Wl,--as-needed "$@"\n'
        "done\n"
        f'exec {compiler} "$@"\n'
    )
    wrapper.chmod(0o755)
    return wrapper


_Results = tuple[list[Any], Any, Any]  # outputs, and the arguments as the call left them


def _run(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> _Results:
    given = copy.deepcopy((tuple(args), dict(kwargs or {})))
    with torch.no_grad():
        outputs = function(*given[0], **given[1])
    return tree_flatten(outputs)[0], *given


def _run_in_clean_process(target: Path, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> _Results:
    with tempfile.TemporaryDirectory(prefix="torch_mamba_ops_") as folder:
        given, told = Path(folder) / "given.pt", Path(folder) / "told.pt"
        torch.save((tuple(args), dict(kwargs or {})), given)
        command = [sys.executable, "-c", _CLEAN_PROCESS, str(target), str(given), str(told)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        if done.returncode != 0:
            raise PackageError(_cause(target, done))
        results: _Results = torch.load(told, weights_only=False)
        return results


def _cause(target: Path, done: subprocess.CompletedProcess[str]) -> str:
    last = "\n".join(done.stderr.strip().splitlines()[-12:])
    if done.returncode == -signal.SIGSEGV:
        return f"{target.name}: the process that loaded it died of SIGSEGV. {_REGEX_CLASH}\n{last}"
    if "Could not find schema" in last or "Could not find operator" in last:
        return f"{target.name}: it calls an operator that only Python defines, so it is not self-contained\n{last}"
    return f"{target.name}: the process that loaded it ended with {done.returncode}\n{last}"


def _compare(expected: _Results, actual: _Results) -> None:
    for what, want, got in zip(("output", "argument", "keyword argument"), expected, actual, strict=True):
        want, got = tree_flatten(want)[0], tree_flatten(got)[0]
        for position, (one, other) in enumerate(zip(want, got, strict=True)):
            if isinstance(one, Tensor):
                _compare_tensors(f"{what} {position}", one, other)


def _compare_tensors(what: str, want: Tensor, got: Tensor) -> None:
    if want.shape != got.shape or want.dtype != got.dtype:
        raise PackageError(f"{what}: got {got.dtype}{list(got.shape)}, expected {want.dtype}{list(want.shape)}")
    if not want.is_floating_point():
        if not torch.equal(want, got):
            raise PackageError(f"{what}: the package gives other values than the program")
        return
    if want.numel():
        # Compiled arithmetic is reordered and contracted: half of the digits must agree.
        allowed = torch.finfo(want.dtype).eps ** 0.5 * float(want.abs().max())
        worst = float((want.double() - got.double()).abs().max())
        if not worst <= allowed:
            raise PackageError(f"{what}: off by {worst:.3e}, allowed {allowed:.3e}")


__all__ = ["PackageError", "backends_of", "package"]
