"""The pool: slots with the states of many layers, in one allocation.

A page is what one slot holds: the windows of all layers, then the SSM state of each. Windows stand side by side as if
the layers' channels were one layer's, so that a copy treats all of them alike; a page is contiguous, so that a slot is
copied or sent away in one piece. Operations take a layer's states as strided views, ``[slots, ...]``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.utils.dlpack
from torch import Tensor
from torch.nn import Module

from .spec import LAYOUTS, MambaStateSpec, _one_of

ALIGNMENT = 256  # bytes: pages and SSM states begin at multiples, as kernels and transfers like it
_CHANNELS = 16  # a layer's windows begin at multiples of so many channels


class PoolExhaustedError(RuntimeError):
    """The pool has fewer free slots than were asked for. None was taken."""


@dataclass(frozen=True, eq=False)
class LayerStates:
    """One layer's states in a pool, or in an intermediate buffer, as operations take them.

    Attributes:
        conv_state: ``[slots, dim, columns]``, whatever the layout; None in an intermediate buffer.
        ssm_state: ``[slots, heads, head_dim, state_size]`` (Mamba1: ``[slots, dim, state_size]``), in an intermediate
            buffer ``[rows, tokens, ...]``; None for a layer without one.
    """

    conv_state: Tensor | None
    ssm_state: Tensor | None


class StatePool(Mapping[int, LayerStates]):
    """Slots of states for the layers of a model; a mapping from layer index to `LayerStates`.

    Addresses never change: tensors are marked static, so that CUDA graphs take them as they are, as buffers of modules
    (see `register`) and as inputs. Slots are counted from 0. Not to be shared by threads without a lock.

    Args:
        specs: layer index -> spec, as `MambaStateSpec.from_config` gives them, or specs of layers 0, 1 and so on. All
            windows have the same columns, dtype and layout.
        slots: how many; at least one.
        device: of the memory; default: torch's.
        conv_layout: ``"SD"`` or ``"DS"``, in any case, in place of that of the specs, which by default is as
            `torch_mamba_ops.settings` say.
        page_bytes: pages are padded to a multiple of this, 256 or a multiple of it; an engine gives the page of its
            attention layers.
        memory: uint8, contiguous, at least ``slots`` pages that begin at a multiple of 16 bytes, to be used in place of
            new memory; what is there stays. New memory is zeroed.

    Attributes:
        specs: layer index -> spec, in this pool's layout.
        pages: uint8 ``[slots, page_bytes]``, all memory. A compiled graph that writes the layers' states must not read
            it: the compiler does not know that it is the same memory.
        words: the pages as int32 ``[slots, page_bytes / 4]``.
        windows: ``[slots, channels, columns]``, the windows of all layers, as integers of their size.
        states: int32 ``[slots, numbers]``, the SSM states of all layers; None if there are none.
        layout: where things are in a page.

    Raises:
        ValueError: no layers, layers whose windows differ, an unknown layout, or memory that does not fit.
    """

    def __init__(
        self,
        specs: Mapping[int, MambaStateSpec] | Sequence[MambaStateSpec],
        slots: int,
        *,
        device: torch.device | str | None = None,
        conv_layout: str | None = None,
        page_bytes: int = ALIGNMENT,
        memory: Tensor | None = None,
    ) -> None:
        self.specs = _in_one_layout(specs, conv_layout)
        self.layout = PageLayout.of(self.specs)
        if isinstance(slots, bool) or not isinstance(slots, int) or slots < 1:
            raise ValueError(f"slots: got {slots!r}, expected an integer of at least 1")
        if page_bytes < 1 or page_bytes % ALIGNMENT:
            raise ValueError(f"page_bytes: got {page_bytes}, expected a multiple of {ALIGNMENT}")
        page = _up(self.layout.states_at + self.layout.state_bytes, page_bytes)
        if memory is None:
            memory = torch.zeros(slots * page, dtype=torch.uint8, device=device)
        _check_memory(memory, slots, page)
        self.pages = memory[: slots * page].view(slots, page)
        self._layers = {index: self._layer(index, self.specs[index]) for index in self.specs}
        self.words = self._view(torch.int32, (1,), (page // 4,), 0)
        self.windows = self._windows()
        self.states = self._states()
        self._free = list(range(slots - 1, -1, -1))
        self._taken = bytearray(slots)
        self._registered: list[tuple[Module, str, Tensor]] = []
        for tensor in (self.pages, self.words, self.windows, self.states, *_tensors(self._layers.values())):
            if tensor is not None:
                torch._dynamo.mark_static_address(tensor)

    @property
    def slots(self) -> int:
        """How many there are."""
        return self.pages.shape[0]

    @property
    def page_bytes(self) -> int:
        """Of one slot, padding included."""
        return self.pages.shape[1]

    @property
    def free_slots(self) -> int:
        """How many `allocate` can still give."""
        return len(self._free)

    @property
    def device(self) -> torch.device:
        """Where the memory is."""
        return self.pages.device

    def __getitem__(self, layer: int) -> LayerStates:
        if layer not in self._layers:
            raise KeyError(f"layer {layer} has no states here; those that have: {', '.join(map(str, self._layers))}")
        return self._layers[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def __repr__(self) -> str:
        taken = self.slots - self.free_slots
        return f"StatePool({len(self)} layers, {taken} of {self.slots} slots taken, {self.page_bytes} bytes a slot)"

    def allocate(self, count: int = 1) -> list[int]:
        """Takes free slots, those freed last first. What they hold is what was there; see `reset`.

        Raises:
            PoolExhaustedError: there are not as many.
        """
        if count > len(self._free):
            raise PoolExhaustedError(
                f"the pool has {len(self._free)} of {self.slots} slots free, {count} were asked for; free some or make "
                f"a larger pool ({self.page_bytes} bytes a slot)"
            )
        taken = [self._free.pop() for _ in range(count)]
        for slot in taken:
            self._taken[slot] = True
        return taken

    def free(self, slots: int | Iterable[int]) -> None:
        """Gives slots back. Nothing is given back if one of them cannot be.

        Raises:
            ValueError: a slot is not taken (freed twice, say), or is none of this pool's.
        """
        listed = [slots] if isinstance(slots, int) else list(slots)
        self._check_taken(listed)
        for slot in listed:
            self._taken[slot] = False
            self._free.append(slot)

    def fork(self, slot: int, count: int = 1) -> list[int]:
        """Takes slots and copies a taken one's page into each, on the device's current stream.

        Raises:
            ValueError: the slot is not taken.
            PoolExhaustedError: there are not as many free slots.
        """
        self._check_taken([slot])
        taken = self.allocate(count)
        for new in taken:
            self.pages[new].copy_(self.pages[slot])
        return taken

    def reset(self, slots: int | Iterable[int] | Tensor | None = None) -> None:
        """Zeroes the pages of slots, taken or not; all of them by default. A tensor of slots is read on its device, and
        has no padding.

        Raises:
            ValueError: a slot is none of this pool's.
        """
        if slots is None:
            self.pages.zero_()
        elif isinstance(slots, Tensor):
            self.pages.index_fill_(0, slots.to(self.device, torch.int64), 0)
        else:
            for slot in [slots] if isinstance(slots, int) else slots:
                self._check_slot(slot)
                self.pages[slot].zero_()

    def register(
        self, modules: Mapping[int, Module], *, conv_state: str = "conv_state", ssm_state: str = "ssm_state"
    ) -> None:
        """Makes each layer's states buffers of its module, not kept in state dicts. A module that is later moved or
        cast has tensors of its own, of which this pool knows nothing; `StateCopyPlan` refuses to go on then.

        Args:
            modules: layer index -> module, for some or all layers.
            conv_state: name of the buffer of windows.
            ssm_state: name of the buffer of SSM states; layers without one get none.

        Raises:
            KeyError: a layer is not in this pool.
        """
        for index, module in modules.items():
            layer = self[index]
            for name, tensor in ((conv_state, layer.conv_state), (ssm_state, layer.ssm_state)):
                if tensor is not None:
                    module.register_buffer(name, tensor, persistent=False)
                    self._registered.append((module, name, tensor))

    def moved_buffers(self) -> list[str]:
        """Names of registered buffers that are no longer this pool's memory."""
        return [name for module, name, tensor in self._registered if module._buffers.get(name) is not tensor]

    def intermediate(self, rows: int, tokens: int) -> IntermediateStates:
        """A buffer for the SSM states after each token of a step, see `IntermediateStates`."""
        return IntermediateStates(self, rows, tokens)

    def _check_taken(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._check_slot(slot)
            if not self._taken[slot]:
                raise ValueError(f"slots: got slot {slot}, which is free already (freed twice?), expected a taken one")
        if len(set(slots)) < len(slots):
            raise ValueError(f"slots: got {list(slots)}, expected each slot once")

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise ValueError(f"slots: got slot {slot}, expected 0 to {self.slots - 1}")

    def _layer(self, index: int, spec: MambaStateSpec) -> LayerStates:
        layout = self.layout
        first = layout.first_channel[index]
        conv_state = self._view(
            spec.conv_dtype, layout.window_strides, (spec.conv_dim, spec.columns), first * layout.window_strides[0]
        )
        ssm_state = None
        if spec.ssm_shape is not None:
            at = (layout.states_at + layout.first_state[index]) // spec.ssm_dtype.itemsize
            ssm_state = self._view(spec.ssm_dtype, _contiguous(spec.ssm_shape), spec.ssm_shape, at)
        return LayerStates(conv_state, ssm_state)

    def _windows(self) -> Tensor:
        layout = self.layout
        return self._view(_integer(layout.conv_dtype), layout.window_strides, (layout.channels, layout.columns), 0)

    def _states(self) -> Tensor | None:
        if not self.layout.state_bytes:
            return None
        return self._view(torch.int32, (1,), (self.layout.state_bytes // 4,), self.layout.states_at // 4)

    def _view(self, dtype: torch.dtype, strides: Sequence[int], shape: Sequence[int], at: int) -> Tensor:
        return own_storage(self.pages, dtype, (self.slots, *shape), (self.page_bytes // dtype.itemsize, *strides), at)


class IntermediateStates(Mapping[int, LayerStates]):
    """SSM states of all layers after each token of a step, ``[rows, tokens, ...]`` a layer: what
    `selective_state_update` takes as ``intermediate_states_buffer`` and `StateCopyPlan.commit` picks from.

    Args:
        pool: whose layers and dtypes these are.
        rows: sequences in a step.
        tokens: of a sequence in a step, drafts and the one before them.

    Raises:
        ValueError: a pool without SSM states, or no row or token.
    """

    def __init__(self, pool: StatePool, rows: int, tokens: int) -> None:
        layout = pool.layout
        if not layout.state_bytes:
            raise ValueError("pool: got one without SSM states, expected one with some")
        if min(rows, tokens) < 1:
            raise ValueError(f"rows, tokens: got {rows}, {tokens}, expected at least 1")
        self.layout = layout
        self.slots, self.device = rows, pool.device
        memory = torch.zeros(rows, tokens, layout.state_bytes, dtype=torch.uint8, device=pool.device)
        self.memory = memory
        self.states = own_storage(
            memory,
            torch.int32,
            (rows, tokens, layout.state_bytes // 4),
            (tokens * layout.state_bytes // 4, layout.state_bytes // 4, 1),
            0,
        )
        self._layers = {}
        for index, spec in pool.specs.items():
            if spec.ssm_shape is not None:
                size = spec.ssm_dtype.itemsize
                row = layout.state_bytes // size
                strides = (tokens * row, row, *_contiguous(spec.ssm_shape))
                shape = (rows, tokens, *spec.ssm_shape)
                at = layout.first_state[index] // size
                self._layers[index] = LayerStates(None, own_storage(memory, spec.ssm_dtype, shape, strides, at))
        for tensor in (memory, self.states, *_tensors(self._layers.values())):
            torch._dynamo.mark_static_address(tensor)

    def __getitem__(self, layer: int) -> LayerStates:
        return self._layers[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


@dataclass(frozen=True)
class PageLayout:
    """Where things are in a page. Windows come first: ``channels`` of them, of all layers, by ``columns``.

    Attributes:
        first_channel: layer index -> its first channel.
        window_strides: over channels and columns, in elements.
        states_at: bytes before the SSM states.
        state_bytes: of all SSM states.
        first_state: layer index -> bytes from ``states_at`` to its state.
    """

    conv_dtype: torch.dtype
    columns: int
    channels: int
    window_strides: tuple[int, int]
    first_channel: Mapping[int, int]
    states_at: int
    state_bytes: int
    first_state: Mapping[int, int]

    @classmethod
    def of(cls, specs: Mapping[int, MambaStateSpec]) -> PageLayout:
        any_spec = next(iter(specs.values()))
        first_channel, channels = {}, 0
        first_state, state_bytes = {}, 0
        for index, spec in specs.items():
            first_channel[index] = channels
            channels += _up(spec.conv_dim, _CHANNELS)
            if spec.ssm_shape is not None:
                first_state[index] = state_bytes
                state_bytes += _up(math.prod(spec.ssm_shape) * spec.ssm_dtype.itemsize, ALIGNMENT)
        columns = any_spec.columns
        strides = (1, channels) if any_spec.conv_layout == "SD" else (columns, 1)
        states_at = _up(channels * columns * any_spec.conv_dtype.itemsize, ALIGNMENT)
        return cls(any_spec.conv_dtype, columns, channels, strides, first_channel, states_at, state_bytes, first_state)


def own_storage(
    memory: Tensor, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int], offset: int
) -> Tensor:
    """A tensor over another's memory that the compiler takes for one of its own.

    Views of one tensor would be merged by AOTAutograd as soon as a graph writes one of them, and cannot be if their
    dtypes differ. Layers share no element, so that nothing is lost by keeping them apart.
    """
    storage = torch.utils.dlpack.from_dlpack(memory).untyped_storage()
    return torch.empty(0, dtype=dtype, device=memory.device).set_(storage, offset, tuple(shape), tuple(strides))


def _in_one_layout(
    specs: Mapping[int, MambaStateSpec] | Sequence[MambaStateSpec], layout: str | None
) -> dict[int, MambaStateSpec]:
    given = dict(specs) if isinstance(specs, Mapping) else dict(enumerate(specs))
    if not given:
        raise ValueError("specs: got none, expected a layer that keeps states")
    if layout is not None:
        layout = layout.upper() if isinstance(layout, str) else layout
        _one_of("conv_layout", layout, LAYOUTS)
        given = {index: replace(spec, conv_layout=layout) for index, spec in given.items()}  # type: ignore[arg-type]
    kinds = {(spec.conv_width, spec.columns, str(spec.conv_dtype), spec.conv_layout) for spec in given.values()}
    if len(kinds) > 1:
        listed = "; ".join(
            f"{width} taps, {columns} columns of {dtype}, {at}" for width, columns, dtype, at in sorted(kinds)
        )
        raise ValueError(f"specs: got windows of {listed}; expected the same for all layers, or a pool for each kind")
    return given


def _check_memory(memory: Tensor, slots: int, page: int) -> None:
    if memory.dtype is not torch.uint8 or memory.dim() != 1 or not memory.is_contiguous():
        raise ValueError(f"memory: got {memory.dtype} {list(memory.shape)}, expected contiguous uint8 [bytes]")
    if memory.numel() < slots * page:
        raise ValueError(f"memory: got {memory.numel()} bytes, expected {slots * page}, {slots} pages of {page}")
    if memory.data_ptr() % 16:
        raise ValueError("memory: begins between multiples of 16 bytes, expected at one")


def _tensors(layers: Iterable[LayerStates]) -> Iterator[Tensor]:
    for layer in layers:
        yield from (tensor for tensor in (layer.conv_state, layer.ssm_state) if tensor is not None)


def _integer(dtype: torch.dtype) -> torch.dtype:
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
