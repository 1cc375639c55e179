"""More than one device: rules for DTensors, tensor-parallel layers, states moved between sizes. Processes over gloo."""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
if not torch.distributed.is_available():
    pytest.skip("torch without torch.distributed", allow_module_level=True)

import distributed_workers

from torch_mamba_ops.dispatch import OPS
from torch_mamba_ops.distributed import ReshardPlan, sharding
from torch_mamba_ops.distributed.split import conv_channels_of, groups_of
from torch_mamba_ops.integrations import transformers as integration
from torch_mamba_ops.state.spec import MambaStateSpec

DIFFERENTIABLE = sorted(name for name, op in OPS.items() if op.differentiable)
BIG = MambaStateSpec.mamba2(8, 4, 16, groups=2, conv_width=4, conv_dtype="bfloat16", conv_layout="DS")


_IMPORTED = [  # once, and not in each process
    "torch_mamba_ops.distributed",
    "torch_mamba_ops.testing",
    *(f"transformers.models.{model}.modeling_{model}" for model in integration.MODELS),
]


class _Processes:
    """Processes that join once and then run checks together."""

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_IMPORTED)
        self.size, self.pipes, self.processes = size, [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (rank, size, str(folder / "store"), theirs)
            process = context.Process(target=distributed_workers.serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def check(self, name: str, *arguments: Any) -> None:
        """Runs a check of `distributed_workers`; fails with what the processes say."""
        for pipe in self.pipes:
            pipe.send((name, arguments))
        told: dict[int, str | None] = {}
        while len(told) < self.size:
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in told]
            ready = wait(waiting, timeout=120)
            assert ready, f"{name}: no answer in two minutes from {self.size - len(told)} processes"
            for pipe in ready:
                told[self.pipes.index(pipe)] = pipe.recv()  # type: ignore[arg-type, union-attr]
        wrong = [f"process {rank}:\n{text}" for rank, text in told.items() if text is not None]
        assert not wrong, "\n".join(wrong)

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
            process.kill()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Processes]:
    processes = _Processes(2, tmp_path_factory.mktemp("two"))
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Processes]:
    processes = _Processes(4, tmp_path_factory.mktemp("four"))
    yield processes
    processes.close()


@pytest.fixture
def processes(request: pytest.FixtureRequest, size: str) -> _Processes:
    found: _Processes = request.getfixturevalue(size)
    return found


both = pytest.mark.parametrize("size", ["two", "four"])


def test_every_operator_has_a_rule() -> None:
    assert set(sharding._SPLITS) == set(OPS) == sharding._registered


@both
@pytest.mark.parametrize("name", sorted(OPS))
def test_operators_on_several_devices_are_those_on_one(processes: _Processes, name: str) -> None:
    processes.check("operators", name, False)


@pytest.mark.parametrize("name", sorted(OPS))
def test_they_are_part_of_one_graph(two: _Processes, name: str) -> None:
    two.check("operators", name, True)


@both
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_go_through(processes: _Processes, name: str) -> None:
    processes.check("gradients", name)


@both
def test_a_mesh_of_two_dimensions_splits_sequences_and_heads(processes: _Processes) -> None:
    processes.check("two_dimensions")


@both
def test_states_are_never_moved(processes: _Processes) -> None:
    processes.check("states_are_never_moved")


@pytest.mark.parametrize(("size", "groups"), [("two", 1), ("two", 8), ("four", 1), ("four", 2)])
@pytest.mark.parametrize("name", sorted(distributed_workers._SIZES))
def test_a_split_mixer_gives_what_the_whole_one_gives(processes: _Processes, name: str, groups: int) -> None:
    processes.check("mixer", name, groups, False, {})


@both
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("before", [False, True])
def test_norms_of_groups_before_and_after_the_gate(processes: _Processes, groups: int, before: bool) -> None:
    norm = {"mamba_rms_norm": True, "mamba_norm_before_gate": before}
    processes.check("mixer", "falcon_h1", groups, False, norm)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", ["bamba", "nemotron_h_mlp"])
def test_a_split_mixer_compiles_as_one_graph(two: _Processes, name: str, groups: int) -> None:
    two.check("mixer", name, groups, True, {})


@pytest.mark.parametrize("name", sorted(distributed_workers._SIZES))
def test_whole_models_give_the_same_logits(two: _Processes, name: str) -> None:
    two.check("model", name)


@both
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", ["bamba", "nemotron_h_mlp"])
def test_gradients_of_a_split_mixer(processes: _Processes, name: str, groups: int) -> None:
    processes.check("mixer_gradients", name, groups)


@both
def test_mixers_that_cannot_be_split_are_refused(processes: _Processes) -> None:
    processes.check("refused_mixers")


@pytest.mark.parametrize("layouts", ["DS DS", "SD SD", "SD DS", "DS SD"])
@pytest.mark.parametrize(
    ("sources", "targets"),
    [([0, 1, 2, 3], [0, 1]), ([0, 1], [0, 1, 2, 3]), ([2, 3], [1]), ([0, 1, 2, 3], [3, 2, 1, 0])],
    ids=["4to2", "2to4", "2to1_apart", "reversed"],
)
def test_states_move_between_sizes(four: _Processes, sources: list[int], targets: list[int], layouts: str) -> None:
    four.check("reshard", BIG, sources, targets, layouts)


@pytest.mark.parametrize(
    "spec",
    [
        MambaStateSpec.mamba2(8, 4, 16, groups=1, ssm_dtype="bfloat16", speculative_tokens=2),
        MambaStateSpec.mamba2(12, 4, 16, groups=3),
        MambaStateSpec.mamba1(24, 16),
        MambaStateSpec.short_conv(24),
    ],
    ids=["one_group", "three_groups", "mamba1", "short_conv"],
)
def test_states_of_every_kind_move(four: _Processes, spec: MambaStateSpec) -> None:
    four.check("reshard", spec, [0, 1, 2, 3], [1, 0] if spec.groups != 3 else [1], "SD DS")


@both
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("layout", ["SD", "DS"])
def test_prefill_on_all_and_decode_on_half(processes: _Processes, groups: int, layout: str) -> None:
    processes.check("prefill_then_decode", groups, layout)


@pytest.mark.parametrize("devices", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_parts_are_as_large_as_the_spec_says(groups: int, devices: int) -> None:
    spec = MambaStateSpec.mamba2(16, 8, 32, groups=groups, tensor_parallel_size=devices)
    for device in range(devices):
        runs = conv_channels_of(16, 8, groups, 32, devices, device)
        assert sum(map(len, runs)) == spec.conv_dim
        assert len(groups_of(16, groups, devices, device)) == spec.groups


def test_groups_go_to_the_devices_whose_heads_use_them() -> None:
    assert [groups_of(8, 2, 4, device) for device in range(4)] == [(0,), (0,), (1,), (1,)]
    assert [groups_of(8, 4, 2, device) for device in range(2)] == [(0, 1), (2, 3)]
    # Where heads and groups do not nest, each equal block of heads has its group.
    assert [groups_of(12, 3, 2, device) for device in range(2)] == [(0, 0, 1), (1, 2, 2)]


def test_bytes_moved_are_stated() -> None:
    plan = ReshardPlan(BIG, (0, 1, 2, 3), (0, 1))
    # Process 0 gets the heads of 1, and has its group; process 1 gets all heads and a group from 2 and 3.
    x, group, ssm = 2 * 4 * 3 * 2, 2 * 16 * 3 * 2, 2 * 4 * 16 * 4
    assert plan.bytes_moved() == 3 * (x + ssm) + group
    assert plan.bytes_moved(slots=5, layers=7) == 35 * plan.bytes_moved()
    assert ReshardPlan(BIG, (0, 1), (0, 1)).bytes_moved() == 0
    assert plan == ReshardPlan(BIG, (0, 1, 2, 3), (0, 1)) and hash(plan) == hash(ReshardPlan(BIG, (0, 1, 2, 3), (0, 1)))


def test_plans_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="targets: got 8 heads, expected a multiple of the 3 devices"):
        ReshardPlan(BIG, (0, 1), (0, 1, 2))
    with pytest.raises(ValueError, match="sources: got 24 channels, expected a multiple of the 5 devices"):
        ReshardPlan(MambaStateSpec.mamba1(24, 16), (0, 1, 2, 3, 4), (0, 1))
    with pytest.raises(ValueError, match=r"sources: got \(0, 0\), expected ranks, each once"):
        ReshardPlan(BIG, (0, 0), (0, 1))


def test_the_page_runs(tmp_path: Path) -> None:
    page = Path(__file__).parent.parent / "docs" / "distributed.md"
    example = tmp_path / "example.py"
    example.write_text("\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*launcher, str(example)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
