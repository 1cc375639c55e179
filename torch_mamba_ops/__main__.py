"""``python -m torch_mamba_ops``: what is here and what can run; ``demo``: the main job; ``explain``: one choice;
``prepare`` and ``warmup``: a model's calls."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from torch_mamba_ops.dispatch import OPS, backends, explain, selection
from torch_mamba_ops.startup import command
from torch_mamba_ops.testing import build, cases
from torch_mamba_ops.version import VERSION


def environment() -> dict[str, Any]:
    """Versions, devices and choices in force."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    packages = ("torch", "triton", "transformers", "flashinfer-python", "mamba-ssm", "causal-conv1d")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "torch_mamba_ops": VERSION,
        "python": platform.python_version(),
        **{name: installed(name) for name in packages},
        "devices": devices or ["cpu"],
        "choices": {op: f"{name} ({source})" for op, (name, source) in selection.current().items()},
    }


def table(device: str) -> list[dict[str, Any]]:
    """For each operation, on the first case of its list: every backend and why it is chosen or cannot run."""
    rows = []
    for name in OPS:
        told = explain(name, **build(cases(name)[0], device))
        for candidate in told.candidates:
            chosen = candidate.name == told.chosen
            rows.append(
                {
                    "operation": name,
                    "backend": candidate.name,
                    "trace": backends(name)[candidate.name].trace,
                    "chosen": chosen,
                    "why": told.why if chosen else "; ".join(candidate.reasons) or "not first in the order",
                }
            )
    return rows


def _report(as_json: bool) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine, operations = environment(), table(device)
    if as_json:
        print(json.dumps({"environment": machine, "operations": operations}, indent=2))
        return 0
    for name, value in machine.items():
        print(f"{name:18} {value if value is not None else 'not installed'}")
    print(f"\n{'operation':34}{'backend':14}{'trace':8}why ({device})")
    for row in operations:
        mark = "->" if row["chosen"] else "  "
        print(f"{row['operation']:34}{mark}{row['backend']:12}{row['trace']:8}{row['why']}")
    return 0


def _explain(op: str, case: str | None) -> int:
    found = {c.name: c for tag in ("small", "model") for c in cases(op, tag)}
    chosen = found.get(case) if case is not None else next(iter(found.values()))
    if chosen is None:
        print(f"case: got {case!r}, expected one of {', '.join(found)}", file=sys.stderr)
        return 2
    with torch._subclasses.FakeTensorMode():  # a real model's tensors need no memory
        print(explain(op, **build(chosen, "cuda" if torch.cuda.is_available() else "cpu")))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["demo"]:
        if importlib.util.find_spec("transformers") is None:
            print("the demo needs transformers: pip install 'torch-mamba-ops[transformers]'", file=sys.stderr)
            return 2
        from torch_mamba_ops import demo

        return demo.main(arguments[1:])
    parser = argparse.ArgumentParser(prog="python -m torch_mamba_ops", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("demo", help="compile, generate, export and run a small hybrid model", add_help=False)
    explaining = commands.add_parser("explain", help="which backend runs a call, and why")
    explaining.add_argument("operation", choices=sorted(OPS))
    explaining.add_argument("--case", help="one of the operation's cases (ops/<operation>/cases.py)")
    command.add_commands(commands)
    given = parser.parse_args(arguments)
    if given.command in ("prepare", "warmup"):
        return command.main(given)
    return _explain(given.operation, given.case) if given.command == "explain" else _report(given.json)


if __name__ == "__main__":
    raise SystemExit(main())
