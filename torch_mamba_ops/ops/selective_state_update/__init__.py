"""One decode step of Mamba1 and Mamba2 over a pool of states."""

from .op import selective_state_update

# isort: split

from .flashinfer import selective_state_update as _flashinfer  # noqa: F401 - registers the backend
from .reference import selective_state_update as _reference  # noqa: F401 - registers the backend
from .triton import selective_state_update as _triton  # noqa: F401 - registers the backend

__all__ = ["selective_state_update"]
