"""What torch finds out about kernels is remembered, for this package's alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torch_mamba_ops.ops import written

OURS = SimpleNamespace(__module__="torch_mamba_ops.ops.kernels", __name__="scale")
THEIRS = SimpleNamespace(__module__="theirs", __name__="scale")


class Analysis:
    """Says that ``out`` is written, and counts the questions."""

    def __init__(self, says: Any = ("out",)) -> None:
        self.says, self.asked = says, 0

    def __call__(self, kernel: Any, kwargs: Any, descriptors: Any) -> Any:
        self.asked += 1
        return list(self.says)


def _given(**changed: Any) -> dict[str, Any]:
    return {"out": torch.empty(3), "x": torch.empty(3), "size": 3, "BLOCK": 16} | changed


def _tuned(**kwargs: Any) -> SimpleNamespace:
    """As torch hands over a kernel with a number of warps."""
    return SimpleNamespace(fn=OURS, configs=[SimpleNamespace(kwargs=kwargs)])


def test_a_kernel_is_looked_at_once_for_arguments_of_a_kind() -> None:
    analysis = Analysis()
    remembered = written.remembering(analysis)
    for kernel in (OURS, _tuned(), _tuned()):
        assert remembered(kernel, _given(out=torch.empty(7)), {}) == ["out"]
    assert analysis.asked == 1


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"x": torch.empty(3).half()}, id="dtype"),
        pytest.param({"x": None}, id="none"),
        pytest.param({"BLOCK": 32}, id="constant"),
        pytest.param({"BLOCK": 16.0}, id="type"),
        pytest.param({"size": object()}, id="symbol"),
    ],
)
def test_arguments_of_another_kind_are_looked_at_again(other: dict[str, Any]) -> None:
    analysis = Analysis()
    remembered = written.remembering(analysis)
    remembered(OURS, _given(), {})
    remembered(OURS, _given(**other), {})
    remembered(_tuned(EXTRA=1), _given(), {})
    assert analysis.asked == 3


@pytest.mark.parametrize("kernel", [THEIRS, SimpleNamespace(fn=OURS, configs=[None, None])], ids=["theirs", "tuned"])
def test_other_kernels_are_left_alone(kernel: Any) -> None:
    analysis = Analysis()
    remembered = written.remembering(analysis)
    for _ in range(2):
        remembered(kernel, _given(), {})
    remembered(OURS, _given(), {"x": "a descriptor"})
    remembered(OURS, _given(), {"x": "a descriptor"})
    assert analysis.asked == 4


def test_that_everything_is_written_is_what_a_failure_says_and_not_remembered() -> None:
    analysis = Analysis(says=("out", "x"))
    remembered = written.remembering(analysis)
    for _ in range(2):
        remembered(OURS, _given(), {})
    assert analysis.asked == 2
    analysis.says = ("out",)
    assert remembered(OURS, _given(), {}) == ["out"] == remembered(OURS, _given(), {})
    assert analysis.asked == 3


def test_this_torch_has_an_analysis_to_remember() -> None:
    from torch._higher_order_ops import triton_kernel_wrap

    written.remember()
    found = [name for name in written._ANALYSES if hasattr(triton_kernel_wrap, name)]
    assert len(found) == 1
    assert hasattr(getattr(triton_kernel_wrap, found[0]), "__wrapped__")
