"""The main job on a small model: a Hugging Face hybrid compiled in one graph, generating, exported, running alone."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from torch_mamba_ops import export
from torch_mamba_ops.dispatch import OPS, explain
from torch_mamba_ops.integrations import transformers as integration
from torch_mamba_ops.testing import build, cases

_ALONE = """
import sys, torch
package, prompt, told = sys.argv[1:]
run = torch._inductor.aoti_load_package(package)
logits = run(torch.load(prompt))
assert "torch_mamba_ops" not in sys.modules and "transformers" not in sys.modules
torch.save(logits, told)
"""


def main(argv: list[str]) -> int:
    """Runs the demo; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m torch_mamba_ops demo", description=__doc__)
    parser.add_argument("--layers", type=int, default=4, help="layers, every fourth of them attention")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=48, help="tokens in the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    with torch.no_grad():
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    transformers: Any = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    device = torch.device(options.device)
    model = _model(transformers, options).to(device)
    prompt = torch.randint(3, model.config.vocab_size, (options.batch, options.prompt), device=device)
    length = options.prompt + options.tokens
    print(f"Bamba, {options.layers} layers, hidden size {options.hidden}, random weights, {device}")

    kept = integration.static_cache(model, options.batch, length)

    def cache() -> Any:
        kept.reset()
        return kept

    def step(ids: Tensor, past: Any, positions: Tensor) -> Tensor:
        logits: Tensor = model(ids, past_key_values=past, use_cache=True, position_ids=positions).logits
        return logits

    print("the model's own operations, eager:")
    want, _ = _generate(step, prompt, cache(), options.tokens)
    integration.enable()
    print("these operations, eager:")
    eager, eager_speed = _generate(step, prompt, cache(), options.tokens)

    chosen: dict[str, set[str]] = {}
    graphs = _Graphs(chosen)
    compiled = torch.compile(step, backend=graphs, fullgraph=True)  # fullgraph: a graph break would raise
    print("these operations, compiled:")
    began = time.perf_counter()
    for _ in range(2):  # CUDA graphs are recorded by the second call
        _generate(compiled, prompt, cache(), 3, show=False)  # prefill, decode with a static and a moving position
    compile_time = time.perf_counter() - began
    got, compiled_speed = _generate(compiled, prompt, cache(), options.tokens)

    print("exporting with a dynamic length and packaging ...", flush=True)
    began = time.perf_counter()
    off, alone_speed = _package(model, prompt, options)
    package_time = time.perf_counter() - began

    print()
    for name, value in (
        ("graphs (prefill and decode)", graphs.count),
        ("graph breaks", "0 (fullgraph=True)"),
        ("same tokens, own operations and these", torch.equal(want, eager)),
        ("same tokens, eager and compiled", torch.equal(eager, got)),
        ("largest difference, package to model", f"{off:.1e}"),
        ("tokens a second, eager", f"{eager_speed:.0f}"),
        ("tokens a second, compiled", f"{compiled_speed:.0f} ({compiled_speed / eager_speed:.1f}x)"),
        ("package alone, prompt tokens a second", f"{alone_speed:.0f}"),
        ("seconds to compile, to package", f"{compile_time:.0f}, {package_time:.0f}"),
    ):
        print(f"{name:40}{value}")
    print(f"\n{'operation that ran':40}backend, and why")
    for op, names in chosen.items():
        why = explain(op, **build(cases(op)[0], options.device)).why
        print(f"{op:40}{', '.join(sorted(names))}: {why}")
    return 0 if torch.equal(want, eager) and torch.equal(eager, got) else 1


class _Graphs:
    """Inductor, and a note of every graph and of every operator of this package in it."""

    def __init__(self, chosen: dict[str, set[str]]) -> None:
        self.count = 0
        self._chosen = chosen
        self._by_overload = {op.overload: name for name, op in OPS.items()}

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        self.count += 1
        for node in graph.graph.nodes:
            if node.target in self._by_overload:
                name = node.kwargs["backend"].partition("@")[0]
                self._chosen.setdefault(self._by_overload[node.target], set()).add(name)
        on_gpu = any(tensor.is_cuda for tensor in inputs if isinstance(tensor, Tensor))
        return cast(Callable[..., Any], compile_fx(graph, inputs, config_patches={"triton.cudagraphs": on_gpu}))


def _model(transformers: Any, options: argparse.Namespace) -> Any:
    head_dim = 32
    config = transformers.BambaConfig(
        vocab_size=512,
        hidden_size=options.hidden,
        intermediate_size=2 * options.hidden,
        num_hidden_layers=options.layers,
        attn_layer_indices=list(range(1, options.layers, 4)),
        num_attention_heads=4,
        num_key_value_heads=2,
        mamba_expand=2,
        mamba_d_head=head_dim,
        mamba_n_heads=2 * options.hidden // head_dim,
        mamba_d_state=32,
        mamba_n_groups=1,
        mamba_chunk_size=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    # On a GPU, exporting scaled_dot_product_attention ties the length to a multiple of 8 (torch 2.11).
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def _generate(
    step: Callable[..., Tensor], prompt: Tensor, past: Any, tokens: int, show: bool = True
) -> tuple[Tensor, float]:
    """Greedy tokens, and how many a second after the prompt."""
    batch, length = prompt.shape
    positions = torch.arange(length + tokens, device=prompt.device).expand(batch, -1)
    token = step(prompt, past, positions[:, :length])[:, -1:].argmax(-1)
    made = [token]
    began = _now(prompt.device)
    for i in range(tokens - 1):
        token = step(token, past, positions[:, length + i : length + i + 1])[:, -1:].argmax(-1)
        made.append(token)
        if show:
            done = (i + 2) * 30 // tokens
            print(f"\r  [{'#' * done:30}] {i + 2}/{tokens} tokens", end="", flush=True)
    speed = batch * (tokens - 1) / (_now(prompt.device) - began)
    if show:
        print(f"  {speed:.0f} a second")
    return torch.cat(made, 1), speed


def _now(device: torch.device) -> float:
    """The time when what the device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids, use_cache=False).logits
        return logits


def _package(model: torch.nn.Module, prompt: Tensor, options: argparse.Namespace) -> tuple[float, float]:
    """Largest difference of the package's logits in a process of its own, and prompt tokens a second here."""
    module = _Logits(model)
    length = torch.export.Dim("length", min=5, max=4096)
    with tempfile.TemporaryDirectory(prefix="torch_mamba_ops_demo_") as folder:
        paths = [Path(folder) / name for name in ("model.pt2", "prompt.pt", "logits.pt")]
        export.package(module, paths[0], (prompt,), dynamic_shapes=({1: length},), portable_compiler=prompt.is_cuda)
        longer = torch.cat([prompt, prompt[:, :7]], 1)
        torch.save(longer, paths[1])
        subprocess.run([sys.executable, "-c", _ALONE, *map(str, paths)], check=True, cwd=folder)
        off = float((torch.load(paths[2]) - module(longer)).abs().max())
        run = torch._inductor.aoti_load_package(str(paths[0]))
        run(prompt)
        began = _now(prompt.device)
        for _ in range(5):
            run(prompt)
        return off, 5 * prompt.numel() / (_now(prompt.device) - began)


__all__ = ["main"]
