"""What each process of the tests of several devices runs. A module of its own, so that processes can import it.

Each check is a function of (process, number of processes, its arguments) that all processes call together.
"""

from __future__ import annotations

import contextlib
import math
import traceback
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import pytest
import small_models
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import parallelize_module
from transformers import StaticCache

import torch_mamba_ops as ops
from torch_mamba_ops.dispatch import OPS
from torch_mamba_ops.distributed import Mamba2Parallel, ReshardPlan, sharding
from torch_mamba_ops.integrations import transformers as integration
from torch_mamba_ops.state.spec import MambaStateSpec
from torch_mamba_ops.testing import check

# benchmarks/distributed_nccl.py runs the same on GPUs, where `auto` picks kernels.
DEVICE, BACKEND = "cpu", "reference"


def serve(rank: int, size: int, store: str, orders: Connection) -> None:
    """Joins the processes and runs checks as they are ordered, answering what went wrong or None."""
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    integration.enable()
    while (order := orders.recv()) is not None:
        name, arguments = order
        wrong = None
        try:
            globals()[name](rank, size, *arguments)
        except Exception:
            wrong = traceback.format_exc()
        orders.send(wrong)
    dist.destroy_process_group()


# The operators on DTensors


def _placed(arguments: dict[str, Any], mesh: DeviceMesh, dims: dict[str, int]) -> dict[str, Any]:
    """The arguments as DTensors on a mesh of one dimension, split over theirs or whole, with their strides. A tensor
    given twice stays one."""
    made: dict[int, DTensor] = {}

    def place(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in made:
            dim = dims.get(name)
            part = value if dim is None else _part(value, dim, mesh.size(), mesh.get_local_rank())
            where = [Replicate() if dim is None else Shard(dim)]
            made[id(value)] = DTensor.from_local(
                part, mesh, where, run_check=False, shape=value.shape, stride=value.stride()
            )
        return made[id(value)]

    return {name: place(name, value) for name, value in arguments.items()}


def _part(value: Tensor, dim: int, size: int, rank: int) -> Tensor:
    """As DTensor cuts where it does not come out even: the last ones have less, or nothing."""
    count = -(-value.shape[dim] // size)
    start = min(rank * count, value.shape[dim])
    return value.narrow(dim, start, min(count, value.shape[dim] - start))


def _whole(value: Any) -> Any:
    return value.full_tensor().clone() if isinstance(value, DTensor) else value


def _splits(name: str, arguments: dict[str, Any], size: int) -> Iterator[sharding.Split]:
    """The ways in which the devices can split a call."""
    tensors, options = check.operator_arguments(name, arguments)
    given = dict(zip(OPS[name].tensors, tensors, strict=True))
    for split in sharding._SPLITS[name](given, options):
        count = next(given[n].shape[d] for n, d in split.dims.items() if given[n] is not None)
        if not split.even or count % size == 0:
            yield split


def operators(rank: int, size: int, name: str, compiled: bool) -> None:
    """An operator's cases (compiled, one of them) in every way they can be split, against the equations."""
    mesh = init_device_mesh(DEVICE, (size,))
    op, ran = OPS[name], 0
    mutated = {op.tensors[i] for i in op.mutated}
    # Those that say how a call is split: the rest may also come whole, and is cut by the rule.
    anchors = mutated | set(sharding._READ_POOLS) if mutated else {op.tensors[0]}

    def call(placed: dict[str, Any]) -> Any:
        return op.function(**placed)

    for case in check.cases(name, "opcheck")[:1] if compiled else check.cases(name):
        arguments = check.build(case, DEVICE)
        expected = check.truth(name, arguments, BACKEND)
        for split in _splits(name, arguments, size):
            for names in (set(split.dims), anchors & set(split.dims)):
                local = check.copied(arguments)
                placed = _placed(local, mesh, {n: split.dims[n] for n in names})
                torch._dynamo.reset()
                run = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
                with implicit_replication():  # causal_conv1d_fn picks its final states with plain indices
                    result = run(placed)
                outputs = result if isinstance(result, tuple) else () if result is None else (result,)
                whole = tuple(output.full_tensor() for output in outputs)
                after = {n: _whole(v) for n, v in placed.items()}
                check.assert_right(name, after, whole, expected)
                assert all(check.guard_intact(local[n]) for n in mutated if local.get(n) is not None)
                ran += 1
                if compiled:
                    break
    assert ran


def gradients(rank: int, size: int, name: str) -> None:
    """Gradients through an operator on DTensors, split and whole arguments mixed, against the equations."""
    mesh = init_device_mesh(DEVICE, (size,))
    op = OPS[name]
    for case in check.cases(name, "grad"):
        # Final states are picked out of x by torch, whose DTensors have no gradient for that.
        arguments = check.build(case, DEVICE) | ({"return_final_states": False} if name == "causal_conv1d_fn" else {})
        exact = _gradients(check.oracle(name), check.copied(arguments, torch.float64))
        rough = _gradients(check.oracle(name), check.copied(arguments, torch.float32))
        for split in _splits(name, arguments, size):
            local = check.copied(arguments, torch.float32)
            with implicit_replication():
                actual = _gradients(op.function, _placed(local, mesh, dict(split.dims)))
            _assert_within_budget(f"{name} split by {split.what}", actual, exact, rough)


def _gradients(function: Any, given: dict[str, Any]) -> dict[str, Tensor]:
    leaves = {n: t.requires_grad_() for n, t in given.items() if isinstance(t, Tensor) and t.is_floating_point()}
    outputs = function(**given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator).double().to(DEVICE) for o in outputs]
    loss = sum((_whole(o).double() * w).sum() for o, w in zip(outputs, weights, strict=True))
    return {n: _whole(g) for n, g in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)}


def _assert_within_budget(
    what: str, actual: dict[str, Tensor], exact: dict[str, Tensor], rough: dict[str, Tensor]
) -> None:
    """The error budget: a multiple of what the same in float32 on one process is off from float64."""
    for name, want in exact.items():
        smallest = torch.finfo(torch.float32).eps * float(want.abs().max())
        error = max(float((rough[name].double() - want).abs().max()), smallest)
        worst = float((actual[name].double() - want).abs().max())
        assert worst <= check.ERROR_BUDGET * error, f"{what}: {name} is off by {worst:.1e}; float32 by {error:.1e}"


def two_dimensions(rank: int, size: int) -> None:
    """Sequences over one dimension of a mesh, heads over the other."""
    mesh = init_device_mesh(DEVICE, (2, size // 2))
    generator = torch.Generator().manual_seed(0)
    state, x = torch.randn(4, 8, 4, 16, generator=generator), torch.randn(4, 8, 4, generator=generator)
    dt, A, D = torch.randn(4, 8, generator=generator), -torch.rand(8, generator=generator), torch.ones(8)
    B, C = torch.randn(4, 2, 16, generator=generator), torch.randn(4, 2, 16, generator=generator)
    tensors = {"state": state, "x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D}
    given: dict[str, Any] = {n: t.to(DEVICE) for n, t in tensors.items()} | {"dt_softplus": True}
    expected = check.truth("selective_state_update", given, BACKEND)
    both, heads, sequences = [Shard(0), Shard(1)], [Replicate(), Shard(0)], [Shard(0), Replicate()]
    where = {"state": both, "x": both, "dt": both, "A": heads, "B": sequences, "C": sequences, "D": heads}
    placed = {n: dist.tensor.distribute_tensor(given[n], mesh, p) for n, p in where.items()}
    part = placed["state"].to_local()
    out = ops.selective_state_update(**placed, dt_softplus=True)
    assert out.placements == tuple(both) and placed["state"].to_local().data_ptr() == part.data_ptr()
    after = {n: _whole(v) for n, v in placed.items()}
    check.assert_right("selective_state_update", after, (out.full_tensor(),), expected)


def states_are_never_moved(rank: int, size: int) -> None:
    """A placement that would have a state copied is refused, as are heads that do not come out even."""
    mesh = init_device_mesh(DEVICE, (size,))

    def whole(*shape: int) -> DTensor:
        return dist.tensor.distribute_tensor(torch.randn(shape, device=DEVICE), mesh, [Replicate()])

    def split(dim: int, *shape: int) -> DTensor:
        return dist.tensor.distribute_tensor(torch.randn(shape, device=DEVICE), mesh, [Shard(dim)])

    heads, slots = 2 * size, 2
    rest = (whole(slots, heads), whole(heads), whole(slots, 1, 16), whole(slots, 1, 16))
    x = split(1, slots, heads, 4)
    with pytest.raises(ValueError, match=r"state: placed Shard\(dim=2\) .*expected Shard\(dim=1\) \(heads\) or"):
        ops.selective_state_update(split(2, slots, heads, 4 * size, 16), whole(slots, heads, 4 * size), *rest)
    with pytest.raises(ValueError, match=r"intermediate_states_buffer: placed .*Replicate.*expected .*dim=2"):
        ops.selective_state_update(
            split(1, slots, heads, 4, 16), x, *rest, intermediate_states_buffer=whole(slots, 1, heads, 4, 16)
        )
    with pytest.raises(ValueError, match=rf"state: got {heads - 1} heads, .* the {size} devices"):
        odd = (whole(slots, heads - 1, 4), whole(slots, heads - 1), whole(heads - 1), *rest[2:])
        ops.selective_state_update(split(1, slots, heads - 1, 4, 16), *odd)
    copies = (DTensor.from_local(torch.zeros(1, dtype=torch.long, device=DEVICE), mesh, [Replicate()]),) * 2
    with pytest.raises(ValueError, match=r"src_pool: placed .*Replicate.*expected .*dim=1.* never moved"):
        ops.copy_states(whole(slots, heads, 16), split(1, slots, heads, 16), *copies)
    with pytest.raises(TypeError, match="x: got a plain tensor beside DTensors"):
        ops.rms_norm_gated(torch.randn(2, 8, device=DEVICE), whole(8))


# Tensor-parallel mixers

_SIZES = {
    "mamba2": ("num_heads", "n_groups"),
    "bamba": ("mamba_n_heads", "mamba_n_groups"),
    "granitemoehybrid": ("mamba_n_heads", "mamba_n_groups"),
    "falcon_h1": ("mamba_n_heads", "mamba_n_groups"),
    "zamba2": ("n_mamba_heads", "mamba_ngroups"),
    "nemotron_h_mlp": ("mamba_num_heads", "n_groups"),
}


def _model(name: str, groups: int, **changes: Any) -> nn.Module:
    model = small_models.build(name, **{_SIZES[name][1]: groups}, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, mixer in _mixers(model):  # of ones and zeros, a wrong cut would give the same
            biases = (mixer.in_proj.bias, mixer.conv1d.bias, mixer.out_proj.bias, mixer.dt_bias)
            for parameter in (*biases, mixer.D, getattr(mixer.norm, "weight", None)):
                if parameter is not None:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
            if hasattr(mixer, "mup_vector"):
                mixer.mup_vector.add_(torch.rand(mixer.mup_vector.shape, generator=generator))
    return model.to(DEVICE)


def _mixers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in model.named_modules() if hasattr(m, "A_log") and hasattr(m, "n_groups")]


def _split_mixers(model: nn.Module, mesh: DeviceMesh) -> None:
    found = _mixers(model)
    assert found
    parallelize_module(model, mesh, {name: Mamba2Parallel() for name, _ in found})


def _steps(mixer: Any, config: Any, inputs: list[Tensor], compiled: bool = False) -> tuple[list[Tensor], Any]:
    """Prefill and decode steps of one layer, with the states that they leave."""
    cache = StaticCache(config=config, max_cache_len=64)

    def forward(hidden: Tensor) -> Tensor:
        out: Tensor = mixer(hidden, cache_params=cache)
        return out

    run = torch.compile(forward, fullgraph=True, backend="aot_eager") if compiled else forward
    with torch.no_grad():
        outputs = [run(hidden) for hidden in inputs]
    return outputs, cache.layers[mixer.layer_idx]


def _inputs(batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(batch, length, small_models.HIDDEN, generator=generator).to(DEVICE) for length in (11, 1, 1)]


@contextlib.contextmanager
def _in_float64() -> Iterator[None]:
    """The models' own code in float64, whose results this package's are compared with; it asks for float32 inside."""
    integration.disable()
    to_float = Tensor.float
    Tensor.float = Tensor.double  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Tensor.float = to_float  # type: ignore[method-assign]
        integration.enable()


def mixer(rank: int, size: int, name: str, groups: int, compiled: bool, changes: dict[str, Any]) -> None:
    """A split layer gives what the whole one gives: prefill, decode and states."""
    torch._dynamo.reset()
    mesh = init_device_mesh(DEVICE, (size,))
    model, whole = _model(name, groups, **changes), _model(name, groups, **changes)
    (path, own), (_, other) = _mixers(model)[0], _mixers(whole)[0]
    inputs = _inputs(1 if changes else 2)  # Falcon-H1's norm drops a dimension of one token
    rough, states = _steps(other, whole.config, inputs)
    with _in_float64():
        exact, _ = _steps(other.double(), whole.config, [hidden.double() for hidden in inputs])
    heads, inner = own.num_heads, own.intermediate_size
    parallelize_module(model, mesh, {path: Mamba2Parallel()})
    outputs, parts = _steps(own, model.config, inputs, compiled)

    def named(results: list[Tensor]) -> dict[str, Tensor]:
        return {f"step {i}": results[i].reshape(hidden.shape) for i, hidden in enumerate(inputs)}

    _assert_within_budget(f"{name} with {groups} groups", named(outputs), named(exact), named(rough))
    mine = slice(rank * heads // size, (rank + 1) * heads // size)
    torch.testing.assert_close(parts.recurrent_states[0], states.recurrent_states[0][:, mine])
    channels = slice(rank * inner // size, (rank + 1) * inner // size)
    torch.testing.assert_close(parts.conv_states[0][:, : inner // size], states.conv_states[0][:, channels])
    assert sum(p.numel() for p in own.parameters()) < sum(p.numel() for p in other.parameters())


def model(rank: int, size: int, name: str) -> None:
    """A whole model with its mixers split gives the same logits."""
    whole, split = _model(name, 2), _model(name, 2)
    _split_mixers(split, init_device_mesh(DEVICE, (size,)))
    ids = torch.randint(3, small_models.VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(split(ids).logits, whole(ids).logits, rtol=1e-4, atol=1e-5)


def mixer_gradients(rank: int, size: int, name: str, groups: int) -> None:
    """Gradients of a split layer: those of the whole one's same rows."""
    mesh = init_device_mesh(DEVICE, (size,))
    model, whole = _model(name, groups), _model(name, groups)
    (path, own), (_, other) = _mixers(model)[0], _mixers(whole)[0]
    parallelize_module(model, mesh, {path: Mamba2Parallel()})
    hidden = _inputs()[0]
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)

    def run(layer: Any) -> dict[str, Tensor]:
        given = hidden.to(layer.D.dtype, copy=True).requires_grad_()
        (layer(given) * weights).sum().backward()
        assert given.grad is not None
        return {"hidden": given.grad, **{n: p.grad for n, p in layer.named_parameters()}}

    actual, rough = run(own), run(other)
    other.zero_grad()
    with _in_float64():
        exact = run(other.double())
    # A parameter's rows are found by value: no two rows of a random weight are the same.
    for n, parameter in own.named_parameters():
        rows = _rows_of(parameter.detach(), dict(whole.named_parameters())[f"{path}.{n}"].detach(), n)
        exact[n], rough[n] = exact[n][rows], rough[n][rows]
    _assert_within_budget(f"gradient of {name}", actual, exact, rough)


def _rows_of(part: Tensor, whole: Tensor, name: str) -> Any:
    """Where in a whole parameter, which is in float64, a part stands."""
    dim = 1 if name == "out_proj.weight" else 0
    part, whole = (t.movedim(dim, 0).reshape(t.shape[dim], -1).double() for t in (part, whole))
    same = (part[:, None] == whole[None]).all(-1)
    assert (same.sum(1) == 1).all(), name
    rows = same.int().argmax(1)
    return (slice(None), rows) if dim else rows


def refused_mixers(rank: int, size: int) -> None:
    """What cannot be split is told apart."""
    mesh = init_device_mesh(DEVICE, (size,))
    mixer = _mixers(_model("mamba2", 2))[0][1]
    with pytest.raises(TypeError, match="got Linear, expected a Mamba2 mixer; it has no in_proj, conv1d"):
        parallelize_module(nn.Linear(2, 2), mesh, Mamba2Parallel())
    with pytest.raises(ValueError, match=r"device_mesh: got 2 dimensions"):
        Mamba2Parallel()._apply(mixer, init_device_mesh(DEVICE, (size, 1)))
    integration.disable()
    with pytest.raises(RuntimeError, match="is not enabled, expected a call of its enable"):
        parallelize_module(mixer, mesh, Mamba2Parallel())
    integration.enable()
    mixer.num_heads, mixer.head_dim = 2 * size - 1, 1
    mixer.intermediate_size = 2 * size - 1
    with pytest.raises(ValueError, match=rf"num_heads of Mamba2Mixer: got {2 * size - 1} heads, .* the {size} devices"):
        parallelize_module(mixer, mesh, Mamba2Parallel())
    mixer = parallelize_module(_mixers(_model("mamba2", 2))[0][1], mesh, Mamba2Parallel())
    with pytest.raises(TypeError, match=r"projections of _Columns, expected torch\.nn\.Linear, not split before"):
        parallelize_module(mixer, mesh, Mamba2Parallel())


# Resharding


def reshard(rank: int, size: int, spec: MambaStateSpec, sources: list[int], targets: list[int], layouts: str) -> None:
    """Each target gets its part of what the sources hold, in its layout, and nothing else changes."""
    plan = ReshardPlan(spec, tuple(sources), tuple(targets))
    layers, slots = 2, 5
    taken, put, untouched = (torch.tensor(given, device=DEVICE) for given in ([3, 0, 4], [1, 4, 2], [0, 3]))
    generator = torch.Generator().manual_seed(0)
    whole = []
    for _ in range(layers):
        conv = torch.randn(slots, *spec.conv_shape, generator=generator).to(DEVICE, spec.conv_dtype)
        ssm = None
        if spec.ssm_shape is not None:
            ssm = torch.randn(slots, *spec.ssm_shape, generator=generator).to(DEVICE, spec.ssm_dtype)
        whole.append((conv, ssm))
    source_layout, target_layout = layouts.split()

    def cut(devices: int, device: int, layout: str) -> list[tuple[Tensor, Tensor | None]]:
        return [
            (
                _in_layout(conv[:, _channels(spec, devices, device)], layout),
                None if ssm is None else ssm.chunk(devices, 1)[device].clone(),
            )
            for conv, ssm in whole
        ]

    given: dict[str, Any] = {}
    if rank in sources:
        given |= {"source": cut(len(sources), sources.index(rank), source_layout), "source_slots": taken}
    if rank in targets:
        target = cut(len(targets), targets.index(rank), target_layout)
        for conv, ssm in target:
            conv.fill_(-7)
            if ssm is not None:
                ssm.fill_(-7)
        given |= {"target": target, "target_slots": put}
    if not given:
        with pytest.raises(ValueError, match="neither a source"):
            plan.run()
        moved = [0, 0, 0]
    else:
        done = plan.run(**given)
        moved = [done.sent, done.received, done.copied]
    if rank in targets:
        expected = cut(len(targets), targets.index(rank), target_layout)
        for got, want in zip(given["target"], expected, strict=True):
            for pool, right in zip(got, want, strict=True):
                if pool is not None:
                    assert torch.equal(pool[put], right[taken])
                    assert (pool[untouched] == -7).all()
        pools = [pool for layer in given["target"] for pool in layer if pool is not None]
        assert done.received + done.copied == sum(pool[put].nbytes for pool in pools)
    totals = torch.tensor(moved, device=DEVICE)
    dist.all_reduce(totals)
    assert totals[0] == totals[1] == plan.bytes_moved(slots=3, layers=layers)


def _in_layout(conv: Tensor, layout: str) -> Tensor:
    """A copy of windows whose memory is in that layout, as operations take them."""
    if layout == "DS":
        return conv.clone(memory_format=torch.contiguous_format)
    return conv.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def _channels(spec: MambaStateSpec, devices: int, device: int) -> list[int]:
    """The channels of a device's window, worked out head by head."""
    if spec.kind != "mamba2":
        return list(range(spec.conv_dim))[device * spec.conv_dim // devices : (device + 1) * spec.conv_dim // devices]
    mine = range(device * spec.heads // devices, (device + 1) * spec.heads // devices)
    inner = spec.heads * spec.head_dim
    found = [head * spec.head_dim + i for head in mine for i in range(spec.head_dim)]
    block = math.gcd(len(mine), spec.heads // spec.groups)
    groups = [head * spec.groups // spec.heads for head in mine[::block]]
    for start in (inner, inner + spec.groups * spec.state_size):
        found += [start + group * spec.state_size + i for group in groups for i in range(spec.state_size)]
    return found


def prefill_then_decode(rank: int, size: int, groups: int, layout: str) -> None:
    """Prefill on all processes, decode on the first half of them, with the states moved between."""
    decoders = tuple(range(size // 2))
    few = DeviceMesh(DEVICE, list(decoders))
    first, second, whole = (_model("bamba", groups) for _ in range(3))
    _split_mixers(first, init_device_mesh(DEVICE, (size,)))
    inputs = _inputs()
    other = _mixers(whole)[0][1]
    rough, _ = _steps(other, whole.config, inputs)
    with _in_float64():
        exact, _ = _steps(other.double(), whole.config, [hidden.double() for hidden in inputs])
    _, made = _steps(_mixers(first)[0][1], first.config, inputs[:1])
    spec = MambaStateSpec.from_config(_model("bamba", groups).config)[0]
    given: dict[str, Any] = {
        "source": [(made.conv_states[0][..., 1:], made.recurrent_states[0])],  # transformers keep one column more
        "source_slots": torch.arange(2, device=DEVICE),
    }
    if rank in decoders:
        _split_mixers(second, few)
        own = _mixers(second)[0][1]
        conv = _in_layout(torch.zeros(2, own.conv_dim, 3, device=DEVICE), layout)
        ssm = torch.zeros(2, own.num_heads, own.head_dim, own.ssm_state_size, device=DEVICE)
        given |= {"target": [(conv, ssm)], "target_slots": torch.arange(2, device=DEVICE)}
    ReshardPlan(spec, tuple(range(size)), decoders).run(**given)
    if rank in decoders:
        cache = StaticCache(config=second.config, max_cache_len=64)
        layer = cache.layers[own.layer_idx]
        layer.update_conv_state(nn.functional.pad(conv, (1, 0)))
        layer.update_recurrent_state(ssm)
        with torch.no_grad():
            outputs = {f"step {step}": own(inputs[step], cache_params=cache) for step in (1, 2)}
        _assert_within_budget(
            "decode", outputs, {f"step {s}": exact[s] for s in (1, 2)}, {f"step {s}": rough[s] for s in (1, 2)}
        )
