"""Tokens of a batch as rows [batch, length, ...], whether they come one each, several each, or packed."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_mamba_ops.ops.packing import sequence_of_token


class RaggedTokens:
    """Maps tensors between the caller's layout of tokens and rows.

    Args:
        x: ``[batch, *channels]``, ``[batch, length, *channels]`` or, with cu_seqlens, ``[total_tokens, *channels]``.
        channel_dims: how many trailing dimensions of x are channels.
        cu_seqlens: [batch + 1], first token of each sequence.
        max_seqlen: length of the rows in a packed batch.

    Attributes:
        present: [batch, length] bool, whether that token exists; None: all do.
        not_empty: [batch] bool, whether the sequence has a token; None: all have.
        lengths: [batch] int64, tokens of each sequence; None: all have the rows' length.
    """

    def __init__(self, x: Tensor, channel_dims: int, cu_seqlens: Tensor | None, max_seqlen: int | None) -> None:
        self.single = cu_seqlens is None and x.dim() == channel_dims + 1
        self.present: Tensor | None = None
        self.not_empty: Tensor | None = None
        self.lengths: Tensor | None = None
        self._cu_seqlens = cu_seqlens
        if cu_seqlens is not None:
            assert max_seqlen is not None
            self._total = x.shape[0]
            starts = cu_seqlens[:-1].long()
            self.lengths = cu_seqlens[1:].long() - starts
            steps = torch.arange(max_seqlen, device=x.device)
            self._index = (starts[:, None] + steps).clamp(max=x.shape[0] - 1)
            self.present = steps < self.lengths[:, None]
            self.not_empty = self.lengths > 0

    def rows(self, tensor: Tensor) -> Tensor:
        """[batch, length, ...]; what stands for a missing token is arbitrary."""
        if self._cu_seqlens is not None:
            return tensor[self._index]
        return tensor.unsqueeze(1) if self.single else tensor

    def unrows(self, rows: Tensor) -> Tensor:
        """The caller's layout; zero for packed tokens that belong to no sequence."""
        if self._cu_seqlens is None:
            return rows.squeeze(1) if self.single else rows
        sequence, position, valid = sequence_of_token(self._cu_seqlens, self._total)
        packed = rows[sequence, position.clamp(max=rows.shape[1] - 1)]
        return torch.where(valid.view(-1, *([1] * (packed.dim() - 1))), packed, 0.0)

    def last(self, rows: Tensor) -> Tensor:
        """[batch, ...], the row of each sequence's last token."""
        if self.lengths is None:
            return rows[:, -1]
        batch = torch.arange(rows.shape[0], device=rows.device)
        return rows[batch, (self.lengths - 1).clamp(min=0, max=rows.shape[1] - 1)]

    def steps_present(self, mask: Tensor) -> Tensor:
        """``mask`` [batch, columns] without the tokens that do not exist."""
        return mask if self.present is None else mask & self.present[:, : mask.shape[1]]
