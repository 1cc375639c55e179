"""What Inductor makes of the operator: a template if that covers the call, else a call of the operator."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch._inductor import config, ir
from torch._inductor.lowering import (
    add_layout_constraint,
    constrain_to_fake_tensors,
    fallback_handler,
    register_lowering,
)
from torch._inductor.select_algorithm import AlgorithmSelectorCache, autotune_select_algorithm

from torch_mamba_ops.dispatch import operation

from . import candidates, flashinfer, scratch
from .plan import Plan, as_tensor, plan
from .rule import overlaps_kernels, why_not
from .template import ALWAYS, DECODE, TENSORS

_log = logging.getLogger("torch_mamba_ops.inductor")
_OP = operation("selective_state_update")
# torch 2.11 has to be asked for the choice beside the result.
_ASK = {"return_choice": True} if "return_choice" in signature(AlgorithmSelectorCache.__call__).parameters else {}


def register() -> None:
    """Makes `lower` the operator's lowering; inputs keep the strides they were traced with, as without a lowering."""
    add_layout_constraint(_OP.overload, constrain_to_fake_tensors)
    register_lowering(_OP.overload, type_promotion_kind=None)(lower)


def lower(*tensors: Any, **options: Any) -> Any:
    """Takes the operator's arguments, with tensors in Inductor's representation; ``state`` is mutated."""
    given = dict(zip(_OP.tensors, tensors, strict=False)) | options  # a graph may name tensors, too
    backend = _OP.resolve(given["backend"]).name
    if backend == "triton":
        given |= {name: _realized(given[name]) for name in _OP.tensors if given[name] is not None}
        arguments = given | {name: as_tensor(given[name]) for name in _OP.tensors if given[name] is not None}
        if not why_not(backend, arguments):
            return _template(given, plan(given, arguments))
    return _call(given)


def _call(given: Mapping[str, Any]) -> Any:
    call = fallback_handler(_OP.overload, add_to_fallback_set=False)
    return call(*map(given.get, _OP.tensors), **{name: given[name] for name in (*_OP.options, "backend")})


def _template(given: Mapping[str, Any], made: Plan) -> Any:
    names = [name for name, argument in TENSORS.items() if name in ALWAYS or given[argument] is not None]
    nodes = [given[TENSORS[name]] for name in names]
    size = [made.sizes[0], *made.arguments["x"].shape[1:]]
    strides = ir.FlexibleLayout.contiguous_strides(size)
    layout = ir.FixedLayout(given["x"].get_device(), given["x"].get_dtype(), size, strides)
    overlaps = overlaps_kernels()
    compare = config.max_autotune and not config.deterministic
    choices: list[Any] = []
    for candidate in candidates.configs(made) if compare else [made.config]:
        error = DECODE.maybe_append_choice(
            choices,
            input_nodes=nodes,
            layout=layout,
            mutated_inputs=[nodes[0]],
            call_sizes=made.sizes,
            triton_meta={"launch_pdl": True} if overlaps else None,
            OVERLAPS=overlaps,
            **made.constants,
            **candidate,
        )
        if error is not None:
            _log.warning("%s: no template with %s: %s", made, candidate, error)
    if not choices:
        return _call(given)  # the same kernel, started from Python
    if compare:
        flashinfer.append_choice(choices, made, [TENSORS[name] for name in names], nodes, layout)
    if len(choices) == 1:
        _log.info("%s: %s", made, choices[0].description)
        return choices[0].output_node()
    return _fastest(made, choices, names, nodes, layout)


def _fastest(made: Plan, choices: list[Any], names: Sequence[str], nodes: Sequence[Any], layout: Any) -> Any:
    try:
        # Another process would draw its inputs itself, and slots at random.
        with config.patch(autotune_in_subproc=False):
            found = autotune_select_algorithm(
                _OP.name,
                choices,
                nodes,
                layout,
                input_gen_fns=scratch.generators(names, nodes, made.sequences),
                return_multi_template=False,  # which would choose later, and forget that the state is mutated
                **_ASK,
            )
    except torch.OutOfMemoryError:
        _log.warning("%s: not tuned, no memory for states to try it on; %s", made, choices[0].description)
        return choices[0].output_node()
    result, choice = found if isinstance(found, tuple) else (found, choices[0])
    _log.info("%s: %s %s, the fastest of %d", made, choice.name, choice.description, len(choices))
    return result


def _realized(value: Any) -> Any:
    node = ir.ExternKernel.realize_input(value)
    node.freeze_layout()
    return node
