"""How the causal convolution of whole sequences is started by Triton, packed or dense: which kernel, on what blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torch_mamba_ops.ops.launch import Launch
from torch_mamba_ops.tuning import configs_for, key_of


def plan(
    x: Tensor,
    out: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    windows: Tensor | None,
    activation: str | None,
    *,
    bounds: Tensor | None = None,
    slots: Tensor | None = None,
    known: Tensor | None = None,
    owners: Tensor | None = None,
    pad_slot_id: int = -1,
) -> Launch:
    """Works out a launch from metadata alone.

    Args:
        x: ``[dim, tokens]`` packed, or ``[batch, dim, length]``.
        out: like x; written.
        weight: ``[dim, width]``.
        bias: ``[dim]``.
        windows: ``[slots, dim, columns]``, what is before the sequences; packed: written.
        activation: ``"silu"`` or None.
        bounds: int ``[sequences + 1]``, the first token of each packed sequence; None: x is dense.
        slots: int ``[sequences]``, packed.
        known: bool ``[sequences]``, whether a packed sequence's window counts; None: none does.
        owners: int ``[batch, length]``, dense: inputs count for tokens of the same number.
        pad_slot_id: the slot of packed sequences that are padding.
    """
    from torch_mamba_ops.ops import conv_kernels

    packed = bounds is not None
    dim, length = int(x.shape[-2]), x.shape[-1]
    sequences = x.shape[0] if bounds is None else bounds.shape[0] - 1
    tokens = length if packed else sequences * length
    tokens_innermost = x.stride(-1) == 1 and out.stride(-1) == 1 and x.stride(-2) != 1
    config = _config(x, tokens, dim, int(weight.shape[1]), tokens_innermost)
    block = config["BLOCK_T"]
    blocks = length // block + sequences + 2 if packed else sequences * _blocks(length, block)
    tensors = {
        "out_ptr": out,
        "state_ptr": windows,
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "bounds_ptr": bounds,
        "slots_ptr": slots,
        "known_ptr": known,
        "owners_ptr": owners,
    }
    state_slot, state_dim, state_column = (0, 0, 0) if windows is None else windows.stride()
    options: dict[str, Any] = {
        "length": length,
        "sequences": sequences,
        "columns": 0 if windows is None else windows.shape[2],
        "pad_slot_id": pad_slot_id,
        "x_sequence": 0 if packed else x.stride(0),
        "x_dim": x.stride(-2),
        "out_sequence": 0 if packed else out.stride(0),
        "out_dim": out.stride(-2),
        "state_slot": state_slot,
        "state_dim": state_dim,
        "state_column": state_column,
        "owners_sequence": 0 if owners is None else owners.stride(0),
        "owners_token": 0 if owners is None else owners.stride(1),
        "DIM": dim,
        "WIDTH": int(weight.shape[1]),
        "WEIGHT_DIM": weight.stride(0),
        "WEIGHT_TAP": weight.stride(1),
        "BIAS_DIM": 0 if bias is None else bias.stride(0),
        "PACKED": packed,
        "READS": windows is not None if not packed else known is not None,
        "HAS_BIAS": bias is not None,
        "HAS_SLOTS": slots is not None,
        "HAS_OWNERS": owners is not None,
        "SILU": activation == "silu",
        **config,
    }
    if tokens_innermost:
        kernel = conv_kernels.convolve_tokens
        options["GROUP"] = _vector(x)
    else:
        kernel = conv_kernels.convolve_channels
        options |= {"x_token": x.stride(-1), "out_token": out.stride(-1)}
    return Launch(kernel, (blocks * _blocks(dim, config["BLOCK_D"]),), tensors, options)


def _config(x: Tensor, tokens: int, dim: int, width: int, tokens_innermost: bool) -> dict[str, Any]:
    """Channels and tokens of a program. The same serves packed and dense sequences.

    Where channels lie side by side, a thread has four: with eight there are registers for half as many threads. Blocks
    are as long as leaves programs for two rounds of the card, since a block also loads the ``width - 1`` tokens before.
    """
    key = key_of(x.dtype, W=width, TI=int(tokens_innermost))
    found = configs_for("causal_conv1d_varlen_fn", key, tokens * dim, x.device)
    if found is not None:
        return found
    if tokens_innermost:
        return {"BLOCK_D": 8, "BLOCK_T": 32 * _vector(x), "num_warps": 4}
    block = 64
    if isinstance(tokens, int):
        threads = tokens * dim // 4  # if each had one token; a card runs some 2**17 at a time
        block = next((size for size in (128, 64, 32) if threads >= size * 2**18), 16)
    return {"BLOCK_D": 512, "BLOCK_T": block, "UNROLL": 4, "num_warps": 4}


def _vector(x: Tensor) -> int:
    """Elements in 16 bytes."""
    return 16 // x.element_size()


def _blocks(count: int, size: int) -> int:
    return (count + size - 1) // size
