"""Draws whole models as bars, decode against the bandwidth of a device copy and prefill against others:

python benchmarks/plot_models.py benchmarks/results/models.csv docs/models_h200.svg
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable

import matplotlib.pyplot as plt

plt.rcParams["svg.hashsalt"] = "torch_mamba_ops"  # the same file from the same numbers
COLORS = {
    "ours": "black",
    "mamba_ssm": "tab:blue",
    "untouched": "tab:orange",
    "untouched, compiled": "tab:orange",
    "untouched, eager": "tab:gray",
}
NAMES = {
    "ours": "torch_mamba_ops",
    "mamba_ssm": "with mamba_ssm's kernels",
    "untouched": "untouched, compiled",
    "untouched, eager": "untouched, eager, with mamba_ssm's kernels where transformers takes them",
}
Row = dict[str, str]


def _bars(axis: plt.Axes, rows: list[Row], value: Callable[[Row], float]) -> None:
    """One group of bars a model, one bar a contender."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    contenders = [name for name in COLORS if any(row["contender"] == name for row in rows)]
    width = 0.8 / max(1, len(contenders))
    for i, contender in enumerate(contenders):
        heights = {row["model"]: value(row) for row in rows if row["contender"] == contender}
        at = [models.index(model) + (i - (len(contenders) - 1) / 2) * width for model in heights]
        axis.bar(at, heights.values(), width, color=COLORS[contender], label=NAMES.get(contender, contender))
    axis.set_xticks(range(len(models)), models, rotation=35, ha="right")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)


def main(source: str, target: str) -> None:
    """Reads the rows and writes the picture."""
    with open(source, newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for axis, batch, bar in ((axes[0], "1", 80), (axes[1], "64", 70)):
        _bars(
            axis,
            [row for row in rows if row["part"] == "decode" and row["what"] == "bandwidth" and row["batch"] == batch],
            lambda row: float(row["value"]),
        )
        axis.axhline(bar, color="tab:red", linewidth=1, linestyle=":")
        axis.set(title=f"decode, batch {batch}", ylim=(0, 100), ylabel="weights and states, % of a copy's bandwidth")
    prefill = [row for row in rows if row["part"].startswith("prefill") and row["what"] == "time"]
    ours = {(row["part"], row["model"]): float(row["value"]) for row in prefill if row["contender"] == "ours"}
    _bars(axes[2], prefill, lambda row: ours.get((row["part"], row["model"]), math.nan) / float(row["value"]))
    tokens = prefill[0]["tokens"] if prefill else ""
    axes[2].set(title=f"prefill of {tokens} tokens", ylabel="speed, torch_mamba_ops = 1")
    shown = {label: bar for axis in axes for bar, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown), frameon=False)
    first = rows[0]
    figure.suptitle(
        f"Hugging Face models cut to {first['layers']} layers, bfloat16, {first['gpu']}, torch {first['torch']}, "
        f"transformers {first['transformers']}"
    )
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
