"""The Python of the README and of each page in docs/ runs as it stands, each page as one script in its own process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NOT_RUN = {"models.md": "needs a GPU and the weights of a model"}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LAUNCHERS = {"distributed.md": TORCHRUN}
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def _script(page: Path) -> str:
    """The page's blocks at the lines where they stand in it, so that a traceback names them."""
    text = page.read_text()
    lines = [""] * text.count("\n")
    for block in BLOCK.finditer(text):
        first = text.count("\n", 0, block.start(1))
        code = block[1].splitlines()
        lines[first : first + len(code)] = code
    return "\n".join(lines)


@pytest.mark.aoti
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    if page.name in NOT_RUN:
        pytest.skip(NOT_RUN[page.name])
    if not (code := _script(page)).strip():
        pytest.skip("no Python in it")
    script = tmp_path / f"{page.stem}.py"
    script.write_text(code)
    environment = {**os.environ, "TORCH_MAMBA_OPS_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, *LAUNCHERS.get(page.name, ()), str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_what_a_page_links_to_exists(page: Path) -> None:
    missing = [target for target in LINK.findall(page.read_text()) if not (page.parent / target).exists()]
    assert not missing
