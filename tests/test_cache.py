"""Two processes, one Inductor cache directory: never a stale result, and a warm start when nothing changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).parent.parent / "torch_mamba_ops"

PROGRAM = """
import json, torch
from torch._dynamo.utils import counters
import torch_mamba_ops as tmo
{backend}
compiled = torch.compile(lambda x, w: tmo.rms_norm_gated(x, w{choice}), fullgraph=True)
result = float(compiled(torch.ones(2, 4), torch.ones(4)).mean())
caches = {{**counters["inductor"], **counters["aot_autograd"]}}
print(json.dumps({{"result": round(result, 4), "caches": caches}}))
"""

USER_BACKEND = """
{helper}
@tmo.register_backend("rms_norm_gated", "mine", trace="{trace}")
def mine(x, weight):
    return x * weight * {factor}
"""


def _run(cache: Path, backend: str = "", choice: str = "", path: Path | None = None) -> dict[str, Any]:
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
        "PYTHONPATH": str(path or PACKAGE.parent),
    }
    program = cache.parent / "program.py"
    program.write_text(PROGRAM.format(backend=backend, choice=choice))
    done = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def _warm(told: dict[str, Any]) -> bool:
    caches = told["caches"]
    hits = caches.get("autograd_cache_hit", 0) + caches.get("fxgraph_cache_hit", 0)
    return bool(hits) and not caches.get("fxgraph_cache_miss", 0)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "inductor"
    folder.mkdir()
    return folder


def _mine(factor: str, trace: str = "inline", helper: str = "") -> dict[str, str]:
    return {
        "backend": USER_BACKEND.format(factor=factor, trace=trace, helper=helper),
        "choice": ", backend='mine'",
    }


@pytest.mark.parametrize("trace", ["inline", "opaque"])
def test_a_users_backend_with_another_source(cache: Path, trace: str) -> None:
    assert _run(cache, **_mine("2.0", trace))["result"] == 2
    again = _run(cache, **_mine("2.0", trace))
    assert again["result"] == 2 and _warm(again), again
    assert _run(cache, **_mine("3.0", trace))["result"] == 3


def test_a_users_backend_whose_helper_or_constant_changes(cache: Path) -> None:
    assert _run(cache, **_mine("helper()", helper="def helper(): return FACTOR\nFACTOR = 2.0"))["result"] == 2
    again = _run(cache, **_mine("helper()", helper="def helper(): return FACTOR\nFACTOR = 2.0"))
    assert again["result"] == 2 and _warm(again), again
    assert _run(cache, **_mine("helper()", helper="def helper(): return FACTOR\nFACTOR = 3.0"))["result"] == 3
    assert _run(cache, **_mine("helper()", helper="def helper(): return 2 * FACTOR\nFACTOR = 3.0"))["result"] == 6


def test_a_users_backend_in_a_module_of_its_own(cache: Path, tmp_path: Path) -> None:
    library = tmp_path / "library"
    library.mkdir()
    mine = _mine("library_of_mine.factor()", helper="import library_of_mine")
    path = Path(os.pathsep.join([str(PACKAGE.parent), str(library)]))
    for factor in (2, 2, 3):
        (library / "library_of_mine.py").write_text(f"def factor():\n    return {factor}.0\n")
        told = _run(cache, **mine, path=path)
        assert told["result"] == factor


def test_another_choice(cache: Path) -> None:
    assert _run(cache, **_mine("2.0"))["result"] == 2
    assert _run(cache, backend=_mine("2.0")["backend"])["result"] == 1
    assert _run(cache, **_mine("2.0"))["result"] == 2


def test_a_built_in_backend_with_another_source(cache: Path, tmp_path: Path) -> None:
    copy = tmp_path / "edited"
    shutil.copytree(PACKAGE, copy / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    assert _run(cache, path=copy)["result"] == 1
    again = _run(cache, path=copy)
    assert again["result"] == 1 and _warm(again), again
    source = copy / PACKAGE.name / "ops" / "rms_norm_gated" / "reference.py"
    text = source.read_text()
    edited = text.replace("return y.to(x.dtype)", "return (5 * y).to(x.dtype)")
    assert edited != text
    source.write_text(edited)
    assert _run(cache, path=copy)["result"] == 5
