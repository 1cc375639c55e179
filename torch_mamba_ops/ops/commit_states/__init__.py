"""States after the accepted tokens of a step, put where the next step reads them."""

from .op import commit_states
from .reference import commit_states as _reference  # noqa: F401 - registers the backend
from .triton import commit_states as _triton  # noqa: F401

__all__ = ["commit_states"]
