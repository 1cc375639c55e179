"""The calls that serving makes for a layer: one for each variant of an operation that is compiled apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch

from torch_mamba_ops.startup.scratch import Arguments, Scratch, Size

if TYPE_CHECKING:
    from torch_mamba_ops.state import MambaStateSpec

# The same tokens for each sequence; rows of a dense batch; sequences of any length side by side.
Phase = Literal["decode", "dense", "packed"]


@dataclass(frozen=True)
class Call:
    """One variant of an operation.

    Attributes:
        op: the operation.
        variant: what it is for, in words.
        phase: how its batches are made up.
        arguments: makes those of the public function.
    """

    op: str
    variant: str
    phase: Phase
    arguments: Callable[[torch.device, Size], Arguments]


def calls_of(spec: MambaStateSpec, dtype: torch.dtype, *, pooled: bool) -> tuple[Call, ...]:
    """The calls for a layer.

    Args:
        spec: the layer.
        dtype: of activations and parameters; A is float32.
        pooled: whether states live in a pool of slots; else in a dense batch, one row a sequence.
    """

    def made(op: str, variant: str, phase: Phase, use: Callable[[Scratch], Arguments]) -> Call:
        return Call(op, variant, phase, lambda device, size: use(Scratch(spec, dtype, pooled, device, size)))

    if pooled:
        uses = (*_pooled_decode(spec), *_dense_prefill(spec, gates=(False,)), *_packed_prefill(spec), *_copies(spec))
    else:
        gates = (False, True) if spec.kind == "mamba2" else (False,)  # a norm takes the gate in some models
        uses = (*_dense_decode(spec, gates), *_dense_prefill(spec, gates))
    return tuple(made(*use) for use in uses)


_Use = tuple[str, str, Phase, Callable[[Scratch], Arguments]]
_INITIAL = {False: "", True: ", initial states"}
_GATE = {False: "", True: ", gate"}


def _dense_decode(spec: MambaStateSpec, gates: tuple[bool, ...]) -> Iterator[_Use]:
    yield "causal_conv1d_update", "decode", "decode", partial(Scratch.conv_update, tokens=1)
    for gate in gates if spec.kind != "short_conv" else ():
        step = partial(Scratch.state_update, tokens=1, gate=gate)
        yield "selective_state_update", f"decode{_GATE[gate]}", "decode", step


def _pooled_decode(spec: MambaStateSpec) -> Iterator[_Use]:
    for tokens in sorted({1, 1 + spec.speculative_tokens}):
        what = "decode" if tokens == 1 else f"decode, {tokens} tokens"
        yield "causal_conv1d_update", what, "decode", partial(Scratch.conv_update, tokens=tokens)
        if spec.kind != "short_conv":
            yield "selective_state_update", what, "decode", partial(Scratch.state_update, tokens=tokens)
            if tokens > 1:
                verify = partial(Scratch.verify, tokens=tokens)
                yield "selective_state_update", f"verify, {tokens} tokens", "decode", verify


def _dense_prefill(spec: MambaStateSpec, gates: tuple[bool, ...]) -> Iterator[_Use]:
    if spec.kind == "mamba1":
        yield "selective_scan_fn", "dense prefill", "dense", Scratch.selective_scan
    for initial, what in _INITIAL.items():
        yield "causal_conv1d_fn", f"dense prefill{what}", "dense", partial(Scratch.conv, initial=initial)
        for gate in gates if spec.kind == "mamba2" else ():
            scan = partial(Scratch.scan, initial=initial, gate=gate)
            yield "mamba_chunk_scan_combined", f"dense prefill{what}{_GATE[gate]}", "dense", scan


def _packed_prefill(spec: MambaStateSpec) -> Iterator[_Use]:
    if spec.kind == "mamba1":
        yield "selective_state_update", "packed prefill", "packed", Scratch.packed_state_update
    for initial, what in _INITIAL.items():
        yield (
            "causal_conv1d_varlen_fn",
            f"packed prefill{what}",
            "packed",
            partial(Scratch.packed_conv, initial=initial),
        )
        if spec.kind == "mamba2":
            scan = partial(Scratch.packed_scan, initial=initial)
            yield "mamba_chunk_scan_combined_varlen", f"packed prefill{what}", "packed", scan
    if spec.kind == "mamba2":
        scan = partial(Scratch.packed_scan, initial=True, computed=True)
        yield "mamba_chunk_scan_combined_varlen", "packed prefill, chunks of the whole prompt", "packed", scan


def _copies(spec: MambaStateSpec) -> Iterator[_Use]:
    for one_pool, what in ((True, "pages inside a pool"), (False, "pages between pools")):
        yield "copy_states", what, "decode", partial(Scratch.copy, one_pool=one_pool)
    if spec.speculative_tokens:
        for index, what in ((False, "commit"), (True, "commit at ends of blocks")):
            for buffer, where in ((True, "from a buffer"), (False, "from slots")):
                commit = partial(Scratch.commit, buffer=buffer, index=index)
                yield "commit_states", f"{what}, {where}", "decode", commit
