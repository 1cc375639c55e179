"""The convolution's decode step as a template, and what the eager kernel would be started with."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate

from torch_mamba_ops.dispatch import operation
from torch_mamba_ops.ops.causal_conv1d_update import kernels

from .plan import STAGES, Plan, known
from .sources import source_of

_NAME = "causal_conv1d_update"
_eager = importlib.import_module(f"torch_mamba_ops.ops.{_NAME}.triton")

# The kernel's arguments by the operator's. A call's tensors are a choice of these, in this order.
TENSORS = {"pages": "conv_state", "x": "x", "weight": "weight", "bias": "bias", "slots": "conv_state_indices"}
ALWAYS = ("pages", "x", "weight")
_CONSTANTS = (
    *("dim", "pad_slot_id", "slot_stride", "column_stride", "WIDTH", "COLUMNS", "COLUMNS_INNERMOST"),
    *("HAS_BIAS", "HAS_INDICES", "SILU", "GROUP"),
)
_CONFIG = ("SEQUENCES", "GROUPS", "num_warps")

# As in the eager kernel, in its order. Where kernels overlap it waits and signals like the state's template.
_ENTRY = r"""
{% set optional = [("bias", HAS_BIAS), ("slots", HAS_INDICES)] %}
{% set given = optional | selectattr(1) | map(attribute=0) | list %}
{{def_kernel("pages", "x", "weight", *given)}}
    batch = {{size("x", 0)}}
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[:, None]
    lane = tl.arange(0, GROUP)[None, :]
    inside = group < dim // GROUP
    group = tl.minimum(group, dim // GROUP - 1)
    channel = group * GROUP + lane
{% if OVERLAPS %}
    tl.extra.cuda.gdc_wait()
{% endif %}
    sequences = ()
    for i in tl.static_range(SEQUENCES):
        sequence = tl.program_id(0).to(tl.int64) * SEQUENCES + i
        present = sequence < batch
        sequence = tl.minimum(sequence, batch - 1)
        slot = sequence
        valid = present
{% if HAS_INDICES %}
        slot = tl.load(slots + sequence * ({{stride("slots", 0)}})).to(tl.int64)
        valid = present & (slot != pad_slot_id)
{% endif %}
        sequences += ((sequence, pages + slot * slot_stride, present, valid),)
    weights = read_groups(weight, group, lane, True, WIDTH, GROUP, False)
    shift = weights[0]
{% if HAS_BIAS %}
    shift = tl.load(bias + channel)
{% endif %}
    tokens = ()
    for i in tl.static_range(SEQUENCES):
        sequence, page, present, valid = sequences[i]
        tokens += (tl.load(x + sequence * ({{stride("x", 0)}}) + channel),)
    columns_of = ()
    for i in tl.static_range(SEQUENCES):
        sequence, page, present, valid = sequences[i]
        columns_of += (read_page(page, group, lane, valid, column_stride, COLUMNS, COLUMNS_INNERMOST, GROUP),)
    tl.debug_barrier()
    taps = dealt(weights, WIDTH, GROUP)
    for i in tl.static_range(SEQUENCES):
        sequence, page, present, valid = sequences[i]
        columns = columns_of[i]
        if COLUMNS_INNERMOST:
            columns = dealt(columns, COLUMNS, GROUP)
        y = convolved(columns, tokens[i], taps, shift, valid, WIDTH, COLUMNS, HAS_BIAS, SILU)
        there = inside & present
        # What follows may read by sequence alone: a whole tile, like the channels.
        nth = tl.full((GROUPS, GROUP), 0, INDEX_DTYPE) + sequence.to(INDEX_DTYPE)
        {{store_output(("nth", "channel"), "y", "there", indent_width=8, val_shape=("GROUPS", "GROUP"))}}
{% if SIGNALS %}
        if i == SEQUENCES - 1:
            tl.extra.cuda.gdc_launch_dependents()
{% endif %}
        write_page(
            page, columns, tokens[i], group, lane, inside & valid, column_stride, COLUMNS, COLUMNS_INNERMOST, GROUP
        )
"""


def plan(nodes: Mapping[str, Any], arguments: Mapping[str, Any]) -> Plan:
    """Of a call, by the names of its arguments: as Inductor represents them, and as `as_tensor` makes them tensors."""
    tensors = [arguments[name] for name in operation(_NAME).tensors]
    x, state = arguments["x"], arguments["conv_state"]
    made = _eager.plan(*tensors, x.new_empty(x.shape), arguments["activation"], arguments["pad_slot_id"]).options
    constants = {name: known(made[name]) for name in _CONSTANTS}
    config = {name: made[name] for name in _CONFIG} | {"num_stages": made.get("num_stages", STAGES)}
    return Plan(_NAME, state, arguments, (nodes["x"].get_size()[0], constants["dim"]), constants, config)


@SymbolicGridFn
def _grid(batch: Any, dim: Any, constants: dict[str, Any], *, cdiv: Callable[..., Any]) -> Any:
    return cdiv(batch, constants["SEQUENCES"]), cdiv(dim, constants["GROUPS"] * constants["GROUP"]), 1


CONVOLVE = TritonTemplate(
    name=f"torch_mamba_ops_{_NAME}",
    grid=_grid,
    source=_ENTRY
    + source_of(kernels.read_groups, kernels.read_page, kernels.dealt, kernels.convolved, kernels.write_page),
)
