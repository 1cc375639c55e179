"""The contract of the state copy."""

from __future__ import annotations

from torch import Tensor

from torch_mamba_ops.dispatch import Op
from torch_mamba_ops.dispatch.mutation import check_disjoint
from torch_mamba_ops.ops.checks import INTEGER, check_rank, check_tensor
from torch_mamba_ops.ops.pool import check_slots


def _fake(*tensors: Tensor | None, **options: object) -> None:
    return None


OP = Op(
    "copy_states(Tensor? src_pool, Tensor(a!) dst_pool, Tensor src_indices, Tensor dst_indices, *, int pad_slot_id, "
    "str backend) -> ()",
    fake=_fake,
    auto=("triton", "reference"),
)


def copy_states(
    src_pool: Tensor,
    dst_pool: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    *,
    pad_slot_id: int = -1,
    backend: str | None = None,
) -> None:
    """Copies ``dst_pool[dst_indices[i]] = src_pool[src_indices[i]]`` for all i: prefix caching, speculative commit.

    All sources are read before anything is written, so pools may be the same tensor and slots may swap.

    Args:
        src_pool: ``[slots, ...]``, any strides.
        dst_pool: ``[slots, ...]``, any strides, same inner shape; may be ``src_pool``. Mutated.
        src_indices: int ``[copies]``.
        dst_indices: int ``[copies]``, no slot twice.
        pad_slot_id: a copy whose source or destination is this slot is left out.
        backend: the backend's name; None: as chosen by context, process, environment or automatically.

    Raises:
        ValueError: a shape, device or slot is wrong.
        TypeError: a dtype is wrong.
    """
    check_rank("src_pool", src_pool, range(1, 9), "[slots, ...]")
    check_rank("dst_pool", dst_pool, range(1, 9), "[slots, ...]")
    check_tensor(
        "src_pool",
        src_pool,
        (src_pool.shape[0], *dst_pool.shape[1:]),
        "[slots, ...]",
        dst_pool.device,
        (dst_pool.dtype,),
    )
    check_rank("src_indices", src_indices, (1,), "[copies]")
    check_tensor("src_indices", src_indices, src_indices.shape, "[copies]", dst_pool.device, INTEGER)
    check_tensor("dst_indices", dst_indices, src_indices.shape, "[copies], like src_indices", dst_pool.device, INTEGER)
    check_slots("src_indices", src_indices, src_pool.shape[0], pad_slot_id)
    check_slots("dst_indices", dst_indices, dst_pool.shape[0], pad_slot_id, written=True)
    source = None if src_pool is dst_pool else src_pool  # one tensor may not be both read and (a!) in a schema
    check_disjoint("dst_pool", dst_pool, {"src_pool": source})
    OP(backend, (source, dst_pool, src_indices, dst_indices), {"pad_slot_id": pad_slot_id})
