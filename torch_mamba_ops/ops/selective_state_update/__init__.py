"""One decode step of Mamba1 and Mamba2 over a pool of states."""

from .op import selective_state_update
from .reference import selective_state_update as _reference  # noqa: F401 - registers the backend

__all__ = ["selective_state_update"]
