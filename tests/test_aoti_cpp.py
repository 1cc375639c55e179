"""The C++ example: built with CMake, it generates the untouched model's tokens from a prefill and a decode package."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parent.parent / "examples" / "aoti_cpp"
LENGTHS = (40, 77, 6)  # the packages are made with the first; all share one set of loaded packages


def _run(*command: str, cwd: Path, given: str = "") -> str:
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.aoti
@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="cpu"),
        pytest.param(("--device", "cuda", "--portable"), marks=pytest.mark.gpu, id="cuda"),
    ],
)
def test_the_program_gives_the_models_tokens(options: tuple[str, ...], tmp_path: Path) -> None:
    draw = random.Random(13)  # of prompts after which no second token comes near the best (0.06 in the logits)
    prompts = "".join(" ".join(str(draw.randrange(3, 128)) for _ in range(length)) + "\n" for length in LENGTHS)
    script = str(EXAMPLE / "export_model.py")
    wanted = _run(sys.executable, script, ".", "12", *options, cwd=tmp_path, given=prompts)

    cmake = shutil.which("cmake") or str(Path(sys.executable).parent / "cmake")
    _run(cmake, "-S", str(EXAMPLE), "-B", "build", f"-DTORCH={torch.__path__[0]}", cwd=tmp_path)
    _run(cmake, "--build", "build", cwd=tmp_path)
    found = _run("build/generate", "prefill.pt2", "decode.pt2", "12", cwd=tmp_path, given=prompts)
    assert found.split("\n") == wanted.split("\n")
    assert len(wanted.split()) == 12 * len(LENGTHS)
    assert len(set(wanted.split())) > 12, "a model that always says the same would pass anything"
