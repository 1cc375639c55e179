"""Draws the state updates of a results file against the bandwidth of a device copy:

python benchmarks/plot_decode.py benchmarks/results/decode_h200.csv docs/decode_h200.svg
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict

import matplotlib.pyplot as plt

plt.rcParams["svg.hashsalt"] = "torch_mamba_ops"  # the same file from the same numbers
NAMES = {"ours": "torch_mamba_ops", "flashinfer": "FlashInfer", "vllm": "vLLM", "mamba_ssm": "mamba_ssm"}


def main(source: str, target: str) -> None:
    """Reads the rows and writes the picture."""
    panels: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    with open(source, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["benchmark"] == "ssu"]
    for row in rows:
        points = panels[row["case"], row["dtype"]][row["contender"]]
        points.append((int(row["batch"]), float(row["percent_of_copy"])))
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.6), sharey=True, layout="constrained")
    for axis, ((case, dtype), contenders) in zip(axes, panels.items(), strict=True):
        for name, points in contenders.items():
            style = {"linewidth": 2.2, "color": "black"} if name == "ours" else {"linewidth": 1.2, "alpha": 0.9}
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=NAMES.get(name, name), **style)
        axis.set(xscale="log", title=f"{case}, {dtype} states", xlabel="sequences")
        axis.set_xticks([batch for batch, _ in points], [str(batch) for batch, _ in points], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="% of a device copy's bandwidth", ylim=(0, 100))
    axes[0].legend(frameon=False)
    first = rows[0]
    figure.suptitle(f"Selective state update, {first['gpu']}, torch {first['torch']}, Triton {first['triton']}")
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
