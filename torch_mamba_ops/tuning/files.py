"""Tables are JSON files by device, those of the user's folder over the shipped ones: where they are, what is a key."""

from __future__ import annotations

import os
from pathlib import Path

import torch

VARIABLE = "TORCH_MAMBA_OPS_CONFIGS"
SHIPPED = Path(__file__).parent / "tables"
_gpus: dict[int | None, str] = {}


def folders() -> list[Path]:
    """The folders of tables; a later one stands over an earlier one."""
    return [SHIPPED, *([Path(os.environ[VARIABLE])] if os.environ.get(VARIABLE) else [])]


def table_name(device: torch.device) -> str:
    """The file's name for a device: ``nvidia_h200``."""
    return _gpu(device.index) if device.type == "cuda" else device.type


def key_of(dtype: torch.dtype, **sizes: int) -> str:
    """For example ``bfloat16 P64 N128``."""
    return " ".join([str(dtype).removeprefix("torch."), *(f"{name}{size}" for name, size in sizes.items())])


def spelled(name: str) -> str:
    """The name of a GPU, ``NVIDIA H200``, as tables are called."""
    return "_".join(name.lower().replace("-", " ").split())


def _gpu(index: int | None) -> str:
    if index in _gpus:
        return _gpus[index]
    if not torch.cuda.is_available():
        return "none"
    name = spelled(torch.cuda.get_device_name(index))
    if index is not None:  # else the current one, which changes
        _gpus[index] = name
    return name


# What torch.compiler.assume_constant_result does, which would load the compiler when the package is imported. A graph
# is guarded by its tensors' devices, and the name of one does not change.
_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]
