"""How copies of states are laid out for a GPU: blocks as few dimensions, strides in units of 16 bytes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

BLOCK_BYTES = 8192  # that a program moves: 4 accesses of 16 bytes for each of 128 threads, 8 programs at once on an SM
MOST_IN_ONE_POOL = 8064  # copies; see `copy_kernels.copy_clashing`


def reasons_against_copies(pool: Tensor, copies: int, *, one_pool: bool) -> list[str]:
    """Why the kernels cannot copy slots of this pool."""
    reasons = []
    if pool.is_complex():
        reasons.append(f"Triton has no {pool.dtype}")
    if one_pool and copies > MOST_IN_ONE_POOL:
        reasons.append(f"it keeps track of up to {MOST_IN_ONE_POOL} copies in one pool, not {copies}")
    return reasons


def joined(size: Sequence[int], *strides: Sequence[int]) -> list[tuple[int, ...]]:
    """A block's dimensions, each a size and a stride in every tensor, in as few as it takes: those that follow each
    other in all tensors are one, and the innermost in the first tensor comes last."""
    dims = [dim for dim in zip(size, *strides, strict=True) if dim[0] != 1]
    dims.sort(key=lambda dim: dim[1], reverse=True)
    found: list[tuple[int, ...]] = []
    for dim in dims:
        if found and all(outer == dim[0] * inner for outer, inner in zip(found[-1][1:], dim[1:], strict=True)):
            found[-1] = (found[-1][0] * dim[0], *dim[1:])
        else:
            found.append(dim)
    return found or [(1, *(1 for _ in strides))]


def units(element_size: int, *strides: int) -> int:
    """The elements in 16 bytes if all strides are whole numbers of them, else 1."""
    unit = 16 // element_size
    return unit if all(stride % unit == 0 for stride in strides) else 1


def tiles(size: int, block: int) -> int:
    """Blocks that a slot is cut into."""
    return (size + block - 1) // block


def is_dense(tensor: Tensor, outer: int) -> bool:
    """Whether what follows the first ``outer`` dimensions is contiguous."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape[outer:]), reversed(tensor.stride()[outer:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
