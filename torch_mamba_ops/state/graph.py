"""What a `StateCopyPlan` does inside of a compiled graph: operators that name every layer's states as written.

Only so does the compiler keep a copy in its place between the layers' operations. It may hand over temporaries in place
of the layers' own memory: where it does not, and as a rule it does not, a copy is one launch for all layers; else it is
one for each. The operators are opaque to the compiler.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_mamba_ops.dispatch.op import NAMESPACE
from torch_mamba_ops.ops import commit_states, copy_states

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)


def copy_layers(
    layers: Sequence[Tensor],
    offsets: Sequence[int],
    sources: Sequence[Tensor],
    source_offsets: Sequence[int],
    words: Tensor,
    source_words: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    *,
    pad_slot_id: int,
    backend: str | None,
) -> None:
    """See `StateCopyPlan.copy`.

    Args:
        layers: all states of all layers, to be written.
        offsets: of each, bytes from ``words``, if it is in its own place.
        sources: all states of the pool to be read; empty: layers.
        source_offsets: like offsets.
        words: the pool, as in `StatePool.words`.
        source_words: the pool to be read.
        src_indices: as of `copy_states`.
        dst_indices: as of `copy_states`.
        pad_slot_id: as of `copy_states`.
        backend: as of `copy_states`.
    """
    options = {"pad_slot_id": pad_slot_id, "backend": backend}
    if _in_place(layers, offsets, words) and _in_place(sources, source_offsets, source_words):
        whole = words if not sources else source_words
        copy_states(whole, words, src_indices, dst_indices, **options)  # type: ignore[arg-type]
        return
    for source, layer in zip(sources or layers, layers, strict=True):
        copy_states(source, layer, src_indices, dst_indices, **options)  # type: ignore[arg-type]


def commit_layers(
    conv_states: Sequence[Tensor],
    conv_offsets: Sequence[int],
    ssm_states: Sequence[Tensor | None],
    ssm_offsets: Sequence[int],
    windows: Tensor,
    states: Tensor | None,
    src_indices: Tensor,
    dst_indices: Tensor,
    num_accepted_tokens: Tensor | None,
    accepted_index: Tensor | None,
    parents: Tensor | None,
    intermediate_layers: Sequence[Tensor],
    intermediate_offsets: Sequence[int],
    intermediate_states: Tensor | None,
    intermediate_indices: Tensor | None,
    *,
    conv_width: int,
    pad_slot_id: int,
    backend: str | None,
) -> None:
    """See `StateCopyPlan.commit`; the arguments are like those of `copy_layers` and `commit_states`."""
    rest = (src_indices, dst_indices, num_accepted_tokens)
    options = {
        "accepted_index": accepted_index,
        "parents": parents,
        "intermediate_indices": intermediate_indices,
        "conv_width": conv_width,
        "pad_slot_id": pad_slot_id,
        "backend": backend,
    }
    in_place = _in_place(conv_states, conv_offsets, windows)
    in_place = in_place and (states is None or _in_place(ssm_states, ssm_offsets, states))
    if intermediate_states is not None:
        in_place = in_place and _in_place(intermediate_layers, intermediate_offsets, intermediate_states)
    if in_place:
        commit_states(windows, states, *rest, intermediate_states=intermediate_states, **options)  # type: ignore[arg-type]
        return
    for window in conv_states:
        none = {"intermediate_indices": None}
        commit_states(window, None, *rest, **options | none)  # type: ignore[arg-type]
    for layer, state in enumerate(ssm_states):
        buffer = intermediate_layers[layer] if intermediate_layers else None
        commit_states(None, state, *rest, intermediate_states=buffer, **options)  # type: ignore[arg-type]


def offsets(tensors: Sequence[Tensor], whole: Tensor | None) -> list[int]:
    """Bytes from the first element of ``whole`` to the first of each."""
    return [] if whole is None else [tensor.data_ptr() - whole.data_ptr() for tensor in tensors]


def _in_place(tensors: Sequence[Tensor | None], offsets: Sequence[int], whole: Tensor) -> bool:
    start = whole.data_ptr()
    return all(
        tensor is not None and tensor.data_ptr() == start + offset
        for tensor, offset in zip(tensors, offsets, strict=True)
    )


_LIBRARY.define(
    "copy_layers(Tensor(a!)[] layers, int[] offsets, Tensor[] sources, int[] source_offsets, Tensor words, "
    "Tensor source_words, Tensor src_indices, Tensor dst_indices, *, int pad_slot_id, str? backend) -> ()",
    tags=_TAGS,
)
_LIBRARY.define(
    "commit_layers(Tensor(a!)[] conv_states, int[] conv_offsets, Tensor(b!)[] ssm_states, int[] ssm_offsets, "
    "Tensor windows, Tensor? states, Tensor src_indices, Tensor dst_indices, Tensor? num_accepted_tokens, "
    "Tensor? accepted_index, Tensor? parents, Tensor[] intermediate_layers, int[] intermediate_offsets, "
    "Tensor? intermediate_states, Tensor? intermediate_indices, *, int conv_width, int pad_slot_id, str? backend) "
    "-> ()",
    tags=_TAGS,
)
for _function in (copy_layers, commit_layers):
    _LIBRARY.impl(_function.__name__, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_function.__name__}", lambda *given, **options: None, lib=_LIBRARY)
