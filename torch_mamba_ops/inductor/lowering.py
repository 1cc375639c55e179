"""What Inductor makes of a decode operator: a template if that covers the call, else a call of the operator."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch._inductor import config, ir
from torch._inductor.lowering import add_layout_constraint, fallback_handler, register_lowering
from torch._inductor.select_algorithm import AlgorithmSelectorCache, TritonTemplate, autotune_select_algorithm
from torch._inductor.virtualized import V

from torch_mamba_ops.dispatch import operation
from torch_mamba_ops.dispatch.op import Op

from . import candidates, conv_template, flashinfer, scratch, state_template
from .inputs import constrain, contiguous, mutated, realized
from .plan import Plan, as_tensor
from .rule import RULES, overlaps_kernels

_log = logging.getLogger("torch_mamba_ops.inductor")
# torch 2.11 has to be asked for the choice beside the result.
_ASK = {"return_choice": True} if "return_choice" in signature(AlgorithmSelectorCache.__call__).parameters else {}


@dataclass(frozen=True)
class _Step:
    """An operator that becomes a template.

    Attributes:
        op: the operator.
        template: Inductor's.
        tensors: the template's tensors by the operator's, the state first.
        always: those that no call lacks.
        plan: makes the `Plan` of a call.
        configs: those that ``max_autotune`` compares, the eager kernel's first; None: it has nothing to compare.
        others: appends choices that are no templates.
    """

    op: Op
    template: TritonTemplate
    tensors: Mapping[str, str]
    always: Sequence[str]
    plan: Callable[[Mapping[str, Any], Mapping[str, Any]], Plan]
    configs: Callable[[Plan], Sequence[dict[str, Any]]] | None = None
    others: Callable[..., None] | None = None


STEPS = (
    _Step(
        operation("selective_state_update"), state_template.DECODE, state_template.TENSORS, state_template.ALWAYS,
        state_template.plan, candidates.configs, flashinfer.append_choice,
    ),
    _Step(
        operation("causal_conv1d_update"), conv_template.CONVOLVE, conv_template.TENSORS, conv_template.ALWAYS,
        conv_template.plan,
    ),
)  # fmt: skip


def register() -> None:
    """Makes `lower` the operators' lowering."""
    for step in STEPS:
        add_layout_constraint(step.op.overload, functools.partial(constrain, step.op))
        register_lowering(step.op.overload, type_promotion_kind=None)(functools.partial(lower, step))


def lower(step: _Step, *tensors: Any, **options: Any) -> Any:
    """Takes the operator's arguments, with tensors in Inductor's representation; the state is mutated."""
    names = step.op.tensors
    given = dict(zip(names, tensors, strict=False)) | options  # a graph may name tensors, too
    backend = step.op.resolve(given["backend"]).name
    if backend == "triton":
        states = mutated(step.op)
        given |= {name: realized(given[name], name in states) for name in names if given[name] is not None}
        arguments = given | {name: as_tensor(given[name]) for name in names if given[name] is not None}
        reasons = RULES[step.op.name](backend, arguments)
        if reasons:  # Inductor may have computed x in another order than eager mode does
            given["x"] = contiguous(given["x"])
            arguments["x"] = as_tensor(given["x"])
            reasons = RULES[step.op.name](backend, arguments)
        if not reasons:
            return _template(step, given, step.plan(given, arguments))
        _log.info("%s: called as an operator: %s", step.op.name, "; ".join(reasons))
    return _call(step, given)


def _call(step: _Step, given: Mapping[str, Any]) -> Any:
    call = fallback_handler(step.op.overload, add_to_fallback_set=False)
    return call(*map(given.get, step.op.tensors), **{name: given[name] for name in (*step.op.options, "backend")})


def _template(step: _Step, given: Mapping[str, Any], made: Plan) -> Any:
    names = [name for name, argument in step.tensors.items() if name in step.always or given[argument] is not None]
    nodes = [given[step.tensors[name]] for name in names]
    size = [made.sizes[0], *made.arguments["x"].shape[1:]]
    strides = ir.FlexibleLayout.contiguous_strides(size)
    layout = ir.FixedLayout(given["x"].get_device(), given["x"].get_dtype(), size, strides)
    overlaps = overlaps_kernels()
    signals = overlaps and not _state_is_read(step)
    configs = step.configs if config.max_autotune and not config.deterministic else None
    choices: list[Any] = []
    for candidate in [made.config] if configs is None else configs(made):
        error = step.template.maybe_append_choice(
            choices,
            input_nodes=nodes,
            layout=layout,
            mutated_inputs=[nodes[0]],
            call_sizes=made.sizes,
            triton_meta={"launch_pdl": True} if overlaps else None,
            OVERLAPS=overlaps,
            SIGNALS=signals,
            **made.constants,
            **candidate,
        )
        if error is not None:
            _log.warning("%s: no template with %s: %s", made, candidate, error)
    if not choices:
        return _call(step, given)  # the same kernel, started from Python
    if step.others is not None and configs is not None:
        step.others(choices, made, [step.tensors[name] for name in names], nodes, layout)
    if len(choices) == 1:
        _log.info("%s: %s", made, choices[0].description)
        return choices[0].output_node()
    return _fastest(made, choices, names, nodes, layout)


def _state_is_read(step: _Step) -> bool:
    """Whether another kernel of the graph may read the state. Inductor has a kernel wait for the one before it where it
    reads that one's output, and does not count what a template mutates."""
    templates = {other.op.overload for other in STEPS}
    place, node = step.op.mutated[0], V.graph.current_node
    state: Any = node.args[place] if place < len(node.args) else node.kwargs[step.op.tensors[place]]
    while _is_view(state):
        state = state.args[0]
    waiting: list[torch.fx.Node] = [state]
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if _is_view(user):
                waiting.append(user)
            elif user.op != "output" and user.target not in templates and user.args[:2] != (node, node):
                return True  # all but a copy to itself, which stands for the update in place
    return False


def _is_view(node: torch.fx.Node) -> bool:
    return bool(getattr(node.target, "is_view", False))


def _fastest(made: Plan, choices: list[Any], names: Sequence[str], nodes: Sequence[Any], layout: Any) -> Any:
    try:
        # Another process would draw its inputs itself, and slots at random.
        with config.patch(autotune_in_subproc=False):
            found = autotune_select_algorithm(
                made.name,
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
