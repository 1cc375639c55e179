"""The C++ example: built with CMake, it decodes the tokens that the Python model gives."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parent.parent / "examples" / "aoti_cpp"


def _run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.aoti
def test_the_program_gives_the_models_tokens(tmp_path: Path) -> None:
    cmake = shutil.which("cmake") or str(Path(sys.executable).parent / "cmake")
    python = _run(sys.executable, str(EXAMPLE / "export_decode.py"), "decode.pt2", "7", "12", cwd=tmp_path)
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    _run(cmake, "-S", str(EXAMPLE), "-B", "build", "-DCMAKE_BUILD_TYPE=Release", prefix, cwd=tmp_path)
    _run(cmake, "--build", "build", cwd=tmp_path)
    tokens = _run("build/decode", "decode.pt2", "7", "12", cwd=tmp_path).split()
    assert tokens == python.split()[-12:]
    assert len(set(tokens)) > 1, "a decoder that always says the same would pass anything"
