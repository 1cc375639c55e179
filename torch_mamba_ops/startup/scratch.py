"""Arguments of the operations as serving gives them, on random scratch tensors.

They are laid out as a layer's projections and its convolution give them, slices of wider rows, since strides, dtypes
and where a tensor begins are part of what is compiled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch_mamba_ops.state import MambaStateSpec

Arguments = dict[str, Any]
FEW = 8


@dataclass(frozen=True)
class Size:
    """Of a batch.

    Attributes:
        sequences: of the call.
        tokens: of all sequences; a decode step is told apart how many each has.
        before: decode steps that stand before a packed prefill in the tensors that it gets slices of.
        few_slots: whether the pool has a few slots at most; other sequences are padding then, which costs no memory.
    """

    sequences: int
    tokens: int
    before: int = 0
    few_slots: bool = False

    @property
    def slots(self) -> int:
        """Of the pool."""
        return min(self.sequences, FEW) if self.few_slots else self.sequences


@dataclass(frozen=True)
class Scratch:
    """Makes the arguments of one call for a layer; each public method is one use of an operation.

    Attributes:
        spec: the layer.
        dtype: of activations and parameters; A is float32.
        pooled: whether states live in a pool of slots, as an engine keeps them; else in a dense batch, one row a
            sequence, as Hugging Face transformers do.
        device: of the tensors.
        size: of the batch.
    """

    spec: MambaStateSpec
    dtype: torch.dtype
    pooled: bool
    device: torch.device
    size: Size

    def conv_update(self, tokens: int) -> Arguments:
        """A decode step of the convolution, of so many tokens a sequence."""
        x = self._conv_input(*self._steps(tokens))
        given = self._filter() | {
            "x": x.transpose(1, 2) if x.dim() == 3 else x,
            "conv_state": self._windows(self.spec.columns if self.pooled else self.spec.conv_width),
        }
        return given | {"conv_state_indices": self._slots()} | self._accepted() if self.pooled else given

    def state_update(self, tokens: int, gate: bool = False) -> Arguments:
        """A decode step of the recurrence, of so many tokens a sequence; Mamba2's with the gate or without."""
        columns = 1 + self.spec.speculative_tokens if self.pooled else 1
        steps = self._steps(tokens)
        given = self._ssm(*steps) | self._gate(gate, *steps) | {"state": self._states(self.size.slots * columns)}
        if not self.pooled:
            return given
        slots = self._slots()
        given["state_batch_indices"] = self._slots_of_tokens(slots, columns) if columns > 1 else slots
        return given | self._accepted() | self._seed()

    def verify(self, tokens: int) -> Arguments:
        """A step over drafts that leaves the pool as it is and keeps the state after each token in a buffer, which has
        a row for each sequence."""
        rows = min(self.size.sequences, self.size.slots)
        few = replace(self, size=replace(self.size, sequences=rows))
        return few._ssm(rows, tokens) | {
            "state": few._states(self.size.slots),
            "state_batch_indices": few._slots(),
            "intermediate_states_buffer": few._buffer(rows, tokens),
            "disable_state_update": True,
        }

    def conv(self, initial: bool) -> Arguments:
        """A dense prefill of the convolution."""
        window = (self.size.sequences, self.spec.conv_dim, self.spec.conv_width - 1)
        return self._filter() | {
            "x": self._conv_input(*self._rows).transpose(1, 2),
            "initial_states": self._random(*window) if initial else None,
            "return_final_states": True,
        }

    def scan(self, initial: bool, gate: bool) -> Arguments:
        """A dense prefill of Mamba2, with the gate or without."""
        return (
            self._ssm(*self._rows)
            | self._gate(gate, *self._rows)
            | {
                "chunk_size": self.spec.chunk_size,
                "initial_states": self._states(self.size.sequences) if initial else None,
                "return_final_states": True,
            }
        )

    def selective_scan(self) -> Arguments:
        """A dense prefill of Mamba1, whose step size has tokens innermost and whose D is float32."""
        given = self._ssm(*self._rows)
        x, B, C, z = (given[name].transpose(1, 2) for name in ("x", "B", "C", "z"))
        return {
            "u": x,
            "delta": self._random(*x.shape),
            "A": given["A"],
            "B": B,
            "C": C,
            "D": self._random(self.spec.head_dim, dtype=torch.float32),
            "z": z,
            "delta_bias": given["dt_bias"],
            "delta_softplus": True,
            "return_last_state": True,
        }

    def packed_conv(self, initial: bool) -> Arguments:
        """A packed prefill of the convolution."""
        return self._filter() | {
            "x": self._after(self._conv_input(self._packed)).T,
            "conv_states": self._windows(self.spec.columns).narrow(-1, 0, self.spec.conv_width - 1),
            "query_start_loc": self._starts(),
            "cache_indices": self._slots(),
            "has_initial_state": self._some() if initial else None,
        }

    def packed_scan(self, initial: bool, computed: bool = False) -> Arguments:
        """A packed prefill of Mamba2; with ``computed``, chunks begin where they would in the whole prompt."""
        given = self._packed_ssm() | {
            "chunk_size": self.spec.chunk_size,
            "cu_seqlens": self._starts(),
            "states": self._states(self.size.slots),
            "state_indices": self._slots(),
            "has_initial_state": self._some() if initial else None,
        }
        return given | {"num_computed_tokens": self._sliced_range()} if computed else given

    def packed_state_update(self) -> Arguments:
        """A packed prefill of Mamba1."""
        return (
            self._packed_ssm()
            | self._seed()
            | {
                "state": self._states(self.size.slots),
                "state_batch_indices": self._slots(),
                "cu_seqlens": self._starts(),
                "max_seqlen": self.size.tokens,
            }
        )

    def copy(self, one_pool: bool) -> Arguments:
        """A copy of each sequence's page, inside a `StatePool` or from another one."""
        pages = self._pages(self.size.slots)
        return {
            "src_pool": pages if one_pool else self._pages(self.size.slots),
            "dst_pool": pages,
            "src_indices": self._slots(),
            "dst_indices": self._slots(),
        }

    def commit(self, buffer: bool, index: bool) -> Arguments:
        """The commit of drafts in a `StatePool`. The states after each token are in a buffer or in slots of their own;
        a count tells which were accepted, or an index as at the ends of blocks."""
        columns, slots, accepted = 1 + self.spec.speculative_tokens, self._slots(), self._accepted()
        of_tokens = self._slots_of_tokens(slots, columns)
        given: Arguments = {
            "conv_states": self._windows(self.spec.columns, self.size.slots * columns).view(
                {2: torch.int16, 4: torch.int32}[self.spec.conv_dtype.itemsize]
            ),
            "ssm_states": None if self.spec.kind == "short_conv" else self._pages(self.size.slots * columns),
            "src_indices": slots if buffer else of_tokens,
            "dst_indices": slots,
            "conv_width": self.spec.conv_width,
        }
        if buffer and self.spec.kind != "short_conv":
            given["intermediate_states"] = self._pages(self.size.sequences * columns).unflatten(0, (-1, columns))
            given["intermediate_indices"] = torch.arange(self.size.sequences, device=self.device) if index else None
        return given | ({"accepted_index": accepted["num_accepted_tokens"] - 1} if index else accepted)

    # --- what they are made of ---

    def _random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)

    def _range(self, end: int, start: int = 0) -> Tensor:
        return torch.arange(start, end, device=self.device, dtype=torch.int32)

    @property
    def _rows(self) -> tuple[int, int]:
        """Token dimensions of a dense prefill."""
        return self.size.sequences, max(1, self.size.tokens // self.size.sequences)

    @property
    def _packed(self) -> int:
        """Tokens of a packed prefill and of the decode steps before it."""
        return self.size.before + self.size.tokens

    def _steps(self, tokens: int) -> tuple[int, ...]:
        """Token dimensions of a decode step."""
        return (self.size.sequences,) if tokens == 1 else (self.size.sequences, tokens)

    def _after(self, rows: Tensor) -> Tensor:
        return rows.narrow(0, self.size.before, rows.shape[0] - self.size.before)

    def _conv_input(self, *tokens: int) -> Tensor:
        """``[*tokens, conv_dim]``, a slice of what the in-projection gives: z, x B C and dt, or x and z."""
        spec, inner = self.spec, self.spec.heads * self.spec.head_dim
        before, after = {"mamba2": (inner, spec.heads), "mamba1": (0, inner), "short_conv": (0, 0)}[spec.kind]
        return self._random(*tokens, before + spec.conv_dim + after).narrow(-1, before, spec.conv_dim)

    def _filter(self) -> Arguments:
        return {
            "weight": self._random(self.spec.conv_dim, self.spec.conv_width),
            "bias": None if self.spec.kind == "short_conv" else self._random(self.spec.conv_dim),
            "activation": self.spec.activation,
        }

    def _ssm(self, *tokens: int) -> Arguments:
        """What the recurrence gets from the projections and from the convolution."""
        return self._mamba1(*tokens) if self.spec.kind == "mamba1" else self._mamba2(*tokens)

    def _mamba1(self, *tokens: int) -> Arguments:
        channels, size = self.spec.head_dim, self.spec.state_size
        rank = 8 * max(1, channels // 256)  # of the step size's projection in every published model
        _, B, C = self._random(*tokens, rank + 2 * size).split((rank, size, size), -1)
        return {
            "x": self._random(*tokens, channels),
            "dt": self._random(*tokens, channels),
            "A": -torch.rand(channels, size, device=self.device) - 1,
            "B": B,
            "C": C,
            "D": self._random(channels),
            "z": self._random(*tokens, 2 * channels).narrow(-1, channels, channels),
            "dt_bias": self._random(channels, dtype=torch.float32) - 4,
            "dt_softplus": True,
        }

    def _mamba2(self, *tokens: int) -> Arguments:
        heads, head_dim, groups, size = self.spec.heads, self.spec.head_dim, self.spec.groups, self.spec.state_size
        inner = heads * head_dim
        x, B, C = self._random(*tokens, self.spec.conv_dim).split((inner, groups * size, groups * size), -1)
        projected = self._random(*tokens, inner + self.spec.conv_dim + heads)
        return {
            "x": x.unflatten(-1, (heads, head_dim)),
            "dt": projected.narrow(-1, inner + self.spec.conv_dim, heads),
            "A": -torch.rand(heads, device=self.device) - 1,
            "B": B.unflatten(-1, (groups, size)),
            "C": C.unflatten(-1, (groups, size)),
            "D": self._random(heads),
            "dt_bias": self._random(heads) - 4,
            "dt_softplus": True,
        }

    def _gate(self, gate: bool, *tokens: int) -> Arguments:
        """Mamba2's, a slice of what the in-projection gives, where no norm after the recurrence takes it."""
        heads, head_dim = self.spec.heads, self.spec.head_dim
        inner = heads * head_dim
        row = self._random(*tokens, inner + self.spec.conv_dim + heads) if gate else None
        return {} if row is None else {"z": row.narrow(-1, 0, inner).unflatten(-1, (heads, head_dim))}

    def _packed_ssm(self) -> Arguments:
        """What comes from the projections is sliced; what the convolution gives is new."""
        given = self._ssm(self._packed)
        sliced = {name: self._after(given[name]) for name in ("dt", "z") if name in given}
        return given | {name: given[name].narrow(0, 0, self.size.tokens) for name in ("x", "B", "C")} | sliced

    def _states(self, count: int) -> Tensor:
        assert self.spec.ssm_shape is not None
        if not self.pooled:  # float32, as the dense scans return them
            return self._random(count, *self.spec.ssm_shape, dtype=torch.float32)
        return self._random(count, 2, *self.spec.ssm_shape, dtype=self.spec.ssm_dtype).select(1, 1)

    def _buffer(self, rows: int, tokens: int) -> Tensor:
        assert self.spec.ssm_shape is not None
        return self._random(rows, tokens, 2, *self.spec.ssm_shape, dtype=self.spec.ssm_dtype).select(2, 1)

    def _windows(self, columns: int, slots: int | None = None) -> Tensor:
        """Of the second of two layers, whose channels stand side by side in a `StatePool`."""
        slots, dim = self.size.slots if slots is None else slots, self.spec.conv_dim
        if not self.pooled:
            return self._random(slots, dim, columns)
        if self.spec.conv_layout == "DS":
            return self._random(slots, 2 * dim, columns, dtype=self.spec.conv_dtype).narrow(1, dim, dim)
        return self._random(slots, columns, 2 * dim, dtype=self.spec.conv_dtype).narrow(2, dim, dim).transpose(1, 2)

    def _slots(self) -> Tensor:
        """A slot for each sequence as far as they go; the others are padding."""
        index = self._range(self.size.sequences, -self.size.before)
        return self._after(torch.where(index < self.size.slots, index, -1))

    def _slots_of_tokens(self, slots: Tensor, columns: int) -> Tensor:
        """A slot for the state after each token."""
        first = slots.unsqueeze(-1)
        return torch.where(first < 0, first, first * columns + self._range(columns))

    def _pages(self, count: int) -> Tensor:
        """Those of a `StatePool` are read as numbers of 32 bits; their length is any multiple of 256 bytes."""
        return torch.zeros(count, 64, device=self.device, dtype=torch.int32)

    def _starts(self) -> Tensor:
        """Bounds of sequences of about equal length, ``[sequences + 1]``."""
        return (self._range(self.size.sequences + 1) * self.size.tokens) // self.size.sequences

    def _some(self) -> Tensor:
        """True for every other sequence."""
        return self._sliced_range() % 2 == 0

    def _sliced_range(self) -> Tensor:
        return self._after(self._range(self.size.sequences, -self.size.before))

    def _accepted(self) -> Arguments:
        drafts = self.spec.speculative_tokens
        return {"num_accepted_tokens": 1 + self._range(self.size.sequences) % (1 + drafts)} if drafts else {}

    def _seed(self) -> Arguments:
        if not self.spec.stochastic_rounding:
            return {}
        seed = torch.randint(2**31, (1,), device=self.device, dtype=torch.int64)
        return {"rand_seed": seed, "philox_rounds": self.spec.philox_rounds}
