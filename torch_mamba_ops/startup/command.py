"""``python -m torch_mamba_ops prepare`` and ``warmup``, from a model's ``config.json``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from torch_mamba_ops.startup.preparing import prepare
from torch_mamba_ops.startup.warming import BATCH_SIZES, warmup

_SPEC = ("tensor_parallel_size", "speculative_tokens", "conv_dtype", "conv_layout", "ssm_dtype")
_WARMUP = ("batch_sizes", "max_tokens", "tuning", "workers", "cache_dir")


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds both to the command line."""
    preparing = commands.add_parser("prepare", help="which operations a model will call, which backend runs each, why")
    warming = commands.add_parser("warmup", help="compile, and tune if asked to, all that serving a model needs")
    for command in (preparing, warming):
        command.add_argument("--config", required=True, type=Path, help="the model's config.json")
        command.add_argument("--device", help="where it will run: cuda, cuda:1, cpu")
        command.add_argument("--tensor-parallel-size", type=int)
        command.add_argument("--speculative-tokens", type=int, help="drafts a step")
        command.add_argument("--conv-dtype", help="of activations and windows, if not the configuration's")
        command.add_argument("--conv-layout", help="SD or DS")
        command.add_argument("--ssm-dtype", help="of the SSM states")
    warming.add_argument("--batch-sizes", type=_numbers, default=BATCH_SIZES, help="of decode steps: 1,8,64")
    warming.add_argument("--max-tokens", type=int, default=8192, help="of one prefill")
    warming.add_argument("--tuning", help="table or search")
    warming.add_argument("--workers", type=int, help="threads that compile")
    warming.add_argument("--cache-dir", help="where configs found here are kept")


def main(given: argparse.Namespace) -> int:
    """Runs one of them. A model that is not known is no failure: the reason is printed, and the status is 0."""
    from torch_mamba_ops.state import MambaStateSpec

    try:
        config: Any = json.loads(given.config.read_text())
    except (OSError, ValueError) as error:
        print(f"config: {given.config} cannot be read: {error}", file=sys.stderr)
        return 2
    try:
        MambaStateSpec.from_config(config)
    except ValueError as error:
        print(f"skipped: {error}")
        return 0
    options: Any = {name: getattr(given, name) for name in _SPEC if getattr(given, name) is not None}
    try:
        specs = MambaStateSpec.from_config(config, **options)
        if given.command == "prepare" or not specs:
            print(prepare(specs, device=given.device))
        else:
            print(warmup(specs, device=given.device, **{name: getattr(given, name) for name in _WARMUP}))
    except (ValueError, TypeError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))
