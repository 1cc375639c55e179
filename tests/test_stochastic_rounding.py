"""Stochastic rounding of states: reproducible, unbiased, to a neighbour, with the words of Triton's generator."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import torch_mamba_ops as tmo
from torch_mamba_ops.ops.rounding import philox
from torch_mamba_ops.testing import build, cases, copied

DTYPES = [torch.float16, torch.bfloat16]
both = pytest.mark.parametrize("dtype", DTYPES)


def _store(values: Tensor, dtype: torch.dtype, seed: int, copies: int = 1) -> Tensor:
    """What a state [1, copies, n] holds that is ``values`` [n] before it is rounded: 0 * decay + 1 * 1 * B."""
    state = torch.zeros(1, 1, copies, len(values), dtype=dtype)
    x, B = torch.ones(1, 1, copies), values.view(1, 1, -1)
    options: dict[str, Any] = {"rand_seed": torch.tensor(seed), "backend": "reference"}
    tmo.selective_state_update(state, x, torch.ones(1, 1), -torch.ones(1), B, B, **options)
    return state[:, 0]


def _neighbours(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The nearest number of dtype not above and the one not below, found in the list of all of them."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    numbers = numbers[~numbers.isnan()].unique()  # sorted, infinities included
    return numbers[torch.searchsorted(numbers, values, right=True) - 1], numbers[torch.searchsorted(numbers, values)]


def _values(dtype: torch.dtype) -> Tensor:
    """Of both signs and all magnitudes, with float16's subnormals, exact ones and some just below a power of two."""
    random = torch.Generator().manual_seed(0)
    scale = torch.logspace(-8 if dtype is torch.float16 else -35, math.log10(torch.finfo(dtype).max) - 0.1, 60)
    drawn = torch.randn(60, generator=random).clamp(-1, 1) * scale
    return torch.cat([drawn, -drawn, torch.tensor([0.0, 1.0, -0.5, 1 / 3, 1 - 2.0**-20, -2 + 2.0**-20])])


def _decode(case: str, dtype: torch.dtype, stored: torch.dtype | None = None, **options: Any) -> Tensor:
    """The state after one of the operation's cases that starts from what ``dtype`` can hold, stored in it or not."""
    found = next(c for c in cases("selective_state_update") if c.name == case)
    arguments = copied(build(found)) | {"backend": "reference"}
    arguments["state"] = arguments["state"].to(dtype).to(stored or dtype)
    tmo.selective_state_update(**arguments | options)
    state: Tensor = arguments["state"]
    return state


# --- the seed ---


@both
@pytest.mark.parametrize("case", ["mamba2", "mamba1_slots", "several_tokens", "packed", "slots_by_token"])
def test_the_seed_decides_the_bits(case: str, dtype: torch.dtype) -> None:
    first, again, other, high_word = (
        _decode(case, dtype, rand_seed=torch.tensor([seed])) for seed in (5, 5, 6, 5 + 2**32)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other) and not torch.equal(first, high_word)
    assert not torch.equal(first, _decode(case, dtype)), "and without one the state is rounded to nearest"


@both
def test_fewer_rounds_are_other_bits(dtype: torch.dtype) -> None:
    seed = torch.tensor(5)
    default, ten, seven = (
        _decode("mamba2", dtype, rand_seed=seed, **rounds)
        for rounds in ({}, {"philox_rounds": 10}, {"philox_rounds": 7})
    )
    assert torch.equal(default, ten) and not torch.equal(ten, seven)


@both
def test_the_place_in_the_pool_decides_and_not_the_order_of_the_batch(dtype: torch.dtype) -> None:
    values = torch.rand(64, generator=torch.Generator().manual_seed(0))

    def pool(slots: list[int]) -> Tensor:
        state, n = torch.zeros(5, 1, 1, 64, dtype=dtype), len(slots)
        B = values.expand(n, 1, 64)
        options: dict[str, Any] = {"state_batch_indices": torch.tensor(slots), "rand_seed": torch.tensor(3)}
        tmo.selective_state_update(state, torch.ones(n, 1, 1), torch.ones(n, 1), -torch.ones(1), B, B, **options)
        return state.flatten(1)

    together = pool([4, 0, 2])
    assert torch.equal(together, pool([0, 2, 4])) and torch.equal(together[4], pool([4])[4])
    assert not torch.equal(together[0], together[2]) and not torch.equal(together[2], together[4])


# --- where it rounds to ---


@both
@pytest.mark.parametrize("case", ["mamba2", "mamba1_slots", "several_tokens", "packed", "slots_by_token"])
def test_a_decode_step_stores_one_of_the_two_neighbours(case: str, dtype: torch.dtype) -> None:
    exact = _decode(case, dtype, stored=torch.float32)
    below, above = _neighbours(exact, dtype)
    stored = _decode(case, dtype, rand_seed=torch.tensor(5)).float()
    assert ((stored == below) | (stored == above)).all()
    inexact = below != above
    assert (stored == below)[inexact].any() and (stored == above)[inexact].any()


@both
def test_every_draw_is_one_of_the_two_neighbours_and_what_is_exact_stays(dtype: torch.dtype) -> None:
    values = _values(dtype)
    below, above = _neighbours(values, dtype)
    for seed in range(20):
        stored = _store(values, dtype, seed, copies=50).float()
        assert ((stored == below) | (stored == above)).all()
    assert (below == above).any() and (below != above).any()


@both
def test_the_mean_over_seeds_is_the_float32_state(dtype: torch.dtype) -> None:
    values, seeds = _values(dtype), 1000
    below, above = (end.double() for end in _neighbours(values, dtype))
    inexact = below != above
    below, gap, values = below[inexact], (above - below)[inexact], values[inexact]
    ups = torch.zeros_like(below)
    for seed in range(seeds):
        ups += (_store(values, dtype, seed)[0, 0].double() - below) / gap  # 0 or 1
    chance = (values.double() - below) / gap
    error = ups / seeds - chance
    # Each: Hoeffding's bound on the mean of `seeds` draws in [0, 1], which all values together break once in a million.
    assert error.abs().max() <= math.sqrt(math.log(2 * len(values) * 1e6) / (2 * seeds))
    # All together: four standard errors of a sum of independent Bernoulli draws.
    assert error.sum().abs() <= 4 * float((chance * (1 - chance) / seeds).sum().sqrt())


@both
def test_many_steps_do_not_drift_where_rounding_to_nearest_stands_still(dtype: torch.dtype) -> None:
    steps, copies, growth = 200, 64, torch.finfo(dtype).eps / 16
    args = (torch.ones(1, 1, copies), torch.ones(1, 1), torch.full((1,), -1e-30), torch.full((1, 1, 1), growth))

    def grown(stochastic: bool) -> Tensor:
        state = torch.ones(1, 1, copies, 1, dtype=dtype)
        for seed in range(steps):
            rand_seed = torch.tensor(seed) if stochastic else None
            tmo.selective_state_update(state, *args, torch.ones(1, 1, 1), backend="reference", rand_seed=rand_seed)
        return state.double() - 1

    assert not grown(stochastic=False).any()
    # Each step is up by eps with chance 1/16: a binomial sum, within four standard errors of steps * growth.
    spread = torch.finfo(dtype).eps * math.sqrt(steps * copies * (1 / 16) * (15 / 16)) / copies
    assert abs(float(grown(stochastic=True).mean()) - steps * growth) <= 4 * spread


# --- the ends of the range ---


@both
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_stored_as_it_is(value: float, dtype: torch.dtype) -> None:
    stored = _store(torch.tensor([value]), dtype, 5, copies=256).float()
    assert_close(stored, torch.full_like(stored, value), rtol=0, atol=0, equal_nan=True)


def test_beyond_the_largest_float16_is_infinite_and_between_it_and_the_next_step_is_a_draw() -> None:
    largest, next_step = torch.finfo(torch.float16).max, 2.0**16
    values = torch.tensor([largest, next_step, 1e6, 3e38, (largest + next_step) / 2])
    for sign in (1, -1):
        stored = sign * _store(sign * values, torch.float16, 5, copies=256)[0].float()
        assert (stored[:, 0] == largest).all() and (stored[:, 1:4] == math.inf).all()
        assert set(stored[:, 4].tolist()) == {largest, math.inf}


def test_bfloat16_states_below_the_smallest_normal_number_are_multiples_of_the_smallest() -> None:
    smallest = 2.0**-133
    values = torch.tensor([0.25, 1.5, 7.75], dtype=torch.float64).mul(smallest).float()
    for seed in range(20):
        units = _store(values, torch.bfloat16, seed, copies=50)[0].double() / smallest
        assert ((units == (values.double() / smallest).floor()) | (units == (values.double() / smallest).ceil())).all()


# --- the random words ---

SEEDS = (0, 1, 5, 2**40 + 3, -1, -(2**63), 0x299F31D0A4093822)
OFFSETS = (0, 1, 7, 123456789, 2**31, 2**32 - 1, 2**32, 2**40 + 5)
VECTORS = {  # Random123, tests/kat_vectors: rounds, counter, key -> first word
    (10, (0, 0, 0, 0), (0, 0)): 0x6627E8D5,
    (10, (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2): 0x408F276D,
    (10, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)): 0xD16CFE09,
    (7, (0, 0, 0, 0), (0, 0)): 0x5F6FB709,
    (7, (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2): 0x5207DDC2,
    (7, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)): 0x4DFCCABA,
}


def _published_philox(rounds: int, counter: tuple[int, ...], key: tuple[int, ...]) -> int:
    """Philox-4x32 as the paper has it, in Python's integers."""
    c, k, word = list(counter), list(key), 2**32
    for _ in range(rounds):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b // word ^ c[1] ^ k[0], b % word, a // word ^ c[3] ^ k[1], a % word]
        k = [(k[0] + 0x9E3779B9) % word, (k[1] + 0xBB67AE85) % word]
    return c[0]


@pytest.mark.parametrize("rounds", [7, 10])
def test_the_words_are_those_of_the_paper(rounds: int) -> None:
    assert {given: _published_philox(*given) for given in VECTORS} == VECTORS
    for seed in SEEDS:
        got = philox(torch.tensor(seed), torch.tensor(OFFSETS), rounds)[0]
        key = (seed % 2**32, (seed >> 32) % 2**32)
        assert got.tolist() == [_published_philox(rounds, (o % 2**32, o >> 32, 0, 0), key) for o in OFFSETS]


TRITON = """
import json, sys, torch, triton, triton.language as tl

@triton.jit
def draw(seed, offsets, words, n: tl.constexpr, rounds: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(words + at, tl.randint(tl.load(seed), tl.load(offsets + at), rounds))

seeds, offsets, rounds = json.loads(sys.argv[1])
found = []
for seed in seeds:
    words = torch.zeros(len(offsets), dtype=torch.int32)
    draw[(1,)](torch.tensor([seed]), torch.tensor(offsets), words, len(offsets), rounds)
    found.append([word % 2**32 for word in words.tolist()])
print(json.dumps(found))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")
@pytest.mark.parametrize("rounds", [7, 10])
def test_the_words_are_those_of_tritons_randint(rounds: int, tmp_path: Path) -> None:
    script = tmp_path / "draw.py"  # Triton reads a kernel's source from its file
    script.write_text(TRITON)
    given = json.dumps([SEEDS, OFFSETS, rounds])
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run(
        [sys.executable, str(script), given], env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    ours = [philox(torch.tensor(seed), torch.tensor(OFFSETS), rounds)[0].tolist() for seed in SEEDS]
    assert json.loads(ran.stdout) == ours
