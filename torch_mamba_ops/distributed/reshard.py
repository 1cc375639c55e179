"""States moved between tensor-parallel sizes that differ: prefill on four devices, decode on two."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from .split import check_divides, conv_channels_of, heads_of

if TYPE_CHECKING:
    from torch_mamba_ops.state.spec import MambaStateSpec

Pools = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Piece:
    """A run of channels of the window, or of heads of the SSM state, that goes from one device to another.

    Attributes:
        state: ``"conv"`` or ``"ssm"``.
        source: which source it comes from, counted from 0.
        source_start: its first channel or head there.
        target: which target it goes to.
        target_start: its first channel or head there.
        length: channels or heads.
    """

    state: str
    source: int
    source_start: int
    target: int
    target_start: int
    length: int


@dataclass(frozen=True)
class Moved:
    """Bytes of one call on this process: sent to others, received from others, copied from its own pools."""

    sent: int = 0
    received: int = 0
    copied: int = 0


@dataclass(frozen=True)
class ReshardPlan:
    """Which process sends which part of a layer's states to which, worked out once. Compares by value.

    What several sources hold, B and C of a group that they share, is sent by one of them: the target itself if it has
    them, and else the sources take turns.

    Args:
        spec: of the whole layer, that is with ``tensor_parallel_size=1``. Its ``conv_layout`` does not matter.
        sources: global ranks of the processes that hold the states, in the order of their parts.
        targets: likewise of those that get them. Any that are in both copy what stays with them.

    Raises:
        ValueError: a rank comes twice, or the sources or the targets cannot split the heads.
    """

    spec: MambaStateSpec
    sources: tuple[int, ...]
    targets: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("sources", "targets"):
            ranks = tuple(getattr(self, name))
            object.__setattr__(self, name, ranks)
            if not ranks or len(set(ranks)) != len(ranks):
                raise ValueError(f"{name}: got {ranks}, expected ranks, each once")
            what = "heads" if self.spec.kind == "mamba2" else "channels"
            check_divides(name, _units(self.spec), len(ranks), what)

    @functools.cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """All that is moved or copied."""
        found = [*self._matched("conv", _channels)]
        if self.spec.ssm_shape is not None:
            found += self._matched("ssm", _heads)
        # Elements of the larger dtype come first in a message, so that all stand where their dtype may.
        size = {"conv": self.spec.conv_dtype.itemsize, "ssm": self.spec.ssm_dtype.itemsize}
        return tuple(sorted(found, key=lambda piece: -size[piece.state]))

    def bytes_moved(self, slots: int = 1, layers: int = 1) -> int:
        """Bytes that all processes together send for that many slots and layers."""
        moved = sum(self._bytes(p) for p in self.pieces if self.sources[p.source] != self.targets[p.target])
        return moved * slots * layers

    def run(
        self,
        source: Sequence[Pools] = (),
        target: Sequence[Pools] = (),
        source_slots: Tensor | None = None,
        target_slots: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> Moved:
        """Moves states, of one or several layers in one message from each source to each target.

        Called by every process of sources and targets, for as many layers and slots on each.

        Args:
            source: on a source, its ``(conv, ssm)`` of each layer: ``[slots, conv_dim, columns]`` with the spec's
                columns, and ``[slots, heads, head_dim, state]``, Mamba1 ``[slots, head_dim, state]``, or None for a
                short convolution. Any strides, so either layout.
            target: on a target, likewise; these slots are overwritten.
            source_slots: int ``[n]``, on a source.
            target_slots: int ``[n]``, on a target: slot i goes to slot i. None of them twice.
            group: of all these processes; None: the default one. With NCCL, one that communicated before.

        Returns:
            The bytes that this process sent, received and copied.

        Raises:
            ValueError: this process is in neither, or pools or slots are missing, too many, or of the wrong shape.
            TypeError: a pool's dtype is not the spec's.
        """
        rank = dist.get_rank()
        if rank not in self.sources and rank not in self.targets:
            raise ValueError(f"group: process {rank} is neither a source {self.sources} nor a target {self.targets}")
        self._check("source", self.sources, rank, source, source_slots)
        self._check("target", self.targets, rank, target, target_slots)
        outgoing, incoming, own = self._by_peer(rank)
        device = (source or target)[0][0].device
        count = source_slots if source_slots is not None else target_slots
        assert count is not None
        times = count.shape[0] * len(source or target)

        sending = {}
        if source_slots is not None:
            sending = {peer: _read(source, pieces, source_slots) for peer, pieces in outgoing.items()}
        receiving = {
            peer: torch.empty(times * sum(map(self._bytes, pieces)), dtype=torch.uint8, device=device)
            for peer, pieces in incoming.items()
        }
        requests = [dist.P2POp(dist.isend, message, peer, group) for peer, message in sending.items()]
        requests += [dist.P2POp(dist.irecv, message, peer, group) for peer, message in receiving.items()]
        pending = dist.batch_isend_irecv(requests) if requests and times else []
        copied = 0
        if own and source_slots is not None and target_slots is not None:
            message = _read(source, own, source_slots)
            copied = message.numel()
            self._write(target, own, target_slots, message)
        for request in pending:
            request.wait()
        for peer, pieces in incoming.items():
            if target_slots is not None:
                self._write(target, pieces, target_slots, receiving[peer])
        return Moved(sum(map(Tensor.numel, sending.values())), sum(map(Tensor.numel, receiving.values())), copied)

    def _matched(self, state: str, held: Callable[[MambaStateSpec, int, int], tuple[range, ...]]) -> Iterator[Piece]:
        """The sources of all that the targets hold."""
        sources = [list(_placed(held(self.spec, len(self.sources), i))) for i in range(len(self.sources))]
        bounds = sorted({bound for runs in sources for _, run in runs for bound in (run.start, run.stop)})
        for target in range(len(self.targets)):
            for start, run in _placed(held(self.spec, len(self.targets), target)):
                cuts = [run.start, *(bound for bound in bounds if run.start < bound < run.stop), run.stop]
                for first, stop in pairwise(cuts):
                    source, there = self._holder(sources, first, target)
                    yield Piece(state, source, there, target, start + first - run.start, stop - first)

    def _holder(self, sources: Sequence[Sequence[tuple[int, range]]], channel: int, target: int) -> tuple[int, int]:
        """A source that holds a channel, and where in it."""
        holders = [
            (source, start + channel - run.start)
            for source, runs in enumerate(sources)
            for start, run in runs
            if channel in run
        ]
        own = [holder for holder in holders if self.sources[holder[0]] == self.targets[target]]
        return own[0] if own else holders[target % len(holders)]

    def _by_peer(self, rank: int) -> tuple[dict[int, list[Piece]], dict[int, list[Piece]], list[Piece]]:
        """What a process sends to each other one, receives from each, and copies."""
        outgoing: dict[int, list[Piece]] = {}
        incoming: dict[int, list[Piece]] = {}
        own = []
        for piece in self.pieces:
            sender, receiver = self.sources[piece.source], self.targets[piece.target]
            if sender == receiver == rank:
                own.append(piece)
            elif sender == rank:
                outgoing.setdefault(receiver, []).append(piece)
            elif receiver == rank:
                incoming.setdefault(sender, []).append(piece)
        return outgoing, incoming, own

    def _bytes(self, piece: Piece) -> int:
        """Of a piece of one slot of one layer."""
        spec = self.spec
        if piece.state == "conv":
            return piece.length * spec.columns * spec.conv_dtype.itemsize
        head = spec.head_dim if spec.kind == "mamba2" else 1
        return piece.length * head * spec.state_size * spec.ssm_dtype.itemsize

    def _write(self, pools: Sequence[Pools], pieces: Sequence[Piece], slots: Tensor, message: Tensor) -> None:
        position = 0
        for piece in pieces:
            for layer in pools:
                part = _pool(layer, piece.state).narrow(1, piece.target_start, piece.length)
                shape = (slots.shape[0], *part.shape[1:])
                stop = position + slots.shape[0] * self._bytes(piece)
                part.index_copy_(0, slots, message[position:stop].view(part.dtype).view(shape))
                position = stop

    def _check(
        self, name: str, ranks: tuple[int, ...], rank: int, pools: Sequence[Pools], slots: Tensor | None
    ) -> None:
        if rank not in ranks:
            if pools or slots is not None:
                raise ValueError(f"{name}: got pools or slots on process {rank}, expected none: it is not in {ranks}")
            return
        if not pools or slots is None:
            raise ValueError(f"{name}: got no pools or no slots on process {rank}, expected both")
        if slots.dim() != 1 or slots.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name}_slots: got {slots.dtype}{list(slots.shape)}, expected int [n]")
        spec, devices, device = self.spec, len(ranks), ranks.index(rank)
        inner = None
        if spec.ssm_shape is not None:
            inner = (len(_heads(spec, devices, device)[0]), *spec.ssm_shape[1:])
        windows = (sum(map(len, _channels(spec, devices, device))), spec.columns)
        for conv, ssm in pools:
            _check_pool(f"{name} conv", conv, windows, spec.conv_dtype)
            if (ssm is None) != (inner is None):
                raise ValueError(f"{name} ssm: got {None if ssm is None else list(ssm.shape)}, expected {inner}")
            if ssm is not None and inner is not None:
                _check_pool(f"{name} ssm", ssm, inner, spec.ssm_dtype)


def _units(spec: MambaStateSpec) -> int:
    """What devices split: heads, or channels where there are no heads."""
    return spec.heads if spec.kind == "mamba2" else spec.head_dim


def _heads(spec: MambaStateSpec, devices: int, device: int) -> tuple[range, ...]:
    """The heads of a device's SSM state."""
    return (heads_of(_units(spec), devices, device),)


def _channels(spec: MambaStateSpec, devices: int, device: int) -> tuple[range, ...]:
    """The channels of a device's window."""
    if spec.kind == "mamba2":
        return conv_channels_of(spec.heads, spec.head_dim, spec.groups, spec.state_size, devices, device)
    return _heads(spec, devices, device)


def _placed(runs: Sequence[range]) -> Iterator[tuple[int, range]]:
    """Runs with where each begins in what a device holds."""
    start = 0
    for run in runs:
        yield start, run
        start += len(run)


def _pool(layer: Pools, state: str) -> Tensor:
    conv, ssm = layer
    if state == "conv":
        return conv
    assert ssm is not None
    return ssm


def _read(pools: Sequence[Pools], pieces: Sequence[Piece], slots: Tensor) -> Tensor:
    """A message: the pieces of the slots of all layers, as bytes."""
    parts = (
        _pool(layer, piece.state).narrow(1, piece.source_start, piece.length).index_select(0, slots)
        for piece in pieces
        for layer in pools
    )
    return torch.cat([part.reshape(-1).view(torch.uint8) for part in parts])


def _check_pool(name: str, pool: Tensor, inner: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(pool.shape[1:]) != inner:
        raise ValueError(f"{name}: got {list(pool.shape)}, expected [slots, {', '.join(map(str, inner))}]")
    if pool.dtype != dtype:
        raise TypeError(f"{name}: got {pool.dtype}, expected {dtype}, the spec's")


__all__ = ["Moved", "Piece", "ReshardPlan"]
