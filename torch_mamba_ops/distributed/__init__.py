"""More than one device: the operators on DTensors, tensor-parallel layers, states moved between sizes.

Importing it registers the sharding rules.
"""

from .reshard import Moved, ReshardPlan
from .sharding import register
from .tensor_parallel import Mamba2Parallel

register()

__all__ = ["Mamba2Parallel", "Moved", "ReshardPlan", "register"]
