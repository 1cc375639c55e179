"""How the operators run on DTensors: each device its own heads (or channels, or sequences), without communication.

A rule of this package rather than a sharding strategy of DTensor's, for two things those cannot say: a state that is
updated in place must never be redistributed, since the update would go to a copy; and where the devices do not divide
the groups, B and C are whole everywhere, of which each device takes the groups of its own heads.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from torch_mamba_ops.dispatch import OPS, BackendError, Op
from torch_mamba_ops.dispatch.mutation import check_disjoint, check_writable

from .split import check_divides, groups_of, take

Tensors = Mapping[str, Tensor | None]


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """A way to run a call on several devices, each on its part.

    Attributes:
        what: that is split, for messages.
        dims: the dimension split of each argument that is; other arguments are whole on every device.
        outputs: the dimension split of each output; None: the output is whole everywhere.
        groups: the dimension of arguments that hold groups of heads; these follow the heads.
        even: whether every device must have equally many.
        unit: elements that must stay on one device. Where they would not, the call runs whole on every device.
    """

    what: str
    dims: Mapping[str, int]
    outputs: tuple[int | None, ...]
    groups: Mapping[str, int] = dataclasses.field(default_factory=dict)
    even: bool = True
    unit: int = 1


def _selective_state_update(given: Tensors, options: Mapping[str, Any]) -> list[Split]:
    state, x, buffer = given["state"], given["x"], given["intermediate_states_buffer"]
    assert state is not None and x is not None
    by_head = state.dim() == 4
    channel = x.dim() - (state.dim() - 2)  # after the dimensions of tokens
    per_token = {"x": channel, "dt": channel, "z": channel}
    per_head = {"A": 0, "D": 0, "dt_bias": 0}
    grouped = {"B": channel, "C": channel} if by_head else {}
    pools = {"state": 1, "intermediate_states_buffer": 2}
    splits = [Split("heads" if by_head else "channels", pools | per_token | per_head, (channel,), grouped)]
    slots = ("state_batch_indices", "dst_state_batch_indices", "cu_seqlens", "intermediate_state_indices")
    if _absent(given, slots) and (buffer is None or buffer.shape[0] == x.shape[0]):
        tokens = dict.fromkeys(("state", "x", "dt", "z", "B", "C", "intermediate_states_buffer", "parents"), 0)
        splits.append(Split("sequences", tokens, (0,), even=False))
    return splits


def _causal_conv1d_update(given: Tensors, options: Mapping[str, Any]) -> list[Split]:
    splits = [Split("channels", {"x": 1, "conv_state": 1, "weight": 0, "bias": 0}, (1,))]
    if _absent(given, ("conv_state_indices", "query_start_loc")):
        tokens = dict.fromkeys(("x", "conv_state", "cache_seqlens", "num_accepted_tokens", "parents"), 0)
        splits.append(Split("sequences", tokens, (0,), even=False))
    return splits


def _causal_conv1d_fn(given: Tensors, options: Mapping[str, Any]) -> list[Split]:
    return [
        Split("channels", {"x": 1, "weight": 0, "bias": 0, "initial_states": 1}, (1,)),
        Split("sequences", {"x": 0, "seq_idx": 0, "initial_states": 0}, (0,), even=False),
    ]


def _causal_conv1d_varlen_fn(given: Tensors, options: Mapping[str, Any]) -> list[Split]:
    return [Split("channels", {"x": 0, "weight": 0, "bias": 0, "conv_states": 1}, (0,))]


def _mamba_chunk_scan_combined(given: Tensors, options: Mapping[str, Any]) -> list[Split]:
    per_token, per_head = dict.fromkeys(("x", "dt", "z"), 2), dict.fromkeys(("A", "D", "dt_bias"), 0)
    splits = [Split("heads", per_token | per_head | {"initial_states": 1}, (2, 1, 1), {"B": 2, "C": 2})]
    if given["cu_seqlens"] is None:
        rows = dict.fromkeys(("x", "dt", "B", "C", "z", "initial_states", "seq_idx"), 0)
        splits.append(Split("sequences", rows, (0, 0, None), even=False))
    return splits


def _mamba_chunk_scan_combined_varlen(given: Tensors, options: Mapping[str, Any]) -> list[Split]:
    per_token, per_head = dict.fromkeys(("x", "dt", "z"), 1), dict.fromkeys(("A", "D", "dt_bias"), 0)
    return [Split("heads", per_token | per_head | {"states": 1}, (1,), {"B": 1, "C": 1})]


def _selective_scan_fn(given: Tensors, options: Mapping[str, Any]) -> list[Split]:
    ranks = {name: tensor.dim() for name in ("B", "C") if (tensor := given[name]) is not None}
    per_token, per_channel = dict.fromkeys(("u", "delta", "z"), 1), dict.fromkeys(("A", "D", "delta_bias"), 0)
    per_channel |= {name: 0 for name, rank in ranks.items() if rank == 2}
    rows = dict.fromkeys(("u", "delta", "z"), 0) | {name: 0 for name, rank in ranks.items() if rank > 2}
    grouped = {name: 1 for name, rank in ranks.items() if rank == 4}
    return [
        Split("channels", per_token | per_channel, (1, 1), grouped),
        Split("sequences", rows, (0, 0), even=False),
    ]


def _rms_norm_gated(given: Tensors, options: Mapping[str, Any]) -> list[Split]:
    x = given["x"]
    assert x is not None
    last = x.dim() - 1
    unit = options["group_size"] or x.shape[last]
    channels = Split("channels", {"x": last, "z": last, "weight": 0, "bias": 0}, (last,), unit=unit)
    return [channels, *(Split("rows", {"x": dim, "z": dim}, (dim,), even=False) for dim in range(last))]


def _commit_states(given: Tensors, options: Mapping[str, Any]) -> list[Split]:
    pools = {"conv_states": 1, "ssm_states": 1, "intermediate_states": 2}
    return [Split("channels", pools, (), even=False)]


def _copy_states(given: Tensors, options: Mapping[str, Any]) -> list[Split]:
    pool = given["dst_pool"]
    assert pool is not None
    return [Split("channels", {"src_pool": dim, "dst_pool": dim}, (), even=False) for dim in range(1, pool.dim())]


_SPLITS: dict[str, Callable[[Tensors, Mapping[str, Any]], list[Split]]] = {
    function.__name__.removeprefix("_"): function
    for function in (
        _causal_conv1d_fn,
        _causal_conv1d_update,
        _causal_conv1d_varlen_fn,
        _commit_states,
        _copy_states,
        _mamba_chunk_scan_combined,
        _mamba_chunk_scan_combined_varlen,
        _rms_norm_gated,
        _selective_scan_fn,
        _selective_state_update,
    )
}


def _absent(given: Tensors, names: Sequence[str]) -> bool:
    return all(given[name] is None for name in names)


def register() -> None:
    """Lets the operators run on DTensors, in this process. Importing the package does it; again changes nothing."""
    for name in _SPLITS.keys() - _registered:
        op = OPS[name]
        torch.library.register_torch_dispatch(f"torch_mamba_ops::{name}", DTensor, functools.partial(_rule, op))
        if op.differentiable:
            # Its backward pass differentiates the reference, called with the DTensors that were saved.
            reference = op.backends["reference"]
            op.add(dataclasses.replace(reference, run=functools.partial(_reference, op, reference.run)))
        _registered.add(name)


_registered: set[str] = set()
_READ_POOLS = ("src_pool", "intermediate_states")  # states that an operator only reads


def _rule(op: Op, cls: type, overload: Any, types: Sequence[type], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The operator called with DTensors, below autograd."""
    options = dict(kwargs)
    key = options.pop("backend")

    def call(*tensors: Tensor | None, **options: Any) -> Any:
        backend = op.resolve(key)
        if backend.why_not is not None and (reasons := backend.why_not(*tensors, **options)):
            listed = "".join(f"\n  {reason}" for reason in reasons)
            raise BackendError(f"{op.name}: backend {backend.name!r} cannot run a device's part of the call:{listed}")
        return overload(*tensors, **options, backend=key)

    # torch 2.11 cannot redistribute a DTensor that requires grad without recording it: it has no rule for detach_.
    args = [arg.detach() if isinstance(arg, DTensor) and arg.requires_grad else arg for arg in args]
    with torch.no_grad():
        return _on_parts(op, call, args, options)


def _reference(op: Op, run: Callable[..., Any], *tensors: Any, **options: Any) -> Any:
    """The reference, differentiable, that takes DTensors too."""
    if any(isinstance(tensor, DTensor) for tensor in tensors):
        return _on_parts(op, run, tensors, options)
    return run(*tensors, **options)


def _on_parts(op: Op, call: Callable[..., Any], tensors: Sequence[Any], options: Mapping[str, Any]) -> Any:
    plan = _Plan(op, tensors, options)
    result = call(*plan.local(), **options)
    if isinstance(result, tuple):
        return tuple(plan.wrap(output, position) for position, output in enumerate(result))
    return None if result is None else plan.wrap(result, 0)


class _Plan:
    """How one call runs: which split each dimension of the mesh makes, and where each argument must be for that."""

    def __init__(self, op: Op, tensors: Sequence[Any], options: Mapping[str, Any]) -> None:
        self.op = op
        self.mesh = next(tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor))
        self.given = {name: self._distributed(name, tensor) for name, tensor in zip(op.tensors, tensors, strict=True)}
        self.mutated = [op.tensors[i] for i in op.mutated if self.given[op.tensors[i]] is not None]
        self.pools = [*self.mutated, *(name for name in _READ_POOLS if self.given.get(name) is not None)]
        splits = _SPLITS[op.name](self.given, options)
        chosen = [self._choose(splits, dim) for dim in range(self.mesh.ndim)]
        self.splits = [split if split is not None and self._possible(split, chosen) else None for split in chosen]
        self.targets = {name: self._target(name) for name, tensor in self.given.items() if tensor is not None}
        for name in self.pools:
            self._check_in_place(name)

    def local(self) -> list[Tensor | None]:
        """What this device computes with."""
        parts = {name: None if tensor is None else self._part(name, tensor) for name, tensor in self.given.items()}
        written: dict[str, Tensor | None] = {}
        for name in self.mutated:
            pool = parts[name]
            assert pool is not None
            check_writable(name, pool)
            check_disjoint(name, pool, written)
            written[name] = pool
        return list(parts.values())

    def wrap(self, output: Tensor, position: int) -> DTensor:
        """The output that the devices' outputs make."""
        placements: list[Placement] = []
        shape = list(output.shape)
        for split in self.splits:
            dim = None if split is None else split.outputs[position]
            placements.append(Replicate() if dim is None else Shard(dim))
            if split is not None and dim is not None:
                shape[dim] = self._size(split)
        size, stride = torch.Size(shape), _strides_in_order_of(output, shape)
        return DTensor.from_local(output, self.mesh, placements, run_check=False, shape=size, stride=stride)

    def _distributed(self, name: str, tensor: Any) -> DTensor | None:
        if tensor is None:
            return None
        if not isinstance(tensor, DTensor):
            if tensor.numel() != 1 and not DTensor._op_dispatcher._allow_implicit_replication:
                raise TypeError(
                    f"{name}: got a plain tensor beside DTensors, expected a DTensor (or a call under "
                    "torch.distributed.tensor.experimental.implicit_replication)"
                )
            return DTensor.from_local(tensor, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        if tensor.device_mesh != self.mesh:
            raise ValueError(f"{name}: on {tensor.device_mesh}, expected {self.mesh}, where the other tensors are")
        return tensor

    def _choose(self, splits: Sequence[Split], dim: int) -> Split | None:
        """The split that a dimension of the mesh makes: as the state is placed, or the first argument that says."""
        for name in self.mutated[:1] or self.given:
            tensor = self.given[name]
            placement = Replicate() if tensor is None else tensor.placements[dim]
            for split in splits:
                if _is_shard(placement, split.dims.get(name)):
                    return split
            if name in self.mutated and placement != Replicate():
                fitting = [f"{Shard(split.dims[name])!r} ({split.what})" for split in splits]
                raise ValueError(
                    f"{name}: placed {placement!r} on dimension {dim} of the mesh, expected {' or '.join(fitting)} or "
                    "Replicate(): states are used where they are, never moved"
                )
        return None

    def _possible(self, split: Split, chosen: Sequence[Split | None]) -> bool:
        """Whether the devices can make a split; a ValueError where a call depends on it."""
        ways, size = self._ways(split, chosen), self._size(split)
        if split.unit > 1:
            return size % (ways * split.unit) == 0
        if split.even:
            check_divides(self._sized_by(split), size, ways, split.what)
        elif self.op.differentiable:
            # On a device that gets nothing no gradient would come to the collectives that the others wait in.
            return -(-size // ways) * (ways - 1) < size
        return True

    def _target(self, name: str) -> tuple[Placement, ...]:
        placements: list[Placement] = []
        for split in self.splits:
            dim = None
            if split is not None:
                dim = split.groups.get(name) if self._groups_divide(name, split) else split.dims.get(name)
            placements.append(Replicate() if dim is None else Shard(dim))
        return tuple(placements)

    def _check_in_place(self, name: str) -> None:
        tensor, target = self.given[name], self.targets[name]
        if tensor is not None and tensor.placements != target:
            raise ValueError(
                f"{name}: placed {tensor.placements}, expected {target}, as {self.mutated[0]} is: states are used "
                "where they are, never moved"
            )

    def _part(self, name: str, tensor: DTensor) -> Tensor:
        if name in self.pools:
            return tensor.to_local()
        target = self.targets[name]
        # An argument that is whole and meets a part of the others gets a part of its gradient.
        gradient = [
            Partial() if split is not None and placement == Replicate() else placement
            for split, placement in zip(self.splits, target, strict=True)
        ]
        local = tensor.redistribute(self.mesh, target).to_local(grad_placements=gradient)
        for split in dict.fromkeys(self.splits):
            if split is not None and name in split.groups and not self._groups_divide(name, split):
                dim = split.groups[name]
                owned = groups_of(self._size(split), tensor.shape[dim], *self._place(split))
                return take(local, dim, [range(group, group + 1) for group in owned])
        return local

    def _groups_divide(self, name: str, split: Split) -> bool:
        """Whether an argument of groups can be split like the heads."""
        tensor = self.given[name]
        if tensor is None or name not in split.groups:
            return False
        return tensor.shape[split.groups[name]] % self._ways(split, self.splits) == 0

    def _sized_by(self, split: Split) -> str:
        return next(name for name in split.dims if self.given[name] is not None)

    def _size(self, split: Split) -> int:
        name = self._sized_by(split)
        tensor = self.given[name]
        assert tensor is not None
        return tensor.shape[split.dims[name]]

    def _ways(self, split: Split, chosen: Sequence[Split | None]) -> int:
        return math.prod(self.mesh.size(dim) for dim, other in enumerate(chosen) if other is split)

    def _place(self, split: Split) -> tuple[int, int]:
        """How many devices make a split, and which of them this one is."""
        coordinate = self.mesh.get_coordinate()
        if coordinate is None:
            raise RuntimeError(f"{self.op.name}: this process is not in {self.mesh}")
        index = 0
        for dim, other in enumerate(self.splits):
            if other is split:
                index = index * self.mesh.size(dim) + coordinate[dim]
        return self._ways(split, self.splits), index


def _is_shard(placement: Placement, dim: int | None) -> bool:
    return type(placement) is Shard and placement.dim == dim


def _strides_in_order_of(tensor: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense tensor of that shape whose dimensions lie in memory as the given one's do."""
    strides, step = [0] * len(shape), 1
    for dim in sorted(range(len(shape)), key=lambda d: (tensor.stride(d), -d)):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)
