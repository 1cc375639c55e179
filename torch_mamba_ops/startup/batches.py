"""Which batches to run so that serving meets no other kernel.

Triton compiles a kernel apart for each of its numbers that is 1 or divisible by 16 and for where each tensor begins,
and a kernel's config changes with the work there is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from torch_mamba_ops.startup.calls import Phase
from torch_mamba_ops.startup.scratch import Size
from torch_mamba_ops.tuning.ladder import Lookup

_BEFORE = (0, 1, 4)  # slices of indices, int32 and bool, then both begin at 16 bytes, neither, and only int32


@dataclass(frozen=True)
class Limits:
    """What serving keeps to.

    Attributes:
        batch_sizes: sequences of a decode step.
        max_tokens: of one prefill, all sequences together.
    """

    batch_sizes: Sequence[int]
    max_tokens: int

    def __post_init__(self) -> None:
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes: got {self.batch_sizes}, expected positive numbers")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens: got {self.max_tokens}, expected a positive number")

    @property
    def largest(self) -> int:
        """Sequences of the largest batch."""
        return max(self.batch_sizes)

    def amounts(self, phase: Phase) -> list[int]:
        """Of sequences of a decode step, of tokens of a prefill: from few to all, a factor of two apart or less."""
        if phase == "decode":
            return sorted(set(self.batch_sizes))
        return [1 << n for n in range(4, self.max_tokens.bit_length()) if 1 << n < self.max_tokens] + [self.max_tokens]


def sizes(phase: Phase, limits: Limits, device: torch.device, *, few_slots: bool) -> list[Size]:
    """The batches of a call, the smallest first.

    Args:
        phase: how the call's batches are made up.
        limits: none is larger.
        device: on a CPU one is enough.
        few_slots: whether the pool may have fewer slots than there are sequences.
    """
    amounts = limits.amounts(phase)
    if device.type != "cuda":
        found = {(amounts[0] if phase == "decode" else 1, amounts[0], 0)}
    elif phase == "decode":
        found = {(n, n, 0) for n in (1, 3, 16, *amounts)}
    elif phase == "dense":
        found = {(n, n * length, 0) for n in (1, 3, 16) for length in (1, 16, 17)}
        found |= {(1, tokens, 0) for tokens in amounts}
    else:
        found = {(n, tokens, before) for n in (1, 3, 16) for tokens in (1, 48, 50) for before in _BEFORE if n <= tokens}
        found |= {(1, tokens, 0) for tokens in amounts}
    made = [Size(sequences, tokens, before, few_slots) for sequences, tokens, before in sorted(found)]
    return [size for size in made if _within(phase, limits, size)]


def sizes_of_levels(phase: Phase, limits: Limits, size: Size, lookups: Iterable[Lookup]) -> list[Size]:
    """The batches from which another config holds, as what a call of this size asked for tells. A kernel's work grows
    with the sequences or with the tokens; each is tried."""
    found = []
    for asked in lookups:
        for least in asked.levels:
            sequences, tokens = (-(-least * amount // asked.work) for amount in (size.sequences, size.tokens))
            if phase != "decode":
                found.append(replace(size, tokens=max(tokens, 1)))
            found.append(replace(size, sequences=sequences, tokens=max(sequences, size.tokens)))
    return [size for size in found if _within(phase, limits, size)]


def _within(phase: Phase, limits: Limits, size: Size) -> bool:
    return size.sequences <= limits.largest and (phase == "decode" or size.tokens <= limits.max_tokens)
