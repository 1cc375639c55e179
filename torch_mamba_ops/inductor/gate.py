"""Whether the templates fit the torch that is installed: Inductor's interfaces are private and change."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging

import torch

_log = logging.getLogger("torch_mamba_ops.inductor")
_TESTED = ((2, 11), (2, 13))


@functools.cache
def ready() -> bool:
    """Registers the lowerings, once. Where they do not fit it says why, and calls are traced inline as without them."""
    reason = _why_not()
    if reason is None:
        try:
            importlib.import_module("torch_mamba_ops.inductor.lowering").register()
        except (ImportError, AttributeError, TypeError) as error:
            reason = f"torch {torch.__version__} lacks what they are made of: {error}"
    if reason is not None:
        _log.warning("Inductor's templates are not used, kernels enter graphs as they are (slower): %s", reason)
    return reason is None


def tested() -> bool:
    """Whether this package was run with this version of torch."""
    oldest, newest = _TESTED
    return oldest <= tuple(int(part) for part in torch.__version__.split(".")[:2]) <= newest


def _why_not() -> str | None:
    if not tested():
        versions = " to ".join(".".join(map(str, end)) for end in _TESTED)
        return f"they are tested with torch {versions}, and this is {torch.__version__}"
    if importlib.util.find_spec("jinja2") is None:
        return "they need jinja2, which is not installed: pip install jinja2"
    return None
