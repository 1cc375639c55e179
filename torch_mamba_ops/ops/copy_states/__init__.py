"""Many state blocks copied at once."""

from .op import copy_states
from .reference import copy_states as _reference  # noqa: F401 - registers the backend

__all__ = ["copy_states"]
