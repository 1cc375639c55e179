"""How an operation finds the backend that runs it, in eager, under torch.compile and in exported programs."""

from .backend import Backend, register_backend
from .errors import BackendError, NoBackendError
from .op import NAMESPACE, OPS, Op, operation
from .report import Candidate, Explanation, backends, explain
from .selection import set_backend, use_backend

__all__ = [
    "NAMESPACE",
    "OPS",
    "Backend",
    "BackendError",
    "Candidate",
    "Explanation",
    "NoBackendError",
    "Op",
    "backends",
    "explain",
    "operation",
    "register_backend",
    "set_backend",
    "use_backend",
]
