"""Which heads, groups and channels each of several devices has. Pure numbers: everything here agrees with it.

Heads are split evenly, in order. B and C of a group serve several heads: a device has the groups of its own heads. When
the devices divide the groups that is an even split; when they do not, devices that share a group each have a copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def check_divides(name: str, count: int, devices: int, what: str = "heads") -> None:
    """Raises a ValueError if the devices cannot split the heads evenly."""
    if count % devices != 0:
        raise ValueError(
            f"{name}: got {count} {what}, expected a multiple of the {devices} devices they are split over"
        )


def heads_of(heads: int, devices: int, device: int) -> range:
    """The heads of a device."""
    mine = heads // devices
    return range(device * mine, (device + 1) * mine)


def groups_of(heads: int, groups: int, devices: int, device: int) -> tuple[int, ...]:
    """The group of each equal block of the device's heads, in order: what its B and C hold.

    Most often a run of groups, or one group that other devices have too. A group comes twice only where the device's
    heads do not begin and end where groups do (12 heads in 3 groups on 2 devices: 0, 0, 1 and 1, 2, 2), since every
    group of a call serves equally many heads.
    """
    mine, a_group = heads_of(heads, devices, device), heads // groups
    block = math.gcd(len(mine), a_group)
    return tuple(head // a_group for head in mine[::block])


def conv_channels_of(
    heads: int, head_dim: int, groups: int, state_size: int, devices: int, device: int
) -> tuple[range, ...]:
    """The channels x | B | C of the convolution that a device has, as runs in the order it holds them."""
    mine = heads_of(heads, devices, device)
    inner = heads * head_dim
    found = [range(mine.start * head_dim, mine.stop * head_dim)]
    if groups:
        owned = groups_of(heads, groups, devices, device)
        for first in (inner, inner + groups * state_size):
            found += [range(first + g * state_size, first + (g + 1) * state_size) for g in owned]
    return tuple(joined(found))


def joined(runs: Sequence[range]) -> Iterator[range]:
    """The same numbers in fewer runs."""
    start = stop = 0
    for run in runs:
        if run.start != stop:
            if stop > start:
                yield range(start, stop)
            start = run.start
        stop = run.stop
    if stop > start:
        yield range(start, stop)


def take(tensor: Tensor, dim: int, runs: Sequence[range]) -> Tensor:
    """The runs of a dimension, one after the other: a view if there is one. Differentiable."""
    parts = [tensor.narrow(dim, run.start, len(run)) for run in joined(runs)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
