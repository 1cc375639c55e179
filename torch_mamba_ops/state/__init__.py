"""What an engine keeps around the operations: shapes of states, the pool of slots, planned copies."""

from .copy import StateCopyPlan, StatePlanError
from .pool import IntermediateStates, LayerStates, PoolExhaustedError, StatePool
from .spec import MambaStateSpec

__all__ = [
    "IntermediateStates",
    "LayerStates",
    "MambaStateSpec",
    "PoolExhaustedError",
    "StateCopyPlan",
    "StatePlanError",
    "StatePool",
]
