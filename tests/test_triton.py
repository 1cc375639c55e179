"""The Triton kernels: their arithmetic in the interpreter, their code for several GPUs, how they start and are traced.

What needs a GPU is marked; the operations' own cases run on one in test_ops.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_mamba_ops as tmo
from torch_mamba_ops import tuning
from torch_mamba_ops.dispatch import OPS
from torch_mamba_ops.ops import launch as launching
from torch_mamba_ops.ops import written
from torch_mamba_ops.testing import build, cases, check, copied
from torch_mamba_ops.testing.check import operator_arguments

triton = pytest.importorskip("triton")

DECODE = ("selective_state_update", "causal_conv1d_update")
WITH_KERNELS = [name for name, op in OPS.items() if "triton" in op.backends]
TABLES = sorted((Path(tuning.__file__).parent / "tables").glob("*.json"))
BY_SEQUENCE = {"x", "dt", "B", "C", "z", "state_batch_indices", "conv_state_indices"}
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


@pytest.mark.parametrize("op", WITH_KERNELS)
def test_the_interpreter_agrees_with_the_equations(op: str) -> None:
    program = f"from torch_mamba_ops.testing import check_backend; print(check_backend({op!r}, 'triton'))"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", "no case is skipped"


ROUNDED = """
import sys, torch, torch_mamba_ops as tmo
for dtype in (torch.float16, torch.bfloat16):
    for size in (5, 16, 24):
        torch.manual_seed(size)
        sizes = torch.randn(9, 4, 6, size) * 10.0 ** torch.randint(-7, 4, (9, 4, 6, size))
        found = []
        for backend in ("reference", "triton"):
            torch.manual_seed(0)
            state = sizes.to(dtype).to(sys.argv[1])
            draw = lambda *shape: torch.randn(shape).to(sys.argv[1])
            slots = torch.tensor([7, 2, 5], dtype=torch.int32, device=sys.argv[1])
            seed = torch.tensor([-12345678901234], device=sys.argv[1])
            tmo.selective_state_update(
                state, draw(3, 4, 6), draw(3, 4).abs(), -draw(4).abs(), draw(3, 2, size), draw(3, 2, size),
                state_batch_indices=slots, rand_seed=seed, backend=backend,
            )
            found.append(state.float())
        apart = (found[0] != found[1]).float().mean()
        print(dtype, size, float(apart))
        assert apart <= float(sys.argv[2])
"""


def test_the_interpreter_rounds_to_the_same_bits_as_the_reference() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", ROUNDED, "cpu", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.gpu
def test_a_gpu_rounds_to_the_same_bits_but_where_its_float32_differs() -> None:
    # A difference in the last of 24 bits shows where it carries over: one in 2**13 of float16's draws and fewer.
    done = subprocess.run([sys.executable, "-c", ROUNDED, "cuda", "1e-3"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# --- compiled for GPUs that are not here ---


Plans = Callable[[str, dict[str, Any]], list[launching.Launch]]


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Plans:
    """What a call would start."""
    made: list[launching.Launch] = []
    launch = launching.launch
    for name, module in list(sys.modules.items()):
        if name.startswith("torch_mamba_ops.ops.") and getattr(module, "launch", None) is launch:
            monkeypatch.setattr(module, "launch", lambda plan, *given, **_: made.append(plan(*given)))

    def planned(op: str, arguments: dict[str, Any]) -> list[launching.Launch]:
        tensors, options = operator_arguments(op, arguments)
        made.clear()
        OPS[op].backends["triton"].run(*tensors, **options)
        return made

    return planned


def _compile(made: launching.Launch, capability: int, folder: Path, shared: int = 99) -> str:
    """Compiles a launch; returns what the assembler used. Every GPU from sm_80 on has 99 KB of shared memory."""
    signature, constants, attributes = {}, {}, {}
    compile_options = {name: made.options[name] for name in ("num_warps", "num_stages") if name in made.options}
    for place, (name, parameter) in enumerate(zip(made.kernel.arg_names, made.kernel.params, strict=True)):
        tensor = made.tensors.get(name)
        value = made.options.get(name)
        aligned = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
        if tensor is not None:
            signature[name] = POINTERS[tensor.dtype]
            if aligned:
                attributes[(place,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if aligned and value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(made.kernel, signature, constants, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=compile_options)
    cubin = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([str(cubin), "-res-usage", str(file)], capture_output=True, text=True, check=True).stdout
    assert compiled.metadata.shared <= shared * 1024
    return usage


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("op", "case"),
    [pytest.param(op, case, id=f"{op}-{case.name}") for op in WITH_KERNELS for case in cases(op, "model")],
)
def test_models_kernels_compile_without_spilling(
    op: str, case: Any, capability: int, plans: Plans, tmp_path: Path
) -> None:
    with FakeTensorMode():  # sizes matter, numbers do not
        launches = plans(op, build(case))
    for made in launches:
        usage = _compile(made, capability, tmp_path)
        assert "STACK:0 " in usage and "LOCAL:0 " in usage, usage


@pytest.mark.parametrize(
    ("op", "case"),
    [pytest.param(op, case, id=f"{op}-{case.name}") for op in WITH_KERNELS for case in cases(op, "opcheck")],
)
def test_every_option_compiles(op: str, case: Any, plans: Plans, tmp_path: Path) -> None:
    for made in plans(op, build(case)):
        _compile(made, 90, tmp_path)


class Pretended:
    """What torch asks Triton's driver before it reads a kernel."""

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


def _written(made: launching.Launch) -> set[str]:
    """What torch takes for written by a kernel, of the names of its pointers."""
    from torch._higher_order_ops import triton_kernel_wrap as wrap

    tensors = launching.filled(made.tensors)
    options = {name: value for name, value in made.options.items() if name not in ("num_warps", "num_stages")}
    if hasattr(wrap, "identify_mutated_tensors"):  # torch 2.11
        return set(wrap.identify_mutated_tensors(made.kernel, tensors | options, {}))
    table = wrap.kernel_side_table
    return set(wrap.get_mutated_tensors(table.add_kernel(made.kernel), table.add_constant_args(options), tensors, {}))


@pytest.mark.parametrize(
    ("op", "case"),
    [pytest.param(op, case, id=f"{op}-{case.name}") for op in WITH_KERNELS for case in cases(op, "opcheck")],
)
def test_torch_sees_all_inputs_written_that_the_operator_writes_and_no_others(
    op: str, case: Any, plans: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else graphs copy inputs, and packages return them; or states stay what they were."""
    arguments = build(case)
    inputs, options = operator_arguments(op, arguments)
    monkeypatch.setattr(triton.runtime.driver, "_active", Pretended())
    written = set().union(*(_inputs_written(made, inputs) for made in plans(op, arguments)))
    mutated = {position for position in OPS[op].mutated if inputs[position] is not None}
    if options.get("disable_state_update"):
        mutated.discard(OPS[op].tensors.index("state"))
    assert written == mutated


def test_torch_looks_at_a_kernel_once(plans: Plans, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._higher_order_ops import triton_kernel_wrap as wrap

    op = "mamba_chunk_scan_combined"
    monkeypatch.setattr(triton.runtime.driver, "_active", Pretended())
    name = next(name for name in written._ANALYSES if hasattr(wrap, name))
    original = getattr(wrap, name)
    monkeypatch.setattr(wrap, name, written.remembering(getattr(original, "__wrapped__", original)))
    made: list[str] = []
    generate = wrap.generate_ttir
    monkeypatch.setattr(wrap, "generate_ttir", lambda *given: made.append(given[0].__name__) or generate(*given))
    arguments = _arguments_for(op, "bfloat16 P64 N128", "cpu")
    found = [[_written(launch) for launch in plans(op, arguments)] for _ in range(3)]
    assert found[0] == found[1] == found[2]
    assert made == ["prepare", "scan"]


def test_torch_sees_what_descriptors_write(plans: Plans, monkeypatch: pytest.MonkeyPatch) -> None:
    op = "mamba_chunk_scan_combined"
    arguments = _arguments_for(op, "bfloat16 P64 N128", "cpu")
    inputs = operator_arguments(op, arguments)[0]
    monkeypatch.setattr(triton.runtime.driver, "_active", Pretended())
    with tuning.use_config(op, {"BLOCK_Q": 64, "BLOCK_P": 64, "num_warps": 4, "num_stages": 3, "TMA": True}):
        made = list(plans(op, arguments))[-1]
    assert made.descriptors
    assert not _inputs_written(made, inputs) and "out" in _written(made)


def _inputs_written(made: launching.Launch, inputs: Sequence[Any]) -> set[int]:
    """The operator's tensors that torch sees a kernel write, by position."""
    names = _written(made)
    assert names, "something is"
    pointers = [tensor for name, tensor in launching.filled(made.tensors).items() if name in names]
    return {i for i, given in enumerate(inputs) if any(given is pointer for pointer in pointers)}


def _shipped() -> Iterator[Any]:
    for path in TABLES:
        for op, keys in json.loads(path.read_text()).items():
            if op in ("selective_scan_fn", "backends"):  # see test_selective_scan_triton.py, test_preference.py
                continue
            for key, entries in keys.items() if isinstance(keys, dict) else ():
                for config in {json.dumps(config): config for _, config in entries}.values():
                    yield pytest.param(op, key, config, id=f"{path.stem}-{key}-{'-'.join(map(str, config.values()))}")


def _arguments_for(op: str, key: str, device: str, batch: int = 5) -> dict[str, Any]:
    """A call that a table's key is for."""
    dtype, *sizes = key.split()
    if op == "causal_conv1d_update":
        return _window_arguments(getattr(torch, dtype), *(int(size.lstrip("WKDS")) for size in sizes), device, batch)
    heads, channels, state = 4, *(int(size[1:]) for size in sizes)
    tokens = (batch,) if op == "selective_state_update" else (batch, 150)

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    arguments: dict[str, Any] = {
        "x": draw(*tokens, heads, channels),
        "dt": draw(*tokens, heads),
        "A": -torch.rand(heads, device=device) - 1,
        "B": draw(*tokens, 2, state),
        "C": draw(*tokens, 2, state),
        "D": torch.randn(heads, device=device),
        "dt_bias": torch.rand(heads, device=device) - 4,
        "dt_softplus": True,
    }
    if op == "mamba_chunk_scan_combined":
        return arguments | {"chunk_size": 256, "return_final_states": True}
    return arguments | {
        "state": draw(batch + 2, heads, channels, state, dtype=getattr(torch, dtype)),
        "state_batch_indices": torch.randperm(batch + 2, device=device)[:batch].int(),
    }


def _window_arguments(
    dtype: torch.dtype, width: int, columns: int, columns_innermost: int, device: str, batch: int
) -> dict[str, Any]:
    dim = 528
    pool = torch.randn(batch + 2, columns, dim, device=device).to(dtype).transpose(1, 2)
    return {
        "x": torch.randn(batch, dim, device=device).to(dtype),
        "conv_state": pool.contiguous() if columns_innermost else pool,
        "weight": torch.randn(dim, width, device=device).to(dtype),
        "bias": torch.randn(dim, device=device).to(dtype),
        "activation": "silu",
        "conv_state_indices": torch.randperm(batch + 2, device=device)[:batch].int(),
    }


@pytest.mark.parametrize(("op", "key", "config"), list(_shipped()))
def test_every_shipped_config_compiles_without_spilling(
    op: str, key: str, config: dict[str, Any], plans: Plans, tmp_path: Path
) -> None:
    with tuning.use_config(op, config):
        launches = plans(op, _arguments_for(op, key, "cpu"))
    for made in launches:
        usage = _compile(made, 90, tmp_path, shared=227)
        if made.kernel.__name__ != "scan":  # spills in its loop for steep chunks; with smaller blocks both are slower
            assert "STACK:0 " in usage and "LOCAL:0 " in usage, usage


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "key", "config"), list(_shipped()))
def test_every_shipped_config_is_right_ten_times_over(op: str, key: str, config: dict[str, Any]) -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        arguments = _arguments_for(op, key, "cuda")
        given = copied(arguments)
        with tuning.use_config(op, config):
            result = OPS[op].function(**given, backend="triton")
        check.assert_right(op, given, result, check.truth(op, arguments, "triton"))


def test_another_table_is_another_backend_for_every_cache(tmp_path: Path) -> None:
    program = "from torch_mamba_ops.dispatch import OPS; print(OPS['selective_state_update'].backends['triton'].key)"

    def key(**more: str) -> str:
        command = [sys.executable, "-c", program]
        return subprocess.run(command, env=os.environ | more, capture_output=True, text=True, check=True).stdout

    tables = {"TORCH_MAMBA_OPS_CONFIGS": str(tmp_path)}
    assert key() == key() == key(**tables)
    (tmp_path / "nvidia_h200.json").write_text("{}")
    assert key(**tables) != key()


# --- traced ---


@pytest.mark.gpu  # elsewhere torch cannot ask the driver and takes every argument for written
@pytest.mark.parametrize("op", DECODE)
def test_the_graph_for_a_gpu_holds_one_kernel_that_writes_the_state_and_the_output(op: str) -> None:
    case = next(case for case in cases(op, "opcheck") if "slots" in case.name or "padding" in case.name)
    arguments = build(case, "cuda")
    names = [name for name, value in arguments.items() if isinstance(value, Tensor)]

    class Call(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Any:
            return OPS[op].function(**arguments | dict(zip(names, tensors, strict=True)), backend="triton")

    program = torch.export.export(Call(), tuple(arguments[name] for name in names), strict=False)
    program = program.run_decompositions({})
    kernels = [node for node in program.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    mutated = set(program.graph_signature.user_inputs_to_mutate.values())
    assert len(kernels) == 1
    assert mutated == {
        f"tensors_{names.index(OPS[op].tensors[i])}" for i in OPS[op].mutated if OPS[op].tensors[i] in names
    }


@pytest.mark.parametrize("op", DECODE)
def test_the_graph_for_a_gpu_serves_every_batch(op: str) -> None:
    """Exported with fake tensors: a batch that a config or a grid were chosen by would be refused as a constant."""
    case = next(case for case in cases(op, "opcheck") if "slots" in case.name or "padding" in case.name)
    real = build(case)
    with FakeTensorMode():
        arguments = {
            name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
            if isinstance(value, Tensor)
            else value
            for name, value in real.items()
        }
        names = [name for name, value in arguments.items() if isinstance(value, Tensor)]

        class Call(torch.nn.Module):
            def forward(self, *tensors: Tensor) -> Any:
                return OPS[op].function(**arguments | dict(zip(names, tensors, strict=True)), backend="triton")

        batch = torch.export.Dim("batch", min=2, max=4096)
        shapes = (tuple({0: batch} if name in BY_SEQUENCE else None for name in names),)
        inputs = tuple(arguments[name] for name in names)
        program = torch.export.export(Call(), inputs, dynamic_shapes=shapes, strict=False).run_decompositions({})
    (kernel,) = (node for node in program.graph.nodes if "triton_kernel_wrapper" in str(node.target))
    assert any(isinstance(size, torch.fx.Node) for grid in kernel.kwargs["grid"] for size in grid)


# --- on a GPU ---


@pytest.fixture
def decode() -> dict[str, Any]:
    torch.manual_seed(0)
    return _arguments_for("selective_state_update", "float32 P64 N128", "cuda")


@pytest.mark.gpu
def test_a_kept_plan_serves_other_tensors_and_one_tensor_as_two_arguments(decode: dict[str, Any]) -> None:
    for change in ({}, {}, {"C": decode["B"]}, {}, {"C": torch.randn_like(decode["C"])}):
        arguments = copied(decode) | change
        want = check.truth("selective_state_update", arguments)
        given = copied(arguments)
        result = tmo.selective_state_update(**given, backend="triton")
        check.assert_right("selective_state_update", given, result, want)


@pytest.mark.gpu
def test_a_pool_of_more_than_two_to_the_31_elements(decode: dict[str, Any]) -> None:
    heads, channels, size = decode["state"].shape[1:]
    slots = 2**31 // (heads * channels * size) + 10
    pool = torch.zeros(slots, heads, channels, size, dtype=torch.bfloat16, device="cuda")
    far = torch.tensor([slots - 1, 3, slots - 7, 0, slots // 2], dtype=torch.int32, device="cuda")
    small = decode | {"state": torch.randn(5, heads, channels, size, device="cuda").bfloat16()}
    small["state_batch_indices"] = None
    pool[far.long()] = small["state"]
    want = tmo.selective_state_update(**small, backend="triton")
    got = tmo.selective_state_update(**decode | {"state": pool, "state_batch_indices": far}, backend="triton")
    assert torch.equal(got, want) and torch.equal(pool[far.long()], small["state"])
    assert int(pool.any(-1).any(-1).any(-1).sum()) == 5


@pytest.mark.gpu
@pytest.mark.parametrize("static", [True, False], ids=["buffer", "input"])
def test_cuda_graphs_replay_with_the_state_in_place_and_fresh_random_numbers(
    static: bool, decode: dict[str, Any]
) -> None:
    state = decode.pop("state").half()
    seed = torch.zeros(1, dtype=torch.int64, device="cuda")
    if static:
        torch._dynamo.mark_static_address(state)

    def step(state: Tensor, seed: Tensor, x: Tensor) -> Tensor:
        return tmo.selective_state_update(state, **decode | {"x": x}, rand_seed=seed, backend="triton")

    torch._dynamo.reset()
    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    other = state.clone()
    # A state with a static address is no reason to skip CUDA graphs: whatever is one is raised.
    strict = torch._inductor.config.patch({"triton.cudagraph_or_error": static})
    with strict, torch.no_grad():
        for number in range(6):
            seed.fill_(number)
            x = torch.randn_like(decode["x"])
            torch.compiler.cudagraph_mark_step_begin()
            got = compiled(state, seed, x).clone()
            torch.testing.assert_close(got, step(other, seed, x))
            assert torch.equal(state, other), number


@pytest.mark.gpu
def test_the_old_state_can_be_kept_before_an_update(decode: dict[str, Any]) -> None:
    def step(state: Tensor) -> tuple[Tensor, Tensor]:
        old = state.clone()  # pytorch issue 198031: a clone before a mutation must not be optimised away
        return old, tmo.selective_state_update(state, **decode, backend="triton")

    state = decode.pop("state")
    before, other = state.clone(), state.clone()
    old, out = torch.compile(step, fullgraph=True)(state)
    assert torch.equal(old, before) and not torch.equal(state, before)
    torch.testing.assert_close(out, step(other)[1])
    assert torch.equal(state, other)
