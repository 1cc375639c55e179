"""The house: which module may import which, what importing the package loads, what every operation has."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from torch_mamba_ops.dispatch import OPS
from torch_mamba_ops.testing import cases, oracle

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "torch_mamba_ops"
OPERATIONS = sorted(folder.name for folder in (PACKAGE / "ops").iterdir() if (folder / "op.py").exists())


def _imports(path: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports, anywhere in it."""
    inside = [*path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1] if node.level else []
            yield ".".join([*base, *([node.module] if node.module else [])])


def _ours(path: Path) -> list[str]:
    return [name.removeprefix("torch_mamba_ops.") for name in _imports(path) if name.startswith("torch_mamba_ops")]


@pytest.mark.parametrize("path", sorted((PACKAGE / "dispatch").glob("*.py")), ids=lambda path: path.stem)
def test_dispatch_knows_no_operation(path: Path) -> None:
    assert all(name.startswith("dispatch") for name in _ours(path))


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "ops").rglob("*.py")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_operations_know_only_dispatch_and_each_other(path: Path) -> None:
    assert all(name.split(".")[0] in ("dispatch", "ops", "tuning") for name in _ours(path))


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_contract_needs_torch_and_dispatch_alone_and_backends_do_not_know_each_other(name: str) -> None:
    folder = PACKAGE / "ops" / name
    backends = [path for path in folder.glob("*.py") if path.stem not in ("__init__", "op", "cases")]
    shared = {path.stem for path in (PACKAGE / "ops").glob("*.py")}
    for path in (folder / "op.py", *backends):
        for module in _ours(path):
            parts = module.split(".")
            own_kernels = parts[1:] in ([name], [name, "kernels"]) and path.stem == "triton"
            down = parts[0] in ("dispatch", "tuning") or own_kernels or (len(parts) == 2 and parts[1] in shared)
            assert down, f"{path.name} imports {module}"
    outside = {module.split(".")[0] for module in _imports(folder / "op.py")} - {"torch_mamba_ops", "torch", ""}
    assert outside <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_whole(name: str) -> None:
    op = OPS[name]
    text = inspect.getdoc(op.function) or ""
    assert "Args:" in text and "Raises:" in text
    parameters = inspect.signature(op.function).parameters
    assert "backend" in parameters and parameters["backend"].kind is inspect.Parameter.KEYWORD_ONLY
    for parameter in parameters:
        assert re.search(rf"^\s+{parameter}: ", text, re.MULTILINE), f"{parameter} is not in the docstring"
    assert "reference" in op.backends and op.auto[-1] == "reference"
    assert cases(name) and cases(name, "opcheck") and cases(name, "model")
    names = [case.name for tag in ("small", "model") for case in cases(name, tag)]
    assert len(names) == len(set(names))
    assert callable(oracle(name))


def test_the_registry_and_the_folders_agree() -> None:
    assert sorted(OPS) == OPERATIONS


def test_importing_loads_nothing_optional_and_little_else() -> None:
    program = """
import sys, time, torch
before = set(sys.modules)
import torch_mamba_ops
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
heavy = {"triton", "flashinfer", "transformers", "torch._inductor", "torch._dynamo"} & (set(sys.modules) - before)
assert not heavy, heavy
print(sorted(loaded - set(sys.stdlib_module_names)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("['torch_mamba_ops']", "['torch', 'torch_mamba_ops']")


def test_the_wheel_is_whole(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "torch_mamba_ops/py.typed" in names and wheel.name.endswith("-py3-none-any.whl")
    sources = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")}
    assert sources <= names


def test_the_command_line_tells_what_is_here() -> None:
    command = [sys.executable, "-m", "torch_mamba_ops"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert all(name in told for name in OPERATIONS) and "->reference" in told
    explained = [*command, "explain", "selective_state_update", "--case", "nemotron_h_8b"]
    told = subprocess.run(explained, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "-> reference: can run it" in told
