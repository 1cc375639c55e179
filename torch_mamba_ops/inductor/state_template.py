"""The state's decode step as a template, and what the eager kernel would be started with.

Inductor writes the output, so that it can write what follows from it as well.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate

from torch_mamba_ops.dispatch import operation
from torch_mamba_ops.ops.selective_state_update import kernels

from .plan import STAGES, Plan, known
from .sources import source_of

_NAME = "selective_state_update"
_eager = importlib.import_module(f"torch_mamba_ops.ops.{_NAME}.triton")

# The kernel's arguments by the operator's. A call's tensors are a choice of these, in this order.
TENSORS = {
    "state": "state",
    "x": "x",
    "dt": "dt",
    "A": "A",
    "B": "B",
    "C": "C",
    "D": "D",
    "z": "z",
    "dt_bias": "dt_bias",
    "read_slots": "state_batch_indices",
    "write_slots": "dst_state_batch_indices",
    "rand_seed": "rand_seed",
}
ALWAYS = ("state", "x", "dt", "A", "B", "C")
# Of the eager kernel's arguments, those that the template takes: numbers, and whether something is there or done.
_CONSTANTS = (
    *("heads", "head_dim", "pad_slot_id", "N", "RATIO", "ROUNDS"),
    *("STATE_HEAD", "STATE_DIM", "STATE_N", "X_HEAD", "X_DIM", "DT_HEAD", "DT_DIM", "A_HEAD", "A_DIM", "A_N"),
    *("B_GROUP", "B_N", "C_GROUP", "C_N", "D_HEAD", "D_DIM", "Z_HEAD", "Z_DIM", "DT_BIAS_HEAD", "DT_BIAS_DIM"),
)
_FLAGS = ("DT_SOFTPLUS", "TIED", "HAS_D", "HAS_Z", "HAS_DT_BIAS", "HAS_SLOTS", "ELSEWHERE", "STOCHASTIC")

# As in the eager kernel: slots and sequences in 64 bits, tiles in 32, the inputs read while the slot is on its way, and
# the output written before the state. A padded sequence does not return: what follows is computed for its zeros too.
# Where kernels overlap, this one waits for those before it. The next may begin after the last read, not before: some
# write without waiting, and that memory may be what was read here. Programs that are done count as having said so.
_ENTRY = r"""
{% set optional = [("D", HAS_D), ("z", HAS_Z), ("dt_bias", HAS_DT_BIAS), ("read_slots", HAS_SLOTS),
                   ("write_slots", ELSEWHERE), ("rand_seed", STOCHASTIC)] %}
{% set given = optional | selectattr(1) | map(attribute=0) | list %}
{{def_kernel("state", "x", "dt", "A", "B", "C", *given)}}
{% for name, here in optional if not here %}
    {{name}} = None
{% endfor %}
    head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    group = head // RATIO
    channel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    in_p = tl.full((BLOCK_P,), True, tl.int1)
    in_n = tl.full((BLOCK_N,), True, tl.int1)
    if head_dim % BLOCK_P != 0:
        in_p = channel < head_dim
    if N != BLOCK_N:
        in_n = n < N
    tile = in_p[:, None] & in_n[None, :]
    x += sequence * ({{stride("x", 0)}}) + head * X_HEAD
    dt += sequence * ({{stride("dt", 0)}}) + head * DT_HEAD
    B += sequence * ({{stride("B", 0)}}) + group * B_GROUP
    C += sequence * ({{stride("C", 0)}}) + group * C_GROUP
{% if HAS_Z %}
    z += sequence * ({{stride("z", 0)}}) + head * Z_HEAD
{% endif %}
{% if OVERLAPS %}
    tl.extra.cuda.gdc_wait()
{% endif %}
    slot = sequence
    there = True
{% if HAS_SLOTS %}
    slot = tl.load(read_slots + sequence * ({{stride("read_slots", 0)}})).to(tl.int64)
    there = slot != pad_slot_id
{% endif %}
    rate, skip, bias = read_head(
        A, D, dt_bias, head, channel, n, in_p, tile, A_HEAD, A_DIM, A_N, D_HEAD, D_DIM, DT_BIAS_HEAD, DT_BIAS_DIM,
        TIED, HAS_D, HAS_DT_BIAS,
    )
    inputs, step, to_state, from_state, gate = read_token(
        x, dt, B, C, z, bias, channel, n, in_p, in_n, True,
        X_DIM, DT_DIM, B_N, C_N, Z_DIM, DT_SOFTPLUS, TIED, HAS_Z, HAS_DT_BIAS,
    )
    state += head * STATE_HEAD
    at = channel[:, None] * STATE_DIM + n[None, :] * STATE_N
    values = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    y = tl.zeros((BLOCK_P,), tl.float32)
    if there:
        values = tl.load(state + slot * ({{stride("state", 0)}}) + at, tile, 0.0).to(tl.float32)
        values, y = update(values, inputs, step, rate, to_state, from_state, skip, gate, TIED, HAS_D, HAS_Z)
    # What follows may read by sequence or head alone: whole tiles, like the channels.
    nth_sequence = tl.full((BLOCK_P,), 0, INDEX_DTYPE) + tl.program_id(2)
    nth_head = tl.full((BLOCK_P,), 0, INDEX_DTYPE) + head
{% if MAMBA1 %}
    {{store_output(("nth_sequence", "channel"), "y", "in_p", val_shape=("BLOCK_P",))}}
{% else %}
    {{store_output(("nth_sequence", "nth_head", "channel"), "y", "in_p", val_shape=("BLOCK_P",))}}
{% endif %}
{% if WRITES %}
    if there:
        wanted = tile
        seed = 0
{% if ELSEWHERE %}
        slot = tl.load(write_slots + sequence * ({{stride("write_slots", 0)}})).to(tl.int64)
        wanted = tile & (slot != pad_slot_id)
{% endif %}
{% if STOCHASTIC %}
        seed = tl.load(rand_seed)
{% endif %}
{% if SIGNALS %}
        tl.extra.cuda.gdc_launch_dependents()
{% endif %}
        store_state(
            state + slot * ({{stride("state", 0)}}), values, at, slot, heads, head, head_dim, channel, wanted, seed,
            N, BLOCK_N, STOCHASTIC, ROUNDS,
        )
{% endif %}
"""


def plan(nodes: Mapping[str, Any], arguments: Mapping[str, Any]) -> Plan:
    """Of a call, by the names of its arguments: as Inductor represents them, and as `as_tensor` makes them tensors."""
    tensors = [arguments[name] for name in operation(_NAME).tensors]
    options = [arguments[n] for n in ("dt_softplus", "pad_slot_id", "disable_state_update", "philox_rounds")]
    x, state = arguments["x"], arguments["state"]
    made = _eager.plan(*tensors, x.new_empty(x.shape), *options).options
    config = {name: made[name] for name in ("BLOCK_P", "BLOCK_N", "num_warps")}
    constants = {name: known(made[name]) for name in (*_CONSTANTS, *_FLAGS)}
    constants |= {"WRITES": made["WRITE"] != "none", "MAMBA1": state.dim() == 3}
    sizes = (nodes["x"].get_size()[0], constants["heads"], constants["head_dim"])
    config |= {"num_stages": made.get("num_stages", STAGES)}
    return Plan(_NAME, state, arguments, sizes, constants, config)


@SymbolicGridFn
def _grid(batch: Any, heads: Any, head_dim: Any, constants: dict[str, Any], *, cdiv: Callable[..., Any]) -> Any:
    return cdiv(head_dim, constants["BLOCK_P"]), heads, batch


DECODE = TritonTemplate(
    name=f"torch_mamba_ops_{_NAME}",
    grid=_grid,
    source=_ENTRY + source_of(kernels.read_head, kernels.read_token, kernels.update, kernels.store_state),
)
