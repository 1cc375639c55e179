"""Many state blocks copied at once."""

from .op import copy_states
from .reference import copy_states as _reference  # noqa: F401 - registers the backend
from .triton import copy_states as _triton  # noqa: F401

__all__ = ["copy_states"]
