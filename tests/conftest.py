"""Fixtures and skips that all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory holds NaN, so that what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """The code of a graph shows only where it is compiled, and choices only where they are made."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    graphs = inductor.patch(fx_graph_cache=False, autotune_local_cache=False)
    with torch.no_grad(), graphs, functorch.patch(enable_autograd_cache=False):
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
