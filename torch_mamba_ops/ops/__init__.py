"""The operations: one folder each, one line here each."""

from torch_mamba_ops.dispatch import OPS
from torch_mamba_ops.ops.causal_conv1d_fn import causal_conv1d_fn
from torch_mamba_ops.ops.causal_conv1d_update import causal_conv1d_update
from torch_mamba_ops.ops.causal_conv1d_varlen_fn import causal_conv1d_varlen_fn
from torch_mamba_ops.ops.commit_states import commit_states
from torch_mamba_ops.ops.copy_states import copy_states
from torch_mamba_ops.ops.mamba_chunk_scan_combined import mamba_chunk_scan_combined
from torch_mamba_ops.ops.mamba_chunk_scan_combined_varlen import mamba_chunk_scan_combined_varlen
from torch_mamba_ops.ops.rms_norm_gated import rms_norm_gated
from torch_mamba_ops.ops.selective_scan_fn import selective_scan_fn
from torch_mamba_ops.ops.selective_state_update import selective_state_update

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "causal_conv1d_varlen_fn",
    "commit_states",
    "copy_states",
    "mamba_chunk_scan_combined",
    "mamba_chunk_scan_combined_varlen",
    "rms_norm_gated",
    "selective_scan_fn",
    "selective_state_update",
]

for _op in OPS.values():
    _op.publish(globals()[_op.name])
