"""The state space dual form over chunks of tokens: products inside a chunk, a short recurrence between chunks.

Dao and Gu, "Transformers are SSMs" (2024), section 6. Dense and packed batches differ only in what makes a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from torch_mamba_ops.ops.move import Move
from torch_mamba_ops.ops.packing import sequence_of_token
from torch_mamba_ops.ops.scan import segment_sum


def step_sizes(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_min: float | None, dt_max: float | None
) -> Tensor:
    """Step sizes in float32: bias, softplus, limits."""
    step = dt.float()
    if dt_bias is not None:
        step = step + dt_bias.float()
    if dt_softplus:
        step = softplus(step)
    return step if dt_min is None and dt_max is None else step.clamp(dt_min, dt_max)


def usable_chunk(chunk_size: int, length: int) -> int:
    """A chunk no longer than needed, where the length is known."""
    if not isinstance(length, int):
        return chunk_size
    return min(chunk_size, 1 << max(length - 1, 0).bit_length())


@dataclass(frozen=True)
class Chunks:
    """Which token stands where in [rows, chunks, places].

    Attributes:
        move: of the tokens to their ``chunks * places`` places; None: they are merely reshaped.
        first: bool [chunks], whether a chunk is the first of its sequence.
        size: places in a chunk.
    """

    move: Move | None
    first: Tensor
    size: int

    def split(self, tensor: Tensor) -> Tensor:
        """[rows, tokens, ...] -> [rows, chunks, places, ...], zero where there is no token."""
        places = tensor if self.move is None else self.move(tensor)
        return places.unflatten(1, (self.first.shape[0], self.size))

    def owners(self, sequence: Tensor) -> Tensor:
        """[rows, tokens] -> [rows, chunks, places], that of the last token where there is no token."""
        places = sequence if self.move is None else sequence[:, self.move.source]
        return places.unflatten(1, (self.first.shape[0], self.size))

    def join(self, places: Tensor) -> Tensor:
        """[rows, chunks, places, ...] -> [rows, tokens, ...], zero for tokens that are in no chunk."""
        tokens = places.flatten(1, 2)
        return tokens if self.move is None else self.move.back()(tokens)


def dense_chunks(length: int, chunk_size: int, device: torch.device) -> Chunks:
    """Chunks of one sequence a row."""
    size = usable_chunk(chunk_size, length)
    count = (length + size - 1) // size
    if not isinstance(length, int):
        count = torch.sym_max(count, 2)  # else graphs with one chunk and with several differ
    first = torch.arange(count, device=device) == 0
    if isinstance(length, int) and length % size == 0:
        return Chunks(None, first, size)
    # Moved: padding by a symbolic amount specialises on whether it is zero, a slice on whether it is the whole.
    place = torch.arange(count * size, device=device)
    token = torch.arange(length, device=device)
    return Chunks(Move(place.clamp(max=length - 1), place < length, token, None), first, size)


@dataclass(frozen=True)
class PackedChunks:
    """Chunks of a packed batch; none crosses a sequence, and boundaries are at absolute positions of the sequence.

    Attributes:
        chunks: over the packed tokens, as one row.
        to_first: of what belongs to a sequence to its first chunk.
        from_last: of what belongs to a chunk that is the last of its sequence to the sequence.
        not_empty: bool [sequences].
        sequence_of_token: int64 [tokens].
        covered: bool [tokens], whether the token belongs to a sequence.
    """

    chunks: Chunks
    to_first: Move
    from_last: Move
    not_empty: Tensor
    sequence_of_token: Tensor
    covered: Tensor


def packed_chunks(cu_seqlens: Tensor, tokens: int, chunk_size: int, num_computed_tokens: Tensor | None) -> PackedChunks:
    """Works the chunks out on the device; their number is a bound, so that no shape depends on data."""
    bounds = cu_seqlens.long()
    starts, lengths = bounds[:-1], bounds[1:] - bounds[:-1]
    sequences = starts.shape[0]
    offsets = torch.zeros_like(starts) if num_computed_tokens is None else num_computed_tokens.long() % chunk_size
    counts = torch.where(lengths > 0, (offsets + lengths + chunk_size - 1) // chunk_size, 0)
    ends = counts.cumsum(0)
    begins = ends - counts

    chunk = torch.arange(tokens // chunk_size + 2 * sequences, device=bounds.device)
    sequence = torch.searchsorted(ends, chunk, right=True).clamp(max=sequences - 1)
    place = torch.arange(chunk_size, device=bounds.device)
    local = chunk - begins[sequence]
    position = (local * chunk_size - offsets[sequence])[:, None] + place
    used = chunk < ends[-1]
    present = (position >= 0) & (position < lengths[sequence][:, None]) & used[:, None]
    token = (starts[sequence][:, None] + position).clamp(min=0, max=tokens - 1)

    of_token, position_of_token, covered = sequence_of_token(cu_seqlens, tokens)
    place_of_token = begins[of_token] * chunk_size + position_of_token + offsets[of_token]
    first, not_empty, last = local == 0, lengths > 0, (ends - 1).clamp(min=0)
    return PackedChunks(
        chunks=Chunks(Move(token.flatten(), present.flatten(), place_of_token, covered), first, chunk_size),
        to_first=Move(sequence, first & used, begins, not_empty),
        from_last=Move(last, not_empty, sequence, (chunk == last[sequence]) & used),
        not_empty=not_empty,
        sequence_of_token=of_token,
        covered=covered,
    )


def scan_chunks(
    x: Tensor,
    step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunks: Chunks,
    start: Tensor | None,
    sequence: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs without D and z, and the state at the end of each chunk.

    Args:
        x: ``[rows, tokens, heads, head_dim]``.
        step: ``[rows, tokens, heads]``, float32.
        A: ``[heads]``.
        B: ``[rows, tokens, groups, state]``.
        C: like B.
        chunks: which tokens make a chunk.
        start: ``[rows, chunks, heads, head_dim, state]``, the state before each chunk that is the first of its
            sequence; None: zero.
        sequence: int ``[rows, tokens]``, the sequence of each token where a row holds several one after the other.

    Returns:
        float32 ``[rows, chunks, places, heads, head_dim]`` and ``[rows, chunks, heads, head_dim, state]``.
    """
    heads, head_dim = x.shape[-2:]
    groups = B.shape[-2]
    per_group = heads // groups

    # r row, c chunk, g group, h head of the group; q and k are places, p head_dim, n state.
    xs = chunks.split(x).float().unflatten(-2, (groups, per_group)).permute(0, 1, 3, 4, 2, 5)  # r c g h k p
    Bs, Cs = (chunks.split(t).float().transpose(2, 3) for t in (B, C))  # r c g k n
    steps = chunks.split(step).movedim(2, -1).unflatten(2, (groups, per_group))  # r c g h k
    own = steps.double() * A.double().view(groups, per_group, 1)
    apart, to_end, from_before = _LogDecays.apply(own)  # type: ignore[no-untyped-call]
    total = from_before[..., -1]
    place = torch.arange(chunks.size, device=x.device)
    visible = place[:, None] >= place
    if sequence is not None:
        owner = chunks.owners(sequence)  # r c k
        is_first = torch.arange(owner.shape[1], device=x.device) == 0
        carried = torch.where(is_first, owner[:, :1, 0], owner[:, :, -1].roll(1, 1))  # whose state enters a chunk
        visible = (visible & (owner[..., None] == owner[..., None, :]))[:, :, None, None]
        to_end = torch.where((owner == owner[..., -1:])[:, :, None, None], to_end, -torch.inf)
        from_before = torch.where((owner == carried[..., None])[:, :, None, None], from_before, -torch.inf)
        total = torch.where((owner[..., -1] == carried)[:, :, None, None], total, -torch.inf)

    # Inside a chunk: masked attention with the decay between two places as its weight.
    scores = Cs @ Bs.transpose(-1, -2)  # r c g q k
    between = torch.exp(torch.where(visible, apart, -torch.inf))
    y = (scores.unsqueeze(3) * between * steps[..., None, :]) @ xs  # r c g h q p

    # What a chunk adds to the state: one product a group, [h p, k] x [k, n].
    weighted = (xs * (torch.exp(to_end) * steps)[..., None]).transpose(-1, -2).flatten(3, 4)
    added = (weighted @ Bs).unflatten(3, (per_group, head_dim))  # r c g h p n
    if start is not None:
        begin = start.unflatten(2, (groups, per_group))
        entering = torch.where(chunks.first.view(1, -1, 1, 1, 1, 1), begin, 0.0)
        added = added + torch.exp(total)[..., None, None] * entering

    ends = _pass_between(added, total, chunks.first)
    before = torch.where(chunks.first.view(1, -1, 1, 1, 1, 1), 0.0 if start is None else begin, ends.roll(1, 1))

    # What the state before a chunk gives its places: one product a group, [q, n] x [n, h p].
    given = Cs @ before.permute(0, 1, 2, 5, 3, 4).flatten(4, 5)  # r c g q (h p)
    given = given.unflatten(4, (per_group, head_dim)).transpose(3, 4)  # r c g h q p
    y = y + given * torch.exp(from_before)[..., None]
    return y.permute(0, 1, 4, 2, 3, 5).flatten(3, 4), ends.flatten(2, 3)


class _LogDecays(torch.autograd.Function):
    """Log decay between two places of a chunk, from each to the end, and from before the chunk to each.

    The log decay between two tokens is a difference of two sums that can be much larger: the sums are taken in float64
    and kept as a float32 and what that rounds off. The gradient of a token's own log decay sums what passes over it,
    and nothing that cancels.
    """

    @staticmethod
    def forward(own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """float64 ``[..., places]`` to float32 ``[..., to, from]``, right for from <= to, and two ``[..., places]``."""
        exact = own.cumsum(-1)
        decay = exact.float()
        rest = (exact - decay).float()
        apart = (decay[..., :, None] - decay[..., None, :]) + (rest[..., :, None] - rest[..., None, :])
        return apart, (decay[..., -1:] - decay) + (rest[..., -1:] - rest), decay

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Linear: nothing is saved."""

    @staticmethod
    def backward(ctx: Any, apart: Tensor, to_end: Tensor, from_before: Tensor) -> Tensor:
        place = torch.arange(to_end.shape[-1], device=to_end.device)

        def before(tensor: Tensor) -> Tensor:
            return torch.where(place == 0, 0.0, tensor.cumsum(-1).roll(1, -1))

        over = torch.where(place[:, None] >= place, before(apart), 0.0).sum(-2)
        return (over + before(to_end) + from_before.flip(-1).cumsum(-1).flip(-1)).double()


def _pass_between(added: Tensor, total: Tensor, first: Tensor) -> Tensor:
    """States at the end of each chunk: ``h[i] = sum over j <= i of decay(j to i) added[j]``, j in the sequence of i.

    One product with a [chunks, chunks] matrix, which is zero between sequences. Zero times NaN is NaN, so what is not
    finite is left out of the product; it makes its head NaN from there on in its own sequence, and spoils no other.

    Args:
        added: ``[rows, chunks, groups, heads a group, head_dim, state]``, what each chunk adds.
        total: ``[rows, chunks, groups, heads a group]``, log decay over each chunk.
        first: bool ``[chunks]``, whether a chunk is the first of its sequence.

    Returns:
        like ``added``.
    """
    sequence = first.cumsum(-1)
    chunk = torch.arange(first.shape[0], device=first.device)
    linked = (sequence[:, None] == sequence) & (chunk[:, None] >= chunk)  # to from
    decay = torch.exp(segment_sum(total.movedim(1, -1))).transpose(-1, -2)  # r g h to from
    finite = added.isfinite()
    kept = torch.where(finite, added, 0.0).movedim(1, 3)  # r g h c p n
    ends = torch.where(linked, decay, 0.0) @ kept.flatten(4, 5)
    spoiled = (linked & ~finite.flatten(4, 5).all(-1).movedim(1, -1)[..., None, :]).any(-1, keepdim=True)
    return torch.where(spoiled, torch.nan, ends).unflatten(4, added.shape[4:]).movedim(3, 1)


def packed_scan(
    x: Tensor,
    step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cu_seqlens: Tensor,
    chunk_size: int,
    initial: Tensor | None,
    num_computed_tokens: Tensor | None,
) -> tuple[Tensor, Tensor, PackedChunks]:
    """`scan_chunks` of packed sequences, as one row ``[1, tokens, ...]``.

    Args:
        x, step, A, B, C: as there, with one row.
        cu_seqlens: int ``[sequences + 1]``.
        chunk_size: tokens a chunk.
        initial: ``[sequences, heads, head_dim, state]``, float32; None: zero.
        num_computed_tokens: int ``[sequences]``, tokens of each sequence before these; chunks begin at multiples of the
            chunk size counted from there.

    Returns:
        float32 outputs ``[1, tokens, heads, head_dim]``, zero for tokens of no sequence; states after each sequence,
        ``[sequences, heads, head_dim, state]`` (of empty ones the initial, or zero without); and the chunks.
    """
    packed = packed_chunks(cu_seqlens, x.shape[1], chunk_size, num_computed_tokens)
    start = None if initial is None else packed.to_first(initial.unsqueeze(0))
    y, ends = scan_chunks(x, step, A, B, C, packed.chunks, start)
    states = packed.from_last(ends)[0]
    if initial is not None:
        states = torch.where(packed.not_empty.view(-1, 1, 1, 1), states, initial)
    return packed.chunks.join(y), states, packed


def finish(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None, covered: Tensor | None = None) -> Tensor:
    """Skip connection and gate, in x's dtype; zero for tokens that are not covered."""
    if D is not None:
        y = y + (D[:, None] if D.dim() == 1 else D).float() * x.float()
    if z is not None:
        y = y * silu(z.float())
    if covered is not None:
        y = torch.where(covered[:, None, None], y, 0.0)
    return y.to(x.dtype).contiguous()
