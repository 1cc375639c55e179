"""What the copies of states share: a tile of many slots moved as if all of them were read before any is written.

A program has one tile of a slot and one copy. In one pool a copy must not write what another has still to read: copies
that clash are left to one more program, which makes all of them, for its tile, in an order that is right.

``listed`` is the list of copies in memory, ``tile`` a part of a slot: see `read` and `load`. ``KIND`` tells sources and
destinations apart: ``"apart"``, two pools; ``"pool"``, one pool; ``"window"``, one pool of windows whose columns also
move, see `source_columns`; ``"buffer"``, from a buffer that has, for each copy, a row of states to take one from.
"""

from __future__ import annotations

import triton
import triton.language as tl

LANES: tl.constexpr = tl.constexpr(128)  # each with a bit for up to 63 copies: `copying.MOST_IN_ONE_POOL`


@triton.jit
def copy_slots(copy, listed, tile, KIND: tl.constexpr):
    """Makes copy number ``copy - 1``; 0 stands for all copies that clash, which may take longest and so start first."""
    copy -= 1
    if copy >= 0:
        slots = read(tl.full([], copy, tl.int64), listed, KIND)
        if slots[3]:
            values = load(slots, tile, KIND)
            free = True
            if KIND == "pool" or KIND == "window":  # looked up while the values are on their way
                free = tl.max(clashing(copy + tl.arange(0, 1), listed, KIND, LANES)) == 0
            if KIND == "window":
                tl.debug_barrier()  # a thread may store what another one loads
            if free:
                store(values, slots, listed, tile, KIND)
    elif KIND == "pool" or KIND == "window":
        copy_clashing(listed, tile, KIND)


@triton.jit
def read(k, listed, KIND: tl.constexpr):
    """Of the copies numbered ``k``: source, destination, accepted token, whether there is work to do, and ``k``.

    ``listed``: how many copies; the slot that pads; pointers to source and destination slots, accepted tokens and rows
    of the buffer, the last two or None; their strides, sources' by copy and by token; the number of the first token and
    the last token there is.
    """
    count, pad, sources, targets, accepted, rows = listed[:6]
    source_copy, source_token, target_copy, accepted_copy, row_copy, first, last = listed[6:]
    there = (k >= 0) & (k < count)
    token = k * 0
    if accepted is not None:
        token = tl.load(accepted + k * accepted_copy, there, 0).to(tl.int64)
        token = tl.minimum(tl.maximum(token - first, 0), last)
    source = tl.load(sources + k * source_copy + token * source_token, there, pad).to(tl.int64)
    target = tl.load(targets + k * target_copy, there, pad).to(tl.int64)
    there = there & (source != pad) & (target != pad)
    if KIND == "buffer":
        source = k
        if rows is not None:
            source = tl.load(rows + k * row_copy, there, pad).to(tl.int64)
            there = there & (source != pad)
    elif KIND == "window":
        there = there & ((source != target) | (token > 0))
    elif KIND == "pool":
        there = there & (source != target)
    return source, target, token, there, k


@triton.jit
def load(slots, tile, KIND: tl.constexpr):
    """The tile of a source.

    ``tile``: pointers to the source and the destination; where its elements are in a slot of either (for a window: but
    for the column of the source), and which of them are inside; for a window, see `source_columns`; strides over the
    source's and the destination's slots and over the source's tokens, which for a window are its columns.
    """
    source_ptr, _, source_at, _, inside, window, source_slot, _, source_token = tile
    if KIND == "window":
        column, there = source_columns(slots, window)
        at = slots[0] * source_slot + source_at + column * source_token
        return tl.load(source_ptr + at, inside & there)
    else:
        return tl.load(source_ptr + (slots[0] * source_slot + slots[2] * source_token) + source_at, inside)


@triton.jit
def store(values, slots, listed, tile, KIND: tl.constexpr):
    """Writes the tile of a destination; columns that have no source stay as they are.

    The destination is read here once more: torch.compile takes a pointer for written if it led to an address through a
    call, such as that of `read`.
    """
    _, target_ptr, _, target_at, inside, window, _, target_slot, _ = tile
    target = tl.load(listed[3] + slots[4] * listed[8]).to(tl.int64)
    if KIND == "window":
        inside = inside & source_columns(slots, window)[1]
    tl.store(target_ptr + target * target_slot + target_at, values, inside)


@triton.jit
def source_columns(slots, window):
    """The columns that come to a window's columns, and whether any does.

    The step's tokens stand in columns ``width - 2`` and up. Without parents each one's parent is the one before it, so
    that all columns move down by the accepted token's number. With parents the window is found upwards from the
    accepted token: from a root on, parents are the inputs before the step.

    ``window``: the columns to fill and how many there are; the pointer to the parents, or None, and its strides by copy
    and by token; the taps of the filter.
    """
    column, columns, parents, parents_copy, parents_token, width = window
    node = slots[2] + column * 0
    if parents is None:
        return node + column, node + column < columns
    else:
        for step in range(0, width - 2):
            up = column + step < width - 2
            row = parents + slots[4] * parents_copy
            parent = tl.load(row + node * parents_token, up & (node >= 0), -1).to(tl.int64)
            node = tl.where(up, tl.where(node >= 0, tl.maximum(parent, -1), node - 1), node)
        return node + (width - 2), column < width - 1


@triton.jit
def clashing(k, listed, KIND: tl.constexpr, AT_ONCE: tl.constexpr):
    """Whether (1 or 0) each of the copies numbered ``k`` writes what another reads or reads what another writes."""
    own = read(k.to(tl.int64), listed, KIND)
    found = tl.zeros_like(k)
    for start in range(0, listed[0], AT_ONCE):
        other = start + tl.arange(0, AT_ONCE)
        slots = read(other.to(tl.int64), listed, KIND)
        meets = (slots[0][None, :] == own[1][:, None]) | (slots[1][None, :] == own[0][:, None])
        meets = meets & slots[3][None, :] & own[3][:, None] & (other[None, :] != k[:, None])
        found = tl.maximum(found, tl.max(meets.to(tl.int32), 1))
    return found


@triton.jit
def copy_clashing(listed, tile, KIND: tl.constexpr):
    """Makes all copies that clash. A slot is written by one copy and may be read by several, so that each copy waits
    for some others and at most one waits for it, at a time: chains that may begin with branches and may end in a ring.
    """
    lane = tl.arange(0, LANES)
    waiting = tl.zeros([LANES], tl.int64)
    for start in range(0, listed[0], LANES):
        waiting |= clashing(start + lane, listed, KIND, 8).to(tl.int64) << (start // LANES)
    if tl.max((waiting != 0).to(tl.int32)) > 0:
        # Down the chains: a copy whose destination nobody has to read any more, then the one that writes its source.
        for first in range(0, listed[0]):
            copy = tl.full([], first, tl.int64)
            slots = read(copy, listed, KIND)
            free = is_waiting(copy, waiting) & (find("reader", slots[1], copy, waiting, listed, KIND) < 0)
            while free:
                move(slots, listed, tile, KIND)
                waiting = without(copy, waiting)
                copy = find("writer", slots[0], copy, waiting, listed, KIND)
                slots = read(copy, listed, KIND)
                free = (copy >= 0) & (find("reader", slots[1], copy, waiting, listed, KIND) < 0)
        # What is left are rings: what the last copy reads, the first one writes.
        for first in range(0, listed[0]):
            copy = tl.full([], first, tl.int64)
            if is_waiting(copy, waiting):
                slots = read(copy, listed, KIND)
                last = find("reader", slots[1], copy, waiting, listed, KIND)
                last_slots = read(last, listed, KIND)
                values = load(last_slots, tile, KIND)
                tl.debug_barrier()
                while (copy >= 0) & (copy != last):
                    move(slots, listed, tile, KIND)
                    waiting = without(copy, waiting)
                    copy = find("writer", slots[0], copy, waiting, listed, KIND)
                    slots = read(copy, listed, KIND)
                store(values, last_slots, listed, tile, KIND)
                tl.debug_barrier()
                waiting = without(last, waiting)


@triton.jit
def move(slots, listed, tile, KIND: tl.constexpr):
    """One of several copies that a program makes one after the other: its threads wait for each other."""
    values = load(slots, tile, KIND)
    tl.debug_barrier()
    store(values, slots, listed, tile, KIND)
    tl.debug_barrier()


@triton.jit
def find(WHAT: tl.constexpr, slot, but, waiting, listed, KIND: tl.constexpr):
    """The number of a waiting copy, ``but`` one, that reads or writes a slot; -1 if there is none."""
    found = tl.full([LANES], -1, tl.int64)
    for start in range(0, listed[0], LANES):
        k = (start + tl.arange(0, LANES)).to(tl.int64)
        slots = read(k, listed, KIND)
        its = slots[1]
        if WHAT == "reader":
            its = slots[0]
        waits = ((waiting >> (start // LANES)) & 1) != 0
        found = tl.maximum(found, tl.where(slots[3] & waits & (its == slot) & (k != but), k, -1))
    return tl.max(found)


@triton.jit
def is_waiting(copy, waiting):
    """Whether a copy is among those that wait."""
    own = tl.arange(0, LANES) == copy % LANES
    return tl.max(tl.where(own, (waiting >> (copy // LANES)) & 1, 0)) > 0


@triton.jit
def without(copy, waiting):
    """Those that wait, less one."""
    own = tl.arange(0, LANES) == copy % LANES
    bit = tl.full([LANES], 1, tl.int64) << tl.maximum(copy, 0) // LANES
    return tl.where(own, waiting & ~bit, waiting)
