"""A small hybrid model as two packages for main.cpp, and the tokens that the C++ program must print too:
``export_model.py FOLDER TOKENS [--device cuda] [--portable] < PROMPTS``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import transformers
from torch import Tensor

from torch_mamba_ops import export
from torch_mamba_ops.integrations.transformers import cache_of, enable, states_of

ROOM = 128  # tokens in the cache: prompt and what comes after


class Prefill(torch.nn.Module):
    """Tokens [1, length] to logits of the last [1, 1, vocabulary], and the states after them."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        cache = transformers.StaticCache(config=self.model.config, max_cache_len=ROOM)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        output = self.model(ids, past_key_values=cache, position_ids=positions, use_cache=True, logits_to_keep=1)
        return output.logits, states_of(cache)


class Decode(torch.nn.Module):
    """A token [1, 1], its position [1, 1] and the states to logits; the states are updated in place."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, positions: Tensor, states: dict[str, Tensor]) -> Tensor:
        cache = cache_of(self.model.config, ROOM, states)
        return self.model(ids, past_key_values=cache, position_ids=positions, use_cache=True).logits


def small_model() -> torch.nn.Module:
    """A Bamba (Mamba2 and attention) with random weights; yours goes here."""
    config = transformers.BambaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, attn_layer_indices=[1],
        num_attention_heads=4, num_key_value_heads=2, mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16,
        mamba_n_groups=2, mamba_chunk_size=32, eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    # On a GPU, exporting scaled_dot_product_attention ties the length to a multiple of 8 (torch 2.11).
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def main() -> None:
    """Writes FOLDER/prefill.pt2 and FOLDER/decode.pt2, and prints the untouched model's tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokens", type=int, help="that come after each prompt")
    parser.add_argument("--device", default="cpu", help="that the packages run on")
    parser.add_argument("--portable", action="store_true", help="portable_compiler of export.package")
    options = parser.parse_args()

    model = small_model().to(options.device)
    prompts = [torch.tensor([[int(word) for word in line.split()]], device=options.device) for line in sys.stdin]
    for ids in prompts:
        made = model.generate(ids, max_new_tokens=options.tokens, do_sample=False)[0, ids.shape[1] :]
        print(*made.tolist())

    enable()
    prefill, decode, ids = Prefill(model), Decode(model), prompts[0]
    with torch.no_grad():
        _, states = prefill(ids)
    lengths = ({1: torch.export.Dim("length", min=5, max=ROOM)},)
    step = (ids.new_ones(1, 1), ids.new_full((1, 1), ids.shape[1]), states)
    portable = options.portable
    export.package(prefill, options.folder / "prefill.pt2", (ids,), dynamic_shapes=lengths, portable_compiler=portable)
    export.package(decode, options.folder / "decode.pt2", step, portable_compiler=portable)


if __name__ == "__main__":
    main()
