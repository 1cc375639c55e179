"""Planned copies: of slots, of accepted tokens' states, of states at block boundaries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_mamba_ops.dispatch.mutation import check_disjoint
from torch_mamba_ops.ops import commit_states, copy_states
from torch_mamba_ops.ops.pool import check_slots

from . import blocks, graph
from .pool import IntermediateStates, StatePool

Slots = Tensor | Sequence[int]


class StatePlanError(RuntimeError):
    """A plan does not fit its pools: they differ in layout, or have changed since it was made."""


class StateCopyPlan:
    """Copies between slots, for all layers and both states of each in one launch. What takes part, and where it is, is
    worked out when the plan is made; a step gives slots and counts of tokens.

    Slots are lists, or int tensors. Lists and tensors on the CPU are checked before anything is written. Tensors on a
    GPU are not looked at, since that would wait for it: with one slot twice among destinations, the slot holds parts of
    either source afterwards; a slot outside of the pool is undefined behaviour; ``check=True`` waits and looks. With
    tensors on the pool's device nothing waits, so that calls can be captured in a CUDA graph and traced by
    torch.compile with fullgraph.

    All sources are read before anything is written: slots may swap, or follow each other.

    Args:
        pool: whose slots are written.
        source: whose slots `copy` reads, if not the pool's own: a pool with the same layers in the same layout.
        intermediate: where `commit` finds the SSM states after each token.
        block_size: tokens of a block, for `preprocess` and `postprocess`.
        pad_slot_id: a copy whose source or destination is this slot is left out.
        check: whether tensors on a GPU are checked as well, which waits for it; for debugging, not in a graph.
        backend: of `copy_states` and `commit_states`; None: as chosen by context, process, environment or
            automatically.

    Raises:
        StatePlanError: source and pool differ in layout, or intermediate is another pool's.
        ValueError: source and pool share memory, or block_size is less than one.
    """

    def __init__(
        self,
        pool: StatePool,
        *,
        source: StatePool | None = None,
        intermediate: IntermediateStates | None = None,
        block_size: int | None = None,
        pad_slot_id: int = -1,
        check: bool = False,
        backend: str | None = None,
    ) -> None:
        if block_size is not None and block_size < 1:
            raise ValueError(f"block_size: got {block_size}, expected at least 1")
        if source is not None and source is not pool:
            _check_alike(pool, source)
            check_disjoint("pool", pool.pages, {"source": source.pages})
        if intermediate is not None and intermediate.layout != pool.layout:
            raise StatePlanError(
                "intermediate: is of a pool with other layers, expected pool.intermediate(rows, tokens)"
            )
        self.pool = pool
        self.source = pool if source is None else source
        self.intermediate = intermediate
        self.block_size = block_size
        self.pad_slot_id = pad_slot_id
        self.check = check
        self.backend = backend
        self._conv_width = next(iter(pool.specs.values())).conv_width
        self._fingerprint = self._metadata()
        self._conv = [layer.conv_state for layer in pool.values() if layer.conv_state is not None]
        self._ssm = [layer.ssm_state for layer in pool.values() if layer.ssm_state is not None]
        self._steps = [layer.ssm_state for layer in (intermediate or {}).values() if layer.ssm_state is not None]
        self._sources = [] if self.source is pool else _all_states(self.source)
        self._offsets = {
            "layers": graph.offsets(_all_states(pool), pool.words),
            "sources": graph.offsets(self._sources, self.source.words),
            "conv": graph.offsets(self._conv, pool.windows),
            "ssm": graph.offsets(self._ssm, pool.states),
            "steps": graph.offsets(self._steps, None if intermediate is None else intermediate.states),
        }

    def copy(self, src: Slots, dst: Slots) -> None:
        """Copies pages: slot ``dst[i]`` becomes slot ``src[i]`` as it was.

        Args:
            src: ``[copies]`` slots of the source pool.
            dst: ``[copies]`` slots of the pool, none twice. Their pages are mutated.

        Raises:
            StatePlanError: a pool changed since the plan was made.
            ValueError: a slot is out of range, or a destination is given twice.
        """
        self._verify()
        source, target = self._slots("src", src, self.source), self._slots("dst", dst, self.pool, written=True)
        if torch.compiler.is_compiling():
            torch.ops.torch_mamba_ops.copy_layers(
                self._conv + self._ssm, self._offsets["layers"], self._sources, self._offsets["sources"],
                self.pool.words, self.source.words, source, target,
                pad_slot_id=self.pad_slot_id, backend=self.backend,
            )  # fmt: skip
            return
        copy_states(
            self.source.words, self.pool.words, source, target, pad_slot_id=self.pad_slot_id, backend=self.backend
        )

    def commit(
        self,
        src: Slots | None,
        dst: Slots,
        num_accepted_tokens: Tensor | None = None,
        *,
        accepted_index: Tensor | None = None,
        parents: Tensor | None = None,
        rows: Slots | None = None,
    ) -> None:
        """Puts the states after each sequence's last accepted token into a slot, which rolls rejected tokens back; see
        `torch_mamba_ops.commit_states`. The next step goes on from there with one accepted token.

        SSM states come from the intermediate buffer, if the plan has one; else from ``src``, ``[copies, tokens]``, a
        slot for the state after each token. To drop a whole step, `copy` its slots elsewhere before and back after it.

        Args:
            src: ``[copies]`` or ``[copies, tokens]``, slots of the pool, not of the source pool; None: dst.
            dst: ``[copies]``, none twice. Their pages are mutated.
            num_accepted_tokens: int ``[copies]``, 0 counts as 1. None, without accepted_index: the first token.
            accepted_index: int ``[copies]``, the last accepted token's number in the step, from 0; for trees.
            parents: int ``[copies, tokens]``, the token before each token, -1 for a root; None: drafts in a row.
            rows: ``[copies]``, the row of each copy in the intermediate buffer; None: row i.

        Raises:
            StatePlanError: a pool changed since the plan was made, or nothing tells the SSM states after each token.
            ValueError: a slot, count or row is out of range, or a destination is given twice.
        """
        self._verify()
        target = self._slots("dst", dst, self.pool, written=True)
        # A tensor of its own: kernels that get one tensor twice start slowly.
        origin = target.view(-1) if src is None else self._slots("src", src, self.pool)
        several = num_accepted_tokens is not None or accepted_index is not None
        if several and self.intermediate is None and origin.dim() == 1 and self.pool.states is not None:
            raise StatePlanError(
                "src: got one slot a copy from a plan without intermediate, expected [copies, tokens], a slot for the "
                "state after each token, or a plan made with intermediate=pool.intermediate(rows, tokens)"
            )
        buffer = None if self.intermediate is None else self.intermediate.states
        row = None
        if self.intermediate is not None and rows is not None:
            row = self._slots("rows", rows, self.intermediate)
        if torch.compiler.is_compiling():
            torch.ops.torch_mamba_ops.commit_layers(
                self._conv, self._offsets["conv"], self._ssm, self._offsets["ssm"], self.pool.windows,
                self.pool.states, origin, target, num_accepted_tokens, accepted_index, parents, self._steps,
                self._offsets["steps"], buffer, row,
                conv_width=self._conv_width, pad_slot_id=self.pad_slot_id, backend=self.backend,
            )  # fmt: skip
            return
        commit_states(
            self.pool.windows, self.pool.states, origin, target, num_accepted_tokens, accepted_index=accepted_index,
            parents=parents, intermediate_states=buffer, intermediate_indices=row, conv_width=self._conv_width,
            pad_slot_id=self.pad_slot_id, backend=self.backend,
        )  # fmt: skip

    def preprocess(self, block_table: Tensor, num_computed_tokens: Tensor, num_scheduled_tokens: Tensor) -> Tensor:
        """Before a step, with prefix caching: carries each sequence's running state into the block that the step ends
        in, so that the block it was in keeps the state at its boundary. A sequence of ``n`` tokens has its running
        state in the slot of block ``(n - 1) // block_size``.

        Args:
            block_table: int ``[sequences, blocks]``, the slot of each block.
            num_computed_tokens: int ``[sequences]``, tokens before the step.
            num_scheduled_tokens: int ``[sequences]``, tokens of the step; a sequence with none is left alone.

        Returns:
            int ``[sequences]``, the slots that the step reads and writes, for operations' slot arguments.

        Raises:
            StatePlanError: a pool changed since the plan was made, or the plan has no block_size.
            ValueError: see `copy`.
        """
        src, dst, slots = blocks.to_carry(
            block_table, num_computed_tokens, num_scheduled_tokens, self._blocks(), self.pad_slot_id
        )
        self.copy(src, dst)
        return slots

    def postprocess(
        self,
        block_table: Tensor,
        num_computed_tokens: Tensor,
        num_scheduled_tokens: Tensor,
        num_accepted_tokens: Tensor | None = None,
        *,
        accepted_index: Tensor | None = None,
        parents: Tensor | None = None,
    ) -> Tensor:
        """After a step of speculative decoding, with prefix caching: commits the accepted tokens, and keeps the state
        at a block boundary that lies among them in the slot of the block that ends there.

        Row i of the intermediate buffer is sequence i's. A step without drafts (a prefill) ends on its running state
        and needs none of this: its boundary is kept if it ends there.

        Args:
            block_table: as before the step.
            num_computed_tokens: as before the step.
            num_scheduled_tokens: as before the step, but 0 for sequences without drafts, which are left alone.
            num_accepted_tokens: int ``[sequences]``, 0 counts as 1.
            accepted_index: for trees, as of `commit`, in place of num_accepted_tokens.
            parents: for trees, as of `commit`.

        Returns:
            int ``[sequences]``, the slots of the running states; pad_slot_id for sequences left alone.

        Raises:
            StatePlanError: as `commit` does, or the plan has no block_size.
            ValueError: see `commit`.
        """
        keep = blocks.to_keep(
            block_table, num_computed_tokens, num_scheduled_tokens, num_accepted_tokens, accepted_index, parents,
            self._blocks(), self.pad_slot_id,
        )  # fmt: skip
        self.commit(
            keep.src, keep.dst, accepted_index=keep.accepted_index, parents=keep.parents,
            rows=keep.rows if self.intermediate is not None else None,
        )  # fmt: skip
        return keep.running

    def _blocks(self) -> int:
        if self.block_size is None:
            raise StatePlanError("block_size: got None when the plan was made, expected the tokens of a block")
        return self.block_size

    def _verify(self) -> None:
        """Raises if memory moved or changed. A graph is guarded by what it was traced with, and `graph` looks at the
        addresses it is given."""
        if torch.compiler.is_compiling():
            return
        found = self._metadata()
        if found != self._fingerprint:
            given = next(now for now, then in zip(found, self._fingerprint, strict=True) if now != then)
            wanted = next(then for now, then in zip(found, self._fingerprint, strict=True) if now != then)
            raise StatePlanError(
                f"the pool changed since the plan was made: got {given}, expected {wanted}; make a new one"
            )
        for pool in dict.fromkeys((self.pool, self.source)):
            if moved := pool.moved_buffers():
                raise StatePlanError(
                    f"{moved[0]}: a module it is registered in has another tensor by now (moved, cast?), expected the "
                    "pool's; register it again and make a new plan"
                )

    def _metadata(self) -> list[tuple[int, torch.Size, tuple[int, ...], torch.dtype]]:
        memory = [self.pool.pages, self.source.pages]
        if self.intermediate is not None:
            memory.append(self.intermediate.memory)
        return [(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in memory]

    def _slots(self, name: str, given: Slots, pool: StatePool | IntermediateStates, *, written: bool = False) -> Tensor:
        """On the pool's device, checked where that does not wait for it."""
        slots = given if isinstance(given, Tensor) else torch.tensor(given, dtype=torch.int32)
        size, device = pool.slots, pool.device
        if torch.compiler.is_compiling():
            return slots.to(device)
        if slots.device.type == "cpu" or self.check:
            check_slots(name, slots.cpu(), size, self.pad_slot_id, written=written)
        if slots.device != device:
            slots = slots.pin_memory() if device.type == "cuda" and slots.device.type == "cpu" else slots
            slots = slots.to(device, non_blocking=True)
        return slots


def _check_alike(pool: StatePool, source: StatePool) -> None:
    if source.layout != pool.layout or source.page_bytes != pool.page_bytes or source.device != pool.device:
        raise StatePlanError(f"source: got {source} on {source.device}, expected the layout of {pool} on {pool.device}")


def _all_states(pool: StatePool) -> list[Tensor]:
    """Windows, then SSM states."""
    both = [layer.conv_state for layer in pool.values()] + [layer.ssm_state for layer in pool.values()]
    return [tensor for tensor in both if tensor is not None]
