"""Packages that run without this package: verified where it was never imported."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

import torch_mamba_ops as tmo
from torch_mamba_ops import export
from torch_mamba_ops.dispatch import OPS
from torch_mamba_ops.tuning import use_config

H, P, N, G, SLOTS = 4, 8, 16, 2, 11


class Prefill(torch.nn.Module):
    """Convolution, scan and gated norm of a Mamba2 layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.filter = torch.nn.Parameter(torch.randn(H * P, 4))
        self.A = torch.nn.Parameter(-torch.rand(H) - 1)
        self.norm = torch.nn.Parameter(torch.ones(H * P))

    def forward(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        x = tmo.causal_conv1d_fn(x.transpose(1, 2), self.filter, activation="silu").transpose(1, 2)
        y = tmo.mamba_chunk_scan_combined(x.unflatten(-1, (H, P)), dt, self.A, B, C, 16, dt_softplus=True)
        return tmo.rms_norm_gated(y.flatten(-2), self.norm)


class Decode(torch.nn.Module):
    """A decode step on pools that are inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.filter = torch.nn.Parameter(torch.randn(H * P, 4))
        self.A = torch.nn.Parameter(-torch.rand(H) - 1)

    def forward(
        self, conv: Tensor, state: Tensor, slots: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor
    ) -> Tensor:
        x = tmo.causal_conv1d_update(x, conv, self.filter, activation="silu", conv_state_indices=slots)
        return tmo.selective_state_update(
            state, x.unflatten(-1, (H, P)), dt, self.A, B, C, dt_softplus=True, state_batch_indices=slots
        )


class Counted(torch.nn.Module):
    """A decode step on states that are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.step = Decode()
        self.register_buffer("conv", torch.zeros(SLOTS, H * P, 3))
        self.register_buffer("state", torch.zeros(SLOTS, H, P, N))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.step(self.conv, self.state, *inputs)


def _prefill(length: int, batch: int = 2) -> tuple[Tensor, ...]:
    return (
        torch.randn(batch, length, H * P),
        torch.randn(batch, length, H),
        torch.randn(batch, length, G, N),
        torch.randn(batch, length, G, N),
    )


def _step(batch: int) -> tuple[Tensor, ...]:
    slots = torch.randperm(SLOTS, dtype=torch.int32)[:batch]
    return (slots, torch.randn(batch, H * P), torch.randn(batch, H), torch.randn(batch, G, N), torch.randn(batch, G, N))


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    before = {name: dict(op.backends) for name, op in OPS.items()}
    yield
    for name, backends in before.items():
        OPS[name].backends.clear()
        OPS[name].backends.update(backends)


@pytest.mark.aoti
def test_prefill_with_a_dynamic_length(tmp_path: Path) -> None:
    length, batch = Dim("length", min=2, max=4096), Dim("batch", min=2, max=64)
    shapes = tuple({0: batch, 1: length} for _ in range(4))
    model = Prefill()
    path = export.package(model, tmp_path / "prefill.pt2", _prefill(21), dynamic_shapes=shapes, verify=True)
    loaded = torch._inductor.aoti_load_package(str(path))
    with torch.no_grad():
        for size, rows in ((2, 2), (16, 3), (77, 2)):
            inputs = _prefill(size, rows)
            torch.testing.assert_close(loaded(*inputs), model(*inputs), rtol=2e-4, atol=2e-4)


@pytest.mark.aoti
@pytest.mark.gpu
def test_packages_for_a_gpu(tmp_path: Path) -> None:
    length = Dim("length", min=2, max=4096)
    inputs = tuple(t.cuda() for t in _prefill(77))
    shapes = tuple({1: length} for _ in range(4))
    prefill = Prefill().cuda()
    export.package(
        prefill, tmp_path / "prefill.pt2", inputs, dynamic_shapes=shapes, verify=True, portable_compiler=True
    )
    states = (torch.randn(SLOTS, H * P, 3).cuda(), torch.randn(SLOTS, H, P, N).cuda())
    step = tuple(t.cuda() for t in _step(4))
    export.package(Decode().cuda(), tmp_path / "decode.pt2", (*states, *step), verify=True, portable_compiler=True)


class Scan(torch.nn.Module):
    """The scan alone."""

    def __init__(self) -> None:
        super().__init__()
        self.A = torch.nn.Parameter(-torch.rand(H) - 1)

    def forward(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return tmo.mamba_chunk_scan_combined(x, dt, self.A, B, C, 64, dt_softplus=True)


@pytest.mark.aoti
@pytest.mark.gpu
def test_a_package_does_without_what_its_launcher_lacks(tmp_path: Path) -> None:
    # torch 2.11 launches kernels from C++ with scratch memory for one program: those of a package make no descriptors.
    shapes = ((1, 200, H, 64), (1, 200, H), (1, 200, G, 128), (1, 200, G, 128))
    inputs = tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    config = {"BLOCK_Q": 64, "BLOCK_P": 64, "num_warps": 4, "num_stages": 3, "TMA": True}
    lengths = tuple({1: Dim("length", min=2)} for _ in shapes)
    path = tmp_path / "scan.pt2"
    with use_config("mamba_chunk_scan_combined", config):
        export.package(Scan().cuda(), path, inputs, dynamic_shapes=lengths, verify=True, portable_compiler=True)


@pytest.mark.aoti
def test_decode_updates_the_callers_states_with_a_dynamic_batch(tmp_path: Path) -> None:
    batch = Dim("batch", min=2, max=SLOTS)
    shapes = (None, None, *({0: batch} for _ in range(5)))
    model = Decode()
    states = (torch.randn(SLOTS, H * P, 3), torch.randn(SLOTS, H, P, N))
    path = export.package(model, tmp_path / "decode.pt2", (*states, *_step(4)), dynamic_shapes=shapes, verify=True)
    loaded = torch._inductor.aoti_load_package(str(path))
    others = tuple(t.clone() for t in states)
    with torch.no_grad():
        for rows in (2, 5, 3):
            inputs = _step(rows)
            torch.testing.assert_close(loaded(*states, *inputs), model(*others, *inputs))
            for state, other in zip(states, others, strict=True):
                torch.testing.assert_close(state, other)


@pytest.mark.aoti
def test_states_that_are_buffers_live_in_the_package(tmp_path: Path) -> None:
    model, example = Counted(), _step(3)
    path = export.package(model, tmp_path / "buffers.pt2", example, verify=True, portable_compiler=True)
    assert not model.state.any(), "exporting leaves the model's own states alone"
    loaded = torch._inductor.aoti_load_package(str(path))
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(loaded(*example), model(*example))


def _opaque() -> None:
    from torch_mamba_ops.ops.rms_norm_gated.reference import rms_norm_gated

    tmo.register_backend("rms_norm_gated", "boxed", version="1")(rms_norm_gated)


def test_an_opaque_backend_is_refused_by_name_before_compiling(tmp_path: Path) -> None:
    _opaque()
    with tmo.use_backend(rms_norm_gated="boxed"), pytest.raises(tmo.BackendError) as error:
        export.package(Prefill(), tmp_path / "refused.pt2", _prefill(21))
    assert "rms_norm_gated uses 'boxed'" in str(error.value) and "'reference'" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_saved_program_keeps_its_backends(tmp_path: Path) -> None:
    program = torch.export.export(Prefill(), _prefill(21), strict=False)
    torch.export.save(program, tmp_path / "program.pt2")
    read = torch.export.load(tmp_path / "program.pt2")
    names = ["causal_conv1d_fn", "mamba_chunk_scan_combined", "rms_norm_gated"]
    assert export.backends_of(read) == [(name, "reference") for name in names]


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path: got .* expected a name that ends in \.pt2"):
        export.package(Prefill(), tmp_path / "model.so", _prefill(21))
    with pytest.raises(ValueError, match="args: got none"):
        export.package(Prefill(), tmp_path / "model.pt2")
    program = torch.export.export(Prefill(), _prefill(21), strict=False)
    with pytest.raises(ValueError, match="dynamic_shapes: given with an exported program"):
        export.package(program, tmp_path / "model.pt2", dynamic_shapes={})


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "std::regex.*portable_compiler=True"),
        ("raise RuntimeError('Could not find schema for a::b')", "not self-contained"),
        ("import sys; sys.exit('out of paper')", "ended with 1.*out of paper"),
    ],
)
def test_a_crash_of_the_clean_process_is_told_with_its_cause(
    code: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_CLEAN_PROCESS", code)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda *args, **kwargs: None)
    with pytest.raises(export.PackageError, match=f"(?s){told}"):
        export.package(Prefill(), tmp_path / "model.pt2", _prefill(21), verify=True)


def test_other_results_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(target: Path, args: Any, kwargs: Any) -> Any:
        outputs, args, kwargs = export._run(Prefill(), args, kwargs)
        return [1.01 * outputs[0]], args, kwargs

    monkeypatch.setattr(export, "_run_in_clean_process", wrong)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda *args, **kwargs: None)
    with pytest.raises(export.PackageError, match="output 0: off by"):
        export.package(Prefill(), tmp_path / "model.pt2", _prefill(21), verify=True)


def test_the_portable_compiler_links_the_shared_libstdcxx_and_only_when_it_links(tmp_path: Path) -> None:
    wrapper, source = str(export._wrapped_compiler(tmp_path)), tmp_path / "empty.cpp"
    source.touch()
    subprocess.run([wrapper, "-c", "-fPIC", str(source), "-o", str(tmp_path / "empty.o")], check=True)
    library = tmp_path / "library.so"
    subprocess.run([wrapper, "-shared", "-static-libstdc++", str(tmp_path / "empty.o"), "-o", str(library)], check=True)
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert "libstdc++.so.6" in needed
