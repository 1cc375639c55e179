"""Whole Hugging Face models on a GPU: graphs, tokens, speed against their own operations and mamba_ssm's, packages.

    python benchmarks/models.py [--models NAME ...] [--parts PART ...] [--layers N] [--out models.csv] [--quick]
    python benchmarks/models.py --tiny --device cpu

compile  Seconds of the first calls (prefill of two lengths by one graph, one decode step), with what the caches hold.
prefill  Ten lengths up to 32,768 tokens: how many graphs, and the time of 8,192 tokens, in turns with that of peers.
decode   Batches 1, 16, 64 and 256 with CUDA graphs: graphs, graphs skipped, states cloned, and the bytes of weights and
         states (keys and values too) over the time of a step, against what a copy on the device moves.
tuned    Batch 1 of decode once more, with what ``mode="max-autotune"`` sets and kernels as in ``overlap``: products of
         one row are then written by Inductor, its configs chosen by the clock.
overlap  Batches 1 and 64 of decode once more, with kernels that begin before the one before them ends (Inductor's
         ``triton.enable_pdl``): the time, and whether the logits are those of kernels in turn, bit for bit, both
         compiled without choosing by time.
check    The same greedy tokens as the untouched model in float32; logits in bfloat16 inside a budget: twice the error
         that the untouched model makes in bfloat16.
peers    The same decode steps, and with part ``prefill`` the same prefill, by the untouched model, eager and compiled
         (transformers takes what it finds of mamba_ssm: told in the notes), and compiled with mamba_ssm's kernels for
         the scan and the state update as backends of our operations.
first    In a process of its own: the first token after `warmup`, against a later one. Matrix products are run
         before by the untouched model, so that cuBLAS's own start is not counted.
export   Two or three layers, small vocabulary and MLP, as CUDA packages: prefill of any length, and decode. A process
         without this package runs them, and so does the C++ program of examples/aoti_cpp.
train    A compiled training step of a small model: loss and gradients against the untouched one.

Random weights; layers are cut to ``--layers`` with their pattern kept (0: all). Each model runs in a process of its
own: ``--jobs`` of them prepare (build, compile, export) side by side, then are measured one after the other, alone on
the device. What fails is printed with its reason and left out. The CSV is written after every row.
"""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import gc
import importlib
import inspect
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import decode  # noqa: E402 - its machine, versions and copy rate

import torch_mamba_ops as tmo  # noqa: E402 - of this checkout
from torch_mamba_ops import export  # noqa: E402
from torch_mamba_ops.dispatch import OPS  # noqa: E402
from torch_mamba_ops.integrations import transformers as integration  # noqa: E402

BF16, F32 = torch.bfloat16, torch.float32
BATCHES = (1, 64, 16, 256)
LENGTHS = (512, 1000, 768, 1536, 2048, 3001, 4096, 8192, 16384, 32768)
ROOM = 128  # tokens in the cache of a decode benchmark, and after the prompt of a prefill
PARTS = ("compile", "prefill", "decode", "tuned", "overlap", "check", "peers", "first", "export", "train")
PEERS = ("untouched", "mamba_ssm")
BANDWIDTH_BARS = {1: ">=80", 64: ">=70"}  # of ours, in percent of a copy, by batch
Options = argparse.Namespace
OVERLAP = {"triton.enable_pdl": True}
# Inductor's options, by contender.
INDUCTOR = {"ours-pdl": OVERLAP, "ours-tuned": torch._inductor.list_mode_options("max-autotune") | OVERLAP}

# --- models ---

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TINY_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
_TINY_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 32,
}
_TINY_NEMOTRON = {
    **_TINY_ATTENTION, "head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2,
    "chunk_size": 32,
}  # fmt: skip
_BLOCKS = {"M": "mamba", "-": "mlp", "*": "attention"}
_NEMOTRON_8B = "M-M-M-M*-" + 3 * "M-M-M-M-M*-" + "M-M-M-M-M-"
_NANO_9B = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"


def _spread(n: int, full: int, at: Sequence[int]) -> list[int]:
    """Which of n layers are the special ones: all in the whole model, else every fifth or so, at least one."""
    return list(at) if n == full else list(range(n // 2, n, 8))


def _window(pattern: str, n: int) -> list[str]:
    """n neighbouring layers that end with the first attention and what follows it."""
    end = max(n, pattern.index("*") + 2)
    return [_BLOCKS[kind] for kind in pattern[end - n : end]]


@dataclass(frozen=True)
class Model:
    """A model of Hugging Face transformers, at its real shapes or tiny."""

    name: str
    config: str
    layers: int
    real: dict[str, Any]
    tiny: dict[str, Any]
    pattern: Callable[[int], dict[str, Any]]
    small_mlp: dict[str, Any] = field(default_factory=lambda: {"intermediate_size": 1024})

    def make(self, layers: int, tiny: bool = False, **changes: Any) -> Any:
        """Its configuration; 0 layers: all."""
        n = min(layers or self.layers, self.layers)
        hidden = {"hidden_size": 64, "vocab_size": 128} if tiny else {}
        sizes = self.real | (hidden | self.tiny if tiny else {}) | self.pattern(n) | changes
        return getattr(importlib.import_module("transformers"), self.config)(**_TOKENS, **sizes)


MODELS = {
    model.name: model
    for model in (
        Model(
            "Bamba-9B", "BambaConfig", 32,
            {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
             "num_key_value_heads": 8, "mamba_n_heads": 128, "mamba_d_head": 64, "mamba_d_state": 128,
             "mamba_n_groups": 1, "mamba_chunk_size": 256},
            _TINY_ATTENTION | _TINY_MAMBA2,
            lambda n: {"num_hidden_layers": n, "attn_layer_indices": _spread(n, 32, (9, 18, 27))},
        ),
        Model(
            "Nemotron-H-8B", "NemotronHConfig", 52,
            {"vocab_size": 131072, "hidden_size": 4096, "intermediate_size": 21504, "num_attention_heads": 32,
             "num_key_value_heads": 8, "head_dim": 128, "mamba_num_heads": 128, "mamba_head_dim": 64,
             "ssm_state_size": 128, "n_groups": 8, "chunk_size": 128, "max_position_embeddings": 65536},
            _TINY_NEMOTRON,
            lambda n: {"layers_block_type": _window(_NEMOTRON_8B, n)},
        ),
        Model(
            "Nemotron-Nano-9B-v2", "NemotronHConfig", 56,
            {"vocab_size": 131072, "hidden_size": 4480, "intermediate_size": 15680, "num_attention_heads": 40,
             "num_key_value_heads": 8, "head_dim": 128, "mamba_num_heads": 128, "mamba_head_dim": 80,
             "ssm_state_size": 128, "n_groups": 8, "chunk_size": 128, "max_position_embeddings": 65536},
            _TINY_NEMOTRON,
            lambda n: {"layers_block_type": _window(_NANO_9B, n)},
        ),
        Model(
            "Falcon-H1-7B", "FalconH1Config", 44,
            {"vocab_size": 130048, "hidden_size": 3072, "intermediate_size": 12288, "num_attention_heads": 12,
             "num_key_value_heads": 2, "head_dim": 128, "mamba_d_ssm": 3072, "mamba_n_heads": 24, "mamba_d_head": 128,
             "mamba_d_state": 256, "mamba_n_groups": 1, "mamba_chunk_size": 256, "max_position_embeddings": 65536},
            _TINY_ATTENTION | _TINY_MAMBA2 | {"mamba_d_ssm": 128, "head_dim": 16},
            lambda n: {"num_hidden_layers": n},
        ),
        Model(
            "Zamba2-7B", "Zamba2Config", 81,
            {"vocab_size": 32000, "hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 32,
             "num_key_value_heads": 32, "n_mamba_heads": 112, "mamba_headdim": 64, "mamba_d_state": 64,
             "mamba_ngroups": 2, "num_mem_blocks": 2, "use_mem_rope": True, "chunk_size": 256},
            {"intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4, "n_mamba_heads": 8,
             "mamba_headdim": 16, "mamba_d_state": 16, "chunk_size": 32, "adapter_rank": 8},
            lambda n: {
                "num_hidden_layers": n,
                "num_mem_blocks": min(2, max(1, n // 3)),
                "layers_block_type": [
                    "hybrid" if i in ((6, *range(11, 78, 6)) if n == 81 else range(2, n, 3)) else "mamba"
                    for i in range(n)
                ],
            },
        ),
        Model(
            "Granite-4.0-H-Small", "GraniteMoeHybridConfig", 40,
            {"vocab_size": 100352, "hidden_size": 4096, "intermediate_size": 768, "shared_intermediate_size": 1536,
             "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 72, "num_experts_per_tok": 10,
             "mamba_n_heads": 128, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1,
             "mamba_chunk_size": 256, "max_position_embeddings": 65536},
            _TINY_ATTENTION | _TINY_MAMBA2
            | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64},
            lambda n: {
                "num_hidden_layers": n,
                "layer_types": [
                    "attention" if i in _spread(n, 40, (5, 15, 25, 35)) else "mamba" for i in range(n)
                ],
            },
            {"num_local_experts": 8, "num_experts_per_tok": 2},
        ),
        Model(
            "Mamba2-2.7B", "Mamba2Config", 64,
            {"vocab_size": 50288, "hidden_size": 2560, "num_heads": 80, "head_dim": 64, "state_size": 128,
             "n_groups": 1, "chunk_size": 256, "expand": 2, "tie_word_embeddings": True},
            {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 32},
            lambda n: {"num_hidden_layers": n},
            {},
        ),
        Model(
            "Falcon-Mamba-7B", "FalconMambaConfig", 64,
            {"vocab_size": 65024, "hidden_size": 4096, "state_size": 16, "expand": 2, "time_step_rank": 256,
             "tie_word_embeddings": False},
            {"state_size": 8, "time_step_rank": 8},
            lambda n: {"num_hidden_layers": n},
            {},
        ),
    )
}  # fmt: skip


def build(config: Any, dtype: torch.dtype, device: torch.device, **more: Any) -> torch.nn.Module:
    """The model with random weights, made where it will be. Step sizes and decays as trained models have them: with
    transformers' own, a state forgets within a token."""
    transformers: Any = importlib.import_module("transformers")
    torch.manual_seed(0)
    with torch.device(device):
        model: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **more).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("dt_bias") or name.endswith("dt_proj.bias"):
            parameter.data.copy_(decode.initial_dt_bias(parameter))
        elif name.endswith("A_log") and parameter.dim() == 1:
            parameter.data.uniform_(0, math.log(16))
    return model.requires_grad_(False)


def _experts_in_float32(model: Any) -> None:
    """By torch's operators. The default for float32 asks the host how many tokens each expert has, by an operator of
    transformers' that a package cannot run."""
    if getattr(model.config, "num_local_experts", 0):
        model.set_experts_implementation("batched_mm")


def fresh(config: Any, length: int) -> Any:
    """A cache that the next prefill fills."""
    return importlib.import_module("transformers").StaticCache(config=config, max_cache_len=length)


# --- running them ---

Step = Callable[[Tensor, Any, Tensor], Tensor]


def step_of(model: torch.nn.Module) -> Step:
    """(ids, cache, positions) -> logits of the last token"""
    names = inspect.signature(model.forward).parameters
    cache_name = "past_key_values" if "past_key_values" in names else "cache_params"
    with_positions = "position_ids" in names

    def step(ids: Tensor, cache: Any, positions: Tensor) -> Tensor:
        given = {cache_name: cache, "use_cache": True, "logits_to_keep": 1}
        if with_positions:
            given["position_ids"] = positions
        logits: Tensor = model(ids, **given).logits
        return logits

    return step


class Graphs:
    """Inductor, and a note of every graph and of the backend of every operator of this package in it."""

    def __init__(self, patches: dict[str, bool], trace_only: bool = False) -> None:
        self.count = 0
        self.backends: dict[str, set[str]] = {}
        self._trace_only = trace_only
        self._patches = patches
        self._by_overload = {op.overload: name for name, op in OPS.items()}

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        self.count += 1
        for node in graph.graph.nodes:
            if (name := self._by_overload.get(node.target)) is not None:
                self.backends.setdefault(name, set()).add(str(node.kwargs["backend"]).partition("@")[0])
        if self._trace_only:
            return cast(Callable[..., Any], torch._dynamo.lookup_backend("aot_eager")(graph, inputs))
        return cast(Callable[..., Any], compile_fx(graph, inputs, config_patches=self._patches))


def _ssm_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    initial_states: Tensor | None, chunk_size: int, dt_softplus: bool, dt_min: float | None, dt_max: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")._mamba_chunk_scan_combined_fwd
    limits = (0.0 if dt_min is None else dt_min, math.inf if dt_max is None else dt_max)
    out, *_, final = scan(
        x, dt, A, B, C, chunk_size, D=D, dt_bias=dt_bias, initial_states=initial_states, dt_softplus=dt_softplus,
        dt_limit=limits,
    )  # fmt: skip
    return out, final.float(), final.new_empty((0, *final.shape[1:]), dtype=F32)


def _ssm_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool,
) -> Tensor:  # fmt: skip
    update = importlib.import_module("mamba_ssm.ops.triton.selective_state_update").selective_state_update
    if A.dim() == 1:  # one value a head: expanded, as it recognises it
        heads, head_dim, size = state.shape[1:]
        A, dt = A[:, None, None].expand(heads, head_dim, size), dt[..., None].expand(*dt.shape, head_dim)
        dt_bias = None if dt_bias is None else dt_bias[:, None].expand(heads, head_dim)
        D = None if D is None else D[:, None].expand(heads, head_dim) if D.dim() == 1 else D
    out: Tensor = update(state, x, dt, A, B, C, D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus)
    return out


def packaged(model: torch.nn.Module) -> list[str]:
    """The functions of the untouched model that transformers has replaced by a package's."""
    found = []
    for name, function in vars(sys.modules[type(model).__module__]).items():
        if inspect.isfunction(function) and inspect.getclosurevars(function).nonlocals.get("is_new_implementation"):
            found.append(f"{inspect.getclosurevars(function).nonlocals['implementation'].__module__}.{name}")
    return sorted(found)


MAMBA_SSM = {"mamba_chunk_scan_combined": _ssm_scan, "selective_state_update": _ssm_update}


@contextmanager
def contender(name: str) -> Iterator[None]:
    """Under which the models run ours, mamba_ssm's kernels or, untouched, their own operations."""
    with ExitStack() as stack:
        if name.startswith("untouched"):
            integration.disable()
            stack.callback(integration.enable)
        else:
            integration.enable()
        if name == "mamba_ssm":
            stack.enter_context(tmo.use_backend(**dict.fromkeys(MAMBA_SSM, "mamba_ssm")))
        yield


class Session:
    """One model, what is compiled of it, and the rows found."""

    def __init__(self, model: Model, options: Options) -> None:
        self.description, self.options = model, options
        self.device = torch.device(options.device)
        self.config = model.make(options.layers, options.tiny)
        began = time.perf_counter()
        self.model = build(self.config, BF16, self.device)
        self.step = step_of(self.model)
        self.layers = min(options.layers or model.layers, model.layers)
        self.wait()
        weights = sum(p.nbytes for p in self.model.parameters())
        self.say(f"{self.layers} layers, {weights / 1e9:.2f} GB, built in {time.perf_counter() - began:.1f} s")
        self.prompts: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.caches: dict[int, Any] = {}
        self.compiled: dict[str, Callable[..., Tensor]] = {}
        self.prefills: dict[str, Callable[[int], Tensor]] = {}  # to be timed, by contender
        self.prepare_until = time.monotonic() + options.prepare

    def wait(self) -> None:
        """Until what the device was given is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def graphs(self, cuda_graphs: bool = False, patches: dict[str, bool] | None = None) -> Graphs:
        """To compile with: CUDA graphs where there is such a device; tiny models are traced, and not compiled."""
        cuda = self.device.type == "cuda"
        return Graphs({"triton.cudagraphs": cuda_graphs and cuda, **(patches or {})}, self.options.tiny and not cuda)

    def hurry(self) -> None:
        """Raises when nothing more should be prepared."""
        if time.monotonic() > self.prepare_until:
            raise TimeoutError(f"no time left: preparing may take {self.options.prepare:.0f} s (--limit)")

    def say(self, text: str) -> None:
        """A line of this model's."""
        print(f"[{self.description.name}] {text}", flush=True)

    def record(
        self, part: str, what: str, value: float, unit: str, *, contender: str = "ours", batch: int = 1,
        tokens: int = 1, bar: str = "", note: str = "",
    ) -> None:  # fmt: skip
        """One number, and whether it is inside its bar (``<=3``, ``>=80``)."""
        row = {
            "model": self.description.name, "layers": self.layers, "part": part, "what": what, "contender": contender,
            "batch": batch, "tokens": tokens, "value": f"{value:.6g}", "unit": unit, "bar": bar,
            "met": _met(value, bar), "note": note,
        }  # fmt: skip
        print("ROW " + json.dumps(row), flush=True)

    def ids(self, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """Random tokens, and their positions."""
        if (batch, length) not in self.prompts:
            generator = torch.Generator().manual_seed(length)
            ids = torch.randint(3, self.config.vocab_size, (batch, length), generator=generator).to(self.device)
            self.prompts[batch, length] = ids, torch.arange(length, device=self.device).expand(batch, -1)
        return self.prompts[batch, length]

    def fresh(self, length: int) -> Any:
        """A cache that the next prefill fills."""
        return fresh(self.config, length)

    def primed(self, batch: int) -> Any:
        """A cache whose tensors have their addresses for good, after a short prompt. CUDA graphs need such, and are
        recorded anew for each: it is kept and used again."""
        if batch not in self.caches:
            self.caches[batch] = integration.static_cache(self.model, batch, ROOM)
        cache = self.caches[batch]
        cache.reset()
        with contender("ours"):
            self.step(*self._with(cache, *self.ids(batch, 16)))
        return cache

    @staticmethod
    def _with(cache: Any, ids: Tensor, positions: Tensor) -> tuple[Tensor, Any, Tensor]:
        return ids, cache, positions

    def token(self, batch: int, position: int = 16) -> tuple[Tensor, Tensor]:
        """One token a sequence, and where it stands."""
        return self.ids(batch, 1)[0], torch.full((batch, 1), position, device=self.device)


def _met(value: float, bar: str) -> str:
    return "" if not bar else str({"<=": value <= float(bar[2:]), ">=": value >= float(bar[2:])}[bar[:2]])


def rewind(cache: Any, length: int = 16) -> None:
    """As if there had been so many tokens: steps that are timed do not run out of the cache."""
    for layer in cache.layers:
        if isinstance(seen := getattr(layer, "cumulative_length", None), Tensor):
            seen.fill_(length)


def moved(session: Session, batch: int) -> int:
    """Bytes of a decode step: weights as often as a layer is run (of experts those that are expected to be chosen),
    states read and written, keys and values read. Shared layers are larger than the cache."""
    calls: dict[torch.nn.Module, int] = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, _: calls.__setitem__(module, calls.get(module, 0) + 1))
        for module in session.model.modules()
    ]
    cache = session.primed(batch)
    calls.clear()
    session.step(*session._with(cache, *session.token(batch)))
    for hook in hooks:
        hook.remove()
    experts, chosen = (getattr(session.config, name, None) for name in ("num_local_experts", "num_experts_per_tok"))
    total = 0

    def visit(module: torch.nn.Module, times: int) -> None:
        nonlocal total
        times = calls.get(module, 0) or times
        own = sum(p.nbytes for p in module.parameters(recurse=False))
        if isinstance(module, torch.nn.Embedding):
            own = batch * module.embedding_dim * module.weight.itemsize
        elif experts and chosen and any(p.dim() == 3 and p.shape[0] == experts for p in module.parameters(False)):
            own = int(own * (1 - (1 - chosen / experts) ** batch))
        total += times * own
        for child in {id(c): c for c in module.children()}.values():
            if child not in seen:
                seen.add(child)
                visit(child, times)

    seen: set[torch.nn.Module] = set()
    visit(session.model, 1)
    for layer in cache.layers:
        for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
            total += sum(2 * t.nbytes for t in states.values() if t is not None)
        total += sum(t.nbytes for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None)
    return total


# --- times ---


def seconds(session: Session, call: Callable[[], object], calls: int, rounds: int) -> float:
    """Of one call, the median of rounds."""
    times = []
    for _ in range(rounds + 1):
        if session.device.type == "cuda":
            began, ended = decode._event(), decode._event()
            session.wait()
            began.record()
            for _ in range(calls):
                call()
            ended.record()
            ended.synchronize()
            times.append(began.elapsed_time(ended) * 1e-3 / calls)
        else:
            start = time.perf_counter()
            for _ in range(calls):
                call()
            times.append((time.perf_counter() - start) / calls)
    return statistics.median(times[1:])


def profile(session: Session, what: str, call: Callable[[], object], calls: int = 3) -> tuple[float, float]:
    """CUDA graphs launched by a call, and microseconds of its kernels. Prints those that take most of the time."""
    if session.device.type != "cuda":
        return 0, math.nan
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    ) as found:
        for _ in range(calls):
            call()
        session.wait()
    kernels: dict[str, list[float]] = {}
    launches = 0
    for event in found.events():
        launches += event.name == "cudaGraphLaunch"
        # What Inductor marks as a region is no kernel.
        marked = getattr(event, "is_user_annotation", False) or event.name.startswith(("##", "Torch-Compiled"))
        if event.device_type == torch.autograd.DeviceType.CUDA and not marked:
            kernels.setdefault(event.name[:76], []).append(event.time_range.elapsed_us())
    busy, count = sum(map(sum, kernels.values())) / calls, sum(map(len, kernels.values())) / calls
    lines = [f"{what}: {count:.0f} kernels, {busy:.0f} us busy, {launches / calls:.1f} CUDA graphs launched"]
    for name, times in sorted(kernels.items(), key=lambda item: -sum(item[1]))[: session.options.kernels]:
        lines.append(f"    {sum(times) / calls:9.1f} us {len(times) / calls:6.1f} x {name}")
    session.say("\n".join(lines))
    return launches / calls, busy


# --- parts: each prepares, and gives back what measures ---

Measure = Callable[[], None]


def compile_times(session: Session) -> list[Measure]:
    """The first calls of prefill and decode."""
    prefill, step = session.graphs(), session.graphs(cuda_graphs=True)
    run_prefill = torch.compile(session.step, backend=prefill, fullgraph=True)
    run_step = torch.compile(session.step, backend=step, fullgraph=True, dynamic=False)
    cache, prompt_cache = session.primed(1), integration.static_cache(session.model, 1, 512)
    began = time.perf_counter()
    for length in (200, 301):
        prompt_cache.reset()
        given = session.ids(1, length)
        for tensor in given:
            torch._dynamo.mark_dynamic(tensor, 1)
        run_prefill(*session._with(prompt_cache, *given))
    session.wait()
    middle = time.perf_counter()
    run_step(*session._with(cache, *session.token(1)))
    session.wait()
    ended = time.perf_counter()
    found = "; ".join(f"{name}: {value}" for name, value in _cache_hits().items())
    bar = session.options.compile_bar
    session.record("compile", "graphs of prefill", prefill.count, "graphs", bar="<=1")
    session.record("compile", "prefill", middle - began, "s", note=found)
    session.record("compile", "decode", ended - middle, "s", note=found)
    session.record("compile", "all", ended - began, "s", bar=f"<={bar:g}" if bar else "", note=found)
    torch._dynamo.reset()  # so that other parts begin like this one
    return []


def _cache_hits() -> dict[str, int]:
    counters = torch._dynamo.utils.counters
    names = ("fxgraph_cache_hit", "fxgraph_cache_miss")
    return {name: counters["inductor"][name] for name in names} | dict(counters["aot_autograd"])


def prefill(session: Session) -> list[Measure]:
    """Ten lengths, one to three graphs; then the time of one."""
    graphs = session.graphs()
    run = torch.compile(session.step, backend=graphs, fullgraph=True)  # fullgraph: a graph break would raise
    timed = session.options.timed
    began = time.perf_counter()

    def once(length: int) -> Tensor:
        return run(*session._with(session.fresh(length + ROOM), *session.ids(1, length)))

    done, refused = 0, []
    for length in session.options.lengths:
        try:
            once(length)
            done += 1
        except torch.OutOfMemoryError as error:
            refused.append(f"{length}: {_first_line(error)}")
    session.wait()
    took = time.perf_counter() - began
    session.record("prefill", "graphs", graphs.count, "graphs", tokens=max(session.options.lengths), bar="<=3",
                   note=f"{done} lengths; {'; '.join(refused)}")  # fmt: skip
    session.record("prefill", "compile and run all lengths", took, "s", tokens=max(session.options.lengths))
    for op, names in graphs.backends.items():
        session.record("prefill", f"backend of {op}", len(names), "backends", note=", ".join(sorted(names)))
    session.prefills["ours"] = once  # and checked against float32 later

    def measure() -> None:
        _time_prefills(session)
        profile(session, f"prefill of {timed}", lambda: once(timed), 1)

    return [measure]


def _time_prefills(session: Session) -> None:
    """Of all contenders that could be prepared, in turns: a device that is kept busy becomes slower."""
    timed, times = session.options.timed, dict[str, list[float]]()
    for number in range(session.options.rounds):
        for name, once in list(session.prefills.items()):
            found = times.setdefault(name, [])
            with _left_out(session, f"{name}, prefill of {timed}"), contender(name):
                found.append(seconds(session, lambda once=once: once(timed), 2, 1))
            if len(found) == number:
                del session.prefills[name], times[name]
    medians = {name: statistics.median(found) for name, found in times.items()}
    for name, took in medians.items():
        session.record("prefill", "time", took * 1e3, "ms", contender=name, tokens=timed)
        if name != "ours" and "ours" in medians:
            bar = ">=1.05" if name == "mamba_ssm" else ""
            session.record("prefill", f"times as fast as {name}", took / medians["ours"], "x", tokens=timed, bar=bar)


def decode_steps(session: Session) -> list[Measure]:
    """Each batch has its own graph."""
    measures: list[Measure] = []
    for batch in session.options.batches:
        with _left_out(session, f"decode, batch {batch}"):
            measures.append(_decode_step(session, "ours", batch))
    return measures


def tuned(session: Session) -> list[Measure]:
    """The step of one sequence once more."""
    return [_decode_step(session, "ours-tuned", 1)]


def overlap(session: Session) -> list[Measure]:
    """The same steps by kernels that overlap."""
    measures: list[Measure] = []
    for batch in {1, 64}.intersection(session.options.batches):
        with _left_out(session, f"decode with kernels that overlap, batch {batch}"):
            measures.append(_decode_step(session, "ours-pdl", batch))
            logits = []
            for overlaps in (False, True):
                graphs = session.graphs(True, {"triton.enable_pdl": overlaps, "deterministic": True})
                run = torch.compile(step_of(session.model), backend=graphs, fullgraph=True, dynamic=False)
                for _ in range(3):  # compiles, records, replays
                    result = run(*session._with(session.primed(batch), *session.token(batch)))
                logits.append(result.clone())
            same, off = torch.equal(*logits), f"off by {_off(logits[1].float(), logits[0].float()):.1e} of the norm"
            session.record(
                "decode", "same bits as in turn", same, "", contender="ours-pdl", batch=batch, bar=">=1", note=off
            )
    return measures


def _decode_step(session: Session, name: str, batch: int) -> Measure:
    """Compiled with CUDA graphs."""
    session.hurry()
    cuda = session.device.type == "cuda"
    counters = torch._dynamo.utils.counters
    cache, token = session.primed(batch), session.token(batch)
    graphs = session.graphs(True, INDUCTOR.get(name))
    run = torch.compile(step_of(session.model), backend=graphs, fullgraph=True, dynamic=False)
    skipped = counters["inductor"]["cudagraph_skips"]
    gc.collect()
    before = torch.cuda.memory_reserved() if cuda else 0
    began = time.perf_counter()
    with contender(name):
        for _ in range(4):  # compile and warm up, record, replay
            run(*session._with(cache, *token))
    session.wait()
    took = time.perf_counter() - began
    grown = (torch.cuda.memory_reserved() if cuda else 0) - before
    skipped, missed = counters["inductor"]["cudagraph_skips"] - skipped, _cloned()
    state = max(
        t.nbytes for layer in cache.layers for t in getattr(layer, "recurrent_states", {}).values() if t is not None
    )

    def record(what: str, value: float, unit: str, bar: str = "", note: str = "") -> None:
        session.record("decode", what, value, unit, contender=name, batch=batch, bar=bar, note=note)

    ours = name.startswith("ours")
    record("first call", took, "s")
    record("graphs", graphs.count, "graphs", "<=1" if ours else "")
    record("CUDA graphs skipped", skipped, "graphs", "<=0" if ours and cuda else "")
    record("states cloned", missed, "tensors", "<=0" if ours else "")
    record("memory that graphs took", grown / 1e6, "MB", note=f"one layer's states: {state / 1e6:.1f} MB")
    for op, names in graphs.backends.items():
        record(f"backend of {op}", len(names), "backends", note=", ".join(sorted(names)))
    if name == "ours" and batch == 1:
        session.compiled["decode"] = run  # checked against float32 later
    bytes_moved = moved(session, batch)

    def once() -> None:
        run(*session._with(cache, *token))

    def measure() -> None:
        rewind(cache)
        with contender(name):
            times = []
            for _ in range(session.options.rounds):
                rewind(cache)
                times.append(seconds(session, once, 24, 1))
            took = statistics.median(times)
            rewind(cache)
            record("time", took * 1e3, "ms", note=f"{bytes_moved} bytes")
            if cuda:
                record("bandwidth", 1e-12 * bytes_moved / took, "TB/s")
            if cuda and batch in (1, 64):
                launches, busy = profile(session, f"{name}, decode, batch {batch}", once)
                record("CUDA graphs launched", launches, "a step", ">=1" if ours else "")
                record("kernels", busy / 1e3, "ms")
            rewind(cache)

    return measure


def _cloned() -> int:
    """Mutated tensors that Inductor did not write in place, in what it compiled last (0 if that came from a cache)."""
    return int(torch._dynamo.utils.ReinplaceCounters.get_total_missed())


def check(session: Session) -> list[Measure]:
    """Tokens and logits against the untouched model in float32."""
    tokens, prompt = 12, 24
    exact = copy.deepcopy(session.model).to(F32)
    ids, positions = session.ids(1, prompt + tokens)
    positions = positions.contiguous()

    def generate(step: Step, name: str, forced: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens and logits; of the forced tokens if they are given."""
        with contender(name):
            cache = session.fresh(ROOM)
            logits = [step(ids[:, :prompt], cache, positions[:, :prompt])]
            for i in range(tokens - 1):
                last = logits[-1][:, -1:].argmax(-1) if forced is None else forced[:, i : i + 1]
                logits.append(step(last, cache, positions[:, prompt + i : prompt + i + 1]))
        told = torch.cat(logits, 1).float()
        return told.argmax(-1), told

    wanted, truth = generate(step_of(exact), "untouched")
    got, close = generate(step_of(exact), "ours")
    session.record(
        "check", "greedy tokens like float32's", float((got == wanted).sum()), "tokens", tokens=tokens,
        bar=f">={tokens}", note=f"ours in float32, eager; logits off by {_off(close, truth):.1e}",
    )  # fmt: skip
    _, own = generate(session.step, "untouched", wanted)
    found, ours = generate(session.step, "ours", wanted)
    budget = 2 * _off(own, truth)

    def verdict(what: str, logits: Tensor, allowed: float) -> None:
        session.record("check", what, _off(logits, truth[:, : logits.shape[1]]), "of the norm", bar=f"<={allowed:.3g}",
                       note="the bar: twice the untouched model's error in bfloat16")  # fmt: skip

    verdict("error of logits in bfloat16, eager", ours, budget)
    if (run := session.compiled.get("decode")) is not None:
        cache = session.primed(1)
        cache.reset()
        with contender("ours"):
            logits = [session.step(ids[:, :prompt], cache, positions[:, :prompt])]
            for i, at in enumerate(range(prompt, prompt + tokens - 1)):
                token, position = wanted[:, i : i + 1].clone(), positions[:, at : at + 1].clone()
                logits += [run(token, cache, position).clone()]  # the next replay writes over it
        compiled = torch.cat(logits, 1).float()
        verdict("error of logits in bfloat16, compiled", compiled, budget)
        found = compiled.argmax(-1)
    # A token may differ where the two best of float32 are nearer to each other than the errors allowed.
    best = truth.topk(2).values
    allowed = 2 * budget * truth.norm() / truth.numel() ** 0.5 * 6
    unclear = (best[..., 0] - best[..., 1]) < allowed
    session.record("check", "tokens in bfloat16 that differ", float((found != wanted).sum()), "tokens", tokens=tokens,
                   note=f"{int(unclear.sum())} of {tokens} are too close to call")  # fmt: skip
    session.record("check", "clear tokens in bfloat16 that differ", float(((found != wanted) & ~unclear).sum()),
                   "tokens", tokens=tokens, bar="<=0")  # fmt: skip
    if (once := session.prefills.get("ours")) is not None:
        length = min(session.options.lengths)
        given = session.ids(1, length)
        with contender("untouched"):
            truth = step_of(exact)(*session._with(session.fresh(length + ROOM), *given)).float()
            own = session.step(*session._with(session.fresh(length + ROOM), *given)).float()
        verdict(f"error of logits after a compiled prefill of {length}", once(length).float(), 2 * _off(own, truth))
    del exact
    return []


def _off(given: Tensor, wanted: Tensor) -> float:
    return float((given.float() - wanted).norm() / wanted.norm())


def peers(session: Session) -> list[Measure]:
    """The untouched model and mamba_ssm's kernels; who cannot run is told."""
    measures: list[Measure] = []
    timed = session.options.timed
    found = packaged(session.model)
    session.record("peers", "functions that are a package's", len(found), "functions", contender="untouched",
                   note=", ".join(found) or "all is transformers' reference")  # fmt: skip
    for name in session.options.peers:
        if name == "mamba_ssm":
            with _left_out(session, "mamba_ssm"):
                importlib.import_module("mamba_ssm.ops.triton.selective_state_update")
                importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
                for op, function in MAMBA_SSM.items():
                    tmo.register_backend(op, "mamba_ssm", version="1")(function)
            if "mamba_ssm" not in tmo.backends("selective_state_update"):
                continue
        for batch in (b for b in session.options.batches if b in (1, 64)):
            with _left_out(session, f"{name}, compiled, decode, batch {batch}"):
                measures.append(_decode_step(session, name, batch))
            if name == "untouched":
                with _left_out(session, f"{name}, eager, decode, batch {batch}"):
                    measures.append(_eager_step(session, batch))
        if "prefill" not in session.options.parts:
            continue
        if name == "mamba_ssm" and session.description.config == "FalconMambaConfig":
            session.say("left out: mamba_ssm, prefill: its selective scan is no Triton kernel")
            continue
        for kind, run in (
            ("eager", step_of(session.model)),
            (
                "compiled",
                torch.compile(step_of(session.model), backend=session.graphs(), fullgraph=True, dynamic=False),
            ),
        ):
            if kind == "eager" and name != "untouched":
                continue

            def once(length: int, run: Step = run) -> Tensor:
                return run(*session._with(session.fresh(length + ROOM), *session.ids(1, length)))

            full = f"untouched, {kind}" if name == "untouched" else name
            if kind == "eager":  # its memory is taken only while no other model needs some
                session.prefills[full] = once
                continue
            with _left_out(session, f"{full}, prefill of {timed}"), contender(name):
                session.hurry()
                once(timed)
                session.wait()
                session.prefills[full] = once
            _release(session)
    return measures


def _eager_step(session: Session, batch: int) -> Measure:
    cache, token = session.primed(batch), session.token(batch)

    def once() -> None:
        session.step(*session._with(cache, *token))

    with contender("untouched"):
        once()

    def measure() -> None:
        rewind(cache)
        with contender("untouched"):
            took = seconds(session, once, 8, 3)
        session.record("decode", "time", took * 1e3, "ms", contender="untouched, eager", batch=batch)

    return measure


def first(session: Session) -> list[Measure]:
    """Measured by a process of its own."""

    def measure() -> None:
        command = [sys.executable, str(HERE / "models.py"), "--child", "--only-first", *session.options.passed]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        for line in done.stdout.splitlines():
            print(line, flush=True)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])

    return [measure]


def first_token(session: Session) -> None:
    """Prefill and decode after `warmup`, eager: each first call against later ones."""
    length = 64 if session.options.tiny else 512

    def prefill() -> Any:
        cache = session.fresh(length + ROOM)
        session.step(*session._with(cache, *session.ids(1, length)))
        return cache

    def step(cache: Any) -> None:
        session.step(*session._with(cache, *session.token(1, length)))

    def clock(call: Callable[[], Any]) -> tuple[float, Any]:
        session.wait()
        began = time.perf_counter()
        result = call()
        session.wait()
        return time.perf_counter() - began, result

    with contender("untouched"):
        for _ in range(2):
            step(prefill())
    with contender("ours"):
        took, report = clock(lambda: tmo.warmup(session.model, batch_sizes=(1,), max_tokens=length, progress=False))
        session.record("first", "warmup", took, "s", note=report.summary)
        first_prefill, cache = clock(prefill)
        first_step, _ = clock(lambda: step(cache))
        again = [(clock(prefill)[0], clock(lambda: step(cache))[0]) for _ in range(15)]
    for what, one, later, tokens in (
        ("prefill", first_prefill, [a for a, _ in again], length),
        ("decode", first_step, [b for _, b in again], 1),
    ):
        steady = statistics.median(later)
        note = f"{one * 1e3:.2f} ms, later {steady * 1e3:.2f} ms (slowest {max(later) * 1e3:.2f})"
        session.record(
            "first", f"first {what} over a later one", one / steady, "x", tokens=tokens, bar="<=1.2", note=note
        )


# --- packages ---


class Prefill(torch.nn.Module):
    """Tokens to the last token's logits and the states after it."""

    def __init__(self, model: torch.nn.Module, config: Any) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """[batch, length] -> logits, states"""
        cache = fresh(self.config, ROOM)
        positions = torch.arange(ids.shape[1], device=ids.device)[None].expand(ids.shape[0], -1)
        return step_of(self.model)(ids, cache, positions), integration.states_of(cache)


class Decode(torch.nn.Module):
    """A token and states to logits; the states are updated in place."""

    def __init__(self, model: torch.nn.Module, config: Any) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, ids: Tensor, positions: Tensor, states: dict[str, Tensor]) -> Tensor:
        """[batch, 1] -> logits"""
        return step_of(self.model)(ids, integration.cache_of(self.config, ROOM, states), positions)


PACKAGES = ("prefill.pt2", "decode.pt2")
_ALONE = """
import json, sys, time, torch
import torch._inductor.package  # seconds once a process, and no part of loading
prefill, decode, prompts, told = sys.argv[1:]
began = time.perf_counter()
prefill, decode = (torch._inductor.aoti_load_package(path) for path in (prefill, decode))
took = time.perf_counter() - began
tokens = []
for ids in torch.load(prompts):
    logits, states = prefill(ids)
    row = [logits[:, -1].argmax(-1, keepdim=True)]
    for i in range(7):
        position = torch.full_like(row[-1], ids.shape[1] + i)
        row.append(decode(row[-1], position, states)[:, -1].argmax(-1, keepdim=True))
    tokens.append(torch.cat(row, 1).cpu())
assert "torch_mamba_ops" not in sys.modules and "transformers" not in sys.modules
torch.save((took, tokens), told)
"""


def _by_python(folder: Path, prompts: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
    """Seconds of loading both packages, and tokens [1, 8] after each prompt."""
    torch.save(prompts, folder / "prompts.pt")
    _run([sys.executable, "-c", _ALONE, *PACKAGES, "prompts.pt", "told.pt"], folder, PYTHONPATH="")
    load, tokens = torch.load(folder / "told.pt")
    return load, tokens


def _by_cpp(folder: Path, prompts: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
    """The same. Builds the example as its CMakeLists.txt does, with the compiler alone."""
    home, source = Path(torch.__path__[0]), HERE.parent / "examples" / "aoti_cpp" / "main.cpp"
    compiler = [*shlex.split(os.environ.get("CXX", "g++")), "-std=c++20", "-O1", "-isystem", f"{home}/include"]
    libraries = [f"-L{home}/lib", f"-Wl,-rpath,{home}/lib", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
    _run([*compiler, str(source), "-o", "generate", *libraries, "-ltorch_cpu", "-lc10", "-l:libstdc++.so.6"], folder)
    lines = "".join(" ".join(map(str, ids[0].tolist())) + "\n" for ids in prompts)
    done = _run(["./generate", *PACKAGES, "8"], folder, lines)
    tokens = [torch.tensor([[int(word) for word in line.split()]]) for line in done.stdout.splitlines()]
    return float(done.stderr.split("loaded in ")[1].split()[0]), tokens


def _run(command: list[str], folder: Path, given: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, input=given, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        why = [line.strip() for line in lines if re.search(r"rror: |what\(\): |/ld: ", line)] or lines[-1:]
        raise RuntimeError(why[0] if why else f"{command[0]}: exit status {done.returncode}")
    return done


def packages(session: Session) -> list[Measure]:
    """Prefill of any length and decode, each a package, run by processes without this package and transformers."""
    description, options = session.description, session.options
    kinds = 3 if description.pattern(3).keys() - {"num_hidden_layers"} else 2
    small = {} if options.tiny else {"vocab_size": 2048, **description.small_mlp}
    config = description.make(kinds, options.tiny, **small)
    # On a GPU, exporting scaled_dot_product_attention ties the length to a multiple of 8 (torch 2.11).
    # In float32, as two tokens of random weights are often too close to call in bfloat16.
    model = build(config, F32, session.device, attn_implementation="eager")
    _experts_in_float32(model)
    prompts = [torch.randint(3, config.vocab_size, (1, length), device=session.device) for length in (40, 77)]
    step = step_of(model)
    with tempfile.TemporaryDirectory(prefix="torch_mamba_ops_models_") as temporary:
        folder = Path(temporary)
        paths = [folder / package for package in PACKAGES]
        with contender("ours"):
            wanted = torch.cat([_greedy(step, ids, fresh(config, ROOM)) for ids in prompts]).cpu()
            length = torch.export.Dim("length", min=5, max=ROOM)
            began = time.perf_counter()
            portable = session.device.type == "cuda"
            prefill = Prefill(model, config)
            export.package(prefill, paths[0], (prompts[0],), dynamic_shapes=({1: length},), portable_compiler=portable)
            _, states = prefill(prompts[0])
            token = (prompts[0][:, :1].contiguous(), torch.full((1, 1), 40, device=session.device))
            export.package(Decode(model, config), paths[1], (*token, states), portable_compiler=portable)
            took = time.perf_counter() - began
        weights = sum(p.nbytes for p in model.parameters()) / 1e6
        note = f"{kinds} layers, vocabulary {config.vocab_size}, weights {weights:.0f} MB in each"
        session.record("export", "size of both", sum(path.stat().st_size for path in paths) / 1e6, "MB", note=note)
        session.record("export", "exporting and compiling both", took, "s", note=note)
        for name, generate, loading in (
            ("packages", _by_python, "loading both"),
            ("C++ program", _by_cpp, "loading both in the C++ program"),
        ):
            with _left_out(session, f"export: {name}"):
                load, tokens = generate(folder, prompts)
                same = int((torch.cat(tokens) == wanted).sum())
                what = f"tokens of the {name} like eager's"
                session.record("export", what, same, "tokens", tokens=16, bar=">=16", note=note)
                session.record("export", loading, load, "s", note=note)
    return []


def _greedy(step: Step, ids: Tensor, cache: Any, tokens: int = 8) -> Tensor:
    length = ids.shape[1]
    positions = torch.arange(length + tokens, device=ids.device)[None]
    made = [step(ids, cache, positions[:, :length])[:, -1].argmax(-1, keepdim=True)]
    for i in range(tokens - 1):
        made.append(step(made[-1], cache, positions[:, length + i : length + i + 1])[:, -1].argmax(-1, keepdim=True))
    return torch.cat(made, 1)


# --- training ---


def train(session: Session) -> list[Measure]:
    """A small model in float32: loss and gradients, compiled with our operations, against the untouched model's."""
    config = session.description.make(0 if session.layers < 4 else 4, True)
    model = build(config, F32, session.device).train().requires_grad_(True)
    _experts_in_float32(model)
    ids = torch.randint(3, config.vocab_size, (2, 96), device=session.device)

    def loss_of(ids: Tensor) -> Tensor:
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def step(run: Callable[[Tensor], Tensor], name: str) -> tuple[float, dict[str, Tensor]]:
        model.zero_grad()
        with torch.enable_grad(), contender(name):
            loss = run(ids)
            loss.backward()
        return float(loss), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    loss, gradients = step(loss_of, "untouched")
    graphs = session.graphs()
    ours, found = step(torch.compile(loss_of, backend=graphs, fullgraph=True), "ours")
    worst = max(gradients, key=lambda name: _off(found[name], gradients[name]))
    session.record("train", "graphs", graphs.count, "graphs", bar="<=1")
    session.record("train", "error of the loss", abs(ours - loss) / loss, "of it", bar="<=1e-5")
    session.record("train", "largest error of a gradient", _off(found[worst], gradients[worst]), "of the norm",
                   bar="<=1e-3", note=worst)  # fmt: skip
    for op, names in graphs.backends.items():
        session.record("train", f"backend of {op}", len(names), "backends", note=", ".join(sorted(names)))
    return []


# --- the rest ---


PREPARE: dict[str, Callable[[Session], list[Measure]]] = {
    "compile": compile_times,
    "prefill": prefill,
    "decode": decode_steps,
    "tuned": tuned,
    "overlap": overlap,
    "check": check,
    "peers": peers,
    "first": first,
    "export": packages,
    "train": train,
}
assert tuple(PREPARE) == PARTS


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}"


@contextmanager
def _left_out(session: Session, what: str) -> Iterator[None]:
    """Tells why something could not be measured, and goes on."""
    try:
        yield
    except Exception as error:
        session.say(f"left out: {what}: {_first_line(error)}")
        session.record("left out", what, math.nan, "", note=_first_line(error))
        if session.options.traceback:
            traceback.print_exception(error, limit=-8)
        _release(session)


def _release(session: Session) -> None:
    gc.collect()
    if session.device.type == "cuda":
        session.wait()
        torch.cuda.empty_cache()


def _interrupt(*_: object) -> None:
    raise TimeoutError("it takes longer than preparing may take (--limit)")


def child(options: Options) -> None:
    """One model: prepares, says so, and measures when told to."""
    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.config.recompile_limit = 64  # every part and contender compiles the same function
    integration.enable()
    session = Session(MODELS[options.models[0]], options)
    if options.only_first:
        first_token(session)
        return
    measures: list[Measure] = []
    signal.signal(signal.SIGALRM, _interrupt)
    if options.prepare < math.inf:  # before the parent ends this process
        signal.setitimer(signal.ITIMER_REAL, 1.15 * options.prepare)
    for part in options.parts:
        began = time.perf_counter()
        with _left_out(session, part):
            session.hurry()
            measures += PREPARE[part](session)
        _release(session)
        session.say(f"{part}: prepared in {time.perf_counter() - began:.0f} s")
    signal.setitimer(signal.ITIMER_REAL, 0)
    print("READY", flush=True)
    sys.stdin.readline()
    if session.device.type == "cuda":
        rate = decode.copy_rate(decode.Run(True, False, False))
        _release(session)
        session.record("copy", "bandwidth of a copy", rate * 1e-12, "TB/s", contender="copy")
    for measure in measures:
        with _left_out(session, f"measuring in {getattr(measure, '__qualname__', '').partition('.')[0]}"):
            measure()


FIELDS = (
    "model", "layers", "part", "what", "contender", "batch", "tokens", "value", "unit", "bar", "met", "note", "gpu",
    "torch", "triton", "transformers", "commit", "date",
)  # fmt: skip


class Table:
    """The CSV, written after every row."""

    def __init__(self, path: Path, machine: dict[str, str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", newline="")
        self._writer = csv.DictWriter(self._file, FIELDS)
        self._writer.writeheader()
        self._machine = machine
        self._lock = threading.Lock()
        self.rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        """Writes it."""
        date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        full = row | self._machine | {"date": date}
        with self._lock:  # models that prepare side by side are followed by threads
            self.rows.append(full)
            self._writer.writerow(full)
            self._file.flush()

    def compare(self) -> None:
        """Bandwidths in percent of the run's fastest copy: a device that was idle is slower for a while."""
        copies = [float(row["value"]) for row in self.rows if row["part"] == "copy"]
        for row in self.rows:
            if row["what"] == "bandwidth" and copies:
                percent = 100 * float(row["value"]) / max(copies)
                bar = BANDWIDTH_BARS.get(row["batch"], "") if row["contender"].startswith("ours") else ""
                row |= {"value": f"{percent:.6g}", "unit": "% of copy", "bar": bar, "met": _met(percent, bar)}
                row["note"] = f"of {max(copies):.4g} TB/s, the fastest copy of the run"
        self._file.seek(0)
        self._file.truncate()
        self._writer.writeheader()
        self._writer.writerows(self.rows)
        self._file.flush()


def _text(row: dict[str, Any]) -> str:
    met = {"": "", "True": "met", "False": "MISSED"}[row["met"]]
    return (
        f"{row['model']:<20}{row['part']:<9}{row['what']:<44}{row['contender']:<20}b={row['batch']:<4}"
        f"L={row['tokens']:<6}{row['value']:>10} {row['unit']:<12}{row['bar']:<8}{met:<7}{row['note']}"
    )


class Child:
    """The process of one model."""

    def __init__(self, name: str, options: Options, table: Table, prepare: float) -> None:
        self.name, self.table = name, table
        environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": str(options.threads)}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "models.py"), "--child", "--prepare", str(prepare), *_passed(options, name)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )  # fmt: skip

    def follow(self, until: float, ready: bool) -> bool:
        """Takes its rows and prints the rest, until it is ready or ends. Stops it at the time limit."""
        timer = threading.Timer(max(0.0, until - time.monotonic()), self.process.kill)
        timer.start()
        try:
            assert self.process.stdout is not None
            for line in self.process.stdout:
                if line.startswith("ROW "):
                    row = json.loads(line[4:])
                    self.table.add(row)
                    print(_text(row), flush=True)
                elif line.startswith("READY"):
                    return True
                else:
                    print(line, end="", flush=True)
            code = self.process.wait()
            if ready or code:
                print(f"[{self.name}] ended with {code}{' (time limit)' if code == -9 else ''}", flush=True)
            return False
        finally:
            timer.cancel()

    def measure(self, until: float) -> None:
        """Lets it measure."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.follow(until, False)


def _passed(options: Options, name: str) -> list[str]:
    flags = [flag for flag in ("tiny", "quick", "traceback") if getattr(options, flag)]
    return [
        *("--models", name, "--parts", *options.parts, "--layers", str(options.layers), "--device", options.device),
        *("--compile-bar", str(options.compile_bar), "--kernels", str(options.kernels)),
        *(f"--{flag}" for flag in flags),
        *("--batches", *map(str, options.batches)),
        *("--peers", *options.peers),
    ]


def _parsed() -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS), metavar="MODEL")
    parser.add_argument("--parts", nargs="*", default=[p for p in PARTS if p != "compile"], choices=PARTS)
    parser.add_argument("--layers", type=int, default=6, help="of each model, pattern kept; 0: all")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "models.csv")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", nargs="*", type=int, default=list(BATCHES), help="of decode")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS, help="who is measured in part peers")
    parser.add_argument("--tiny", action="store_true", help="tiny models, short prompts: to try the script itself")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, four lengths")
    parser.add_argument("--jobs", type=int, default=4, help="models that prepare at the same time")
    parser.add_argument("--limit", type=float, default=600, help="seconds for everything; preparing gets 60%%")
    parser.add_argument("--compile-bar", type=float, default=0, help="seconds that part compile may take")
    parser.add_argument("--kernels", type=int, default=10, help="lines of each profile")
    parser.add_argument("--traceback", action="store_true", help="of what fails")
    parser.add_argument("--prepare", type=float, default=math.inf, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only-first", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        options.batches = [b for b in options.batches if b <= 4] or [1, 4]
    options.lengths = (40, 64, 77, 130) if options.tiny else LENGTHS[::3] if options.quick else LENGTHS
    options.timed = 130 if options.tiny else 8192
    options.rounds = 1 if options.tiny else 3 if options.quick else 7
    options.threads = max(1, (os.cpu_count() or 1) // options.jobs)
    options.passed = _passed(options, options.models[0]) if options.models else []
    return options


def main() -> int:
    """Measures, writes and prints; 1 if a bar is missed."""
    options = _parsed()
    if options.child:
        child(options)
        return 0
    began = time.monotonic()
    transformers = importlib.import_module("transformers").__version__
    device = torch.device(options.device)
    machine = decode._machine(device) | {"transformers": transformers, "commit": decode._commit()}
    table = Table(options.out, machine)
    for start in range(0, len(options.models), options.jobs):
        # Each group has its share of what time is left.
        groups = math.ceil((len(options.models) - start) / options.jobs)
        now = time.monotonic()
        share = (began + options.limit - now) / groups
        names = options.models[start : start + options.jobs]
        together = [Child(name, options, table, 0.6 * share) for name in names]
        until = now + 0.8 * share  # for a part begun in the last moment
        with ThreadPoolExecutor(len(together)) as pool:
            ready = list(pool.map(lambda one, until=until: one.follow(until, True), together))
        for one in (one for one, is_ready in zip(together, ready, strict=True) if is_ready):
            one.measure(now + share)
    table.compare()
    print("\nin percent of a copy, left out or missed:")
    for row in table.rows:
        if row["met"] == "False" or row["part"] == "left out" or row["what"] == "bandwidth":
            print(_text(row))
    missed = sum(row["met"] == "False" for row in table.rows)
    print(f"{len(table.rows)} rows, {missed} bars missed, {time.monotonic() - began:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
