"""What an operation writes in place: refused before anything is written if it cannot be."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def check_writable(name: str, tensor: Tensor) -> None:
    """Raises a ValueError for a tensor that autograd needs, or that holds two elements in one place."""
    if tensor.requires_grad:
        raise ValueError(f"{name}: requires grad, expected a tensor that can be updated in place")
    if _has_addresses(tensor) and torch._debug_has_internal_overlap(tensor) == 1:
        strides = ", ".join(map(str, tensor.stride()))
        raise ValueError(f"{name}: got strides [{strides}], where elements share memory, expected one place each")


def check_disjoint(name: str, written: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """Raises a ValueError if a tensor to be written overlaps another."""
    if not _has_addresses(written):  # a compiled graph orders its reads and writes anyway
        return
    for other, tensor in others.items():
        if tensor is not None and (written is tensor or _overlap(written, tensor)):
            raise ValueError(f"{name}: shares memory with {other}, expected a tensor of its own")


def _has_addresses(tensor: Tensor) -> bool:
    return not torch.compiler.is_compiling() and type(tensor) in (Tensor, torch.nn.Parameter)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may share an element. Apart are those with no address in common, and those that take turns
    in pages: layers side by side in one allocation, the same stride from slot to slot."""
    if a.numel() == 0 or b.numel() == 0 or not _has_addresses(b) or a.device != b.device:
        return False
    first, second = a.data_ptr(), b.data_ptr()
    if first + _reach(a) <= second or second + _reach(b) <= first:
        return False
    page = _page(a)
    if page != _page(b) or page == 0:
        return True
    ahead = (second - first) % page
    return not (_reach(a[0]) <= ahead and ahead + _reach(b[0]) <= page)


def _reach(tensor: Tensor) -> int:
    """Bytes from the first element's to the end of the last's."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size()


def _page(tensor: Tensor) -> int:
    return tensor.stride(0) * tensor.element_size() if tensor.dim() else 0
