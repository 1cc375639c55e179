"""Packages the decode step of a small Mamba2 model for main.cpp: ``export_decode.py MODEL.pt2 FIRST_TOKEN STEPS``
prints the tokens that the C++ program must print too.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

import torch_mamba_ops as tmo
from torch_mamba_ops import export

VOCABULARY, LAYERS, HEADS, HEAD_DIM, STATE, WIDTH = 64, 2, 4, 8, 16, 4
INNER = HEADS * HEAD_DIM


class Layer(torch.nn.Module):
    """A Mamba2 layer's decode step."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(INNER, 2 * INNER + 2 * STATE + HEADS)
        self.filter = torch.nn.Parameter(torch.randn(INNER, WIDTH))
        self.A = torch.nn.Parameter(-torch.rand(HEADS) - 0.1)
        self.norm = torch.nn.Parameter(torch.ones(INNER))
        self.outer = torch.nn.Linear(INNER, INNER)

    def forward(self, hidden: Tensor, window: Tensor, state: Tensor) -> Tensor:
        x, z, B, C, dt = self.inner(hidden).split([INNER, INNER, STATE, STATE, HEADS], -1)
        x = tmo.causal_conv1d_update(x, window, self.filter, activation="silu")
        heads = x.unflatten(-1, (HEADS, HEAD_DIM))
        y = tmo.selective_state_update(state, heads, dt, self.A, B.unsqueeze(1), C.unsqueeze(1), dt_softplus=True)
        return hidden + self.outer(tmo.rms_norm_gated(y.flatten(1), self.norm, z=z, norm_before_gate=False))


class Model(torch.nn.Module):
    """Token and states in, logits out; the states are updated in place."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, INNER)
        self.head = torch.nn.Linear(INNER, VOCABULARY)
        self.layers = torch.nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, token: Tensor, *states: Tensor) -> Tensor:
        hidden = self.embedding(token)
        for layer, window, state in zip(self.layers, states[:LAYERS], states[LAYERS:], strict=True):
            hidden = layer(hidden, window, state)
        return self.head(hidden)


def states() -> list[Tensor]:
    """Windows of all layers, then SSM states of all layers."""
    windows = [torch.zeros(1, INNER, WIDTH - 1) for _ in range(LAYERS)]
    return windows + [torch.zeros(1, HEADS, HEAD_DIM, STATE) for _ in range(LAYERS)]


def main(path: Path, first: int, steps: int) -> None:
    """Writes the package and prints the tokens."""
    torch.manual_seed(0)
    model = Model().eval()
    token = torch.tensor([first])
    export.package(model, path, (token, *states()), verify=True, portable_compiler=True)
    own, tokens = states(), []
    with torch.no_grad():
        for _ in range(steps):
            token = model(token, *own).argmax(-1)
            tokens.append(int(token))
    print(*tokens)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
