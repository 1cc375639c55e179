"""The operations: one folder each, one line here each."""

from torch_mamba_ops.dispatch import OPS
from torch_mamba_ops.ops.copy_states import copy_states
from torch_mamba_ops.ops.rms_norm_gated import rms_norm_gated
from torch_mamba_ops.ops.selective_state_update import selective_state_update

__all__ = ["copy_states", "rms_norm_gated", "selective_state_update"]

for _op in OPS.values():
    _op.publish(globals()[_op.name])
