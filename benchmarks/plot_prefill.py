"""Draws the prefills of results files against the bandwidth of a device copy, the roof for all of them:

python benchmarks/plot_prefill.py benchmarks/results/prefill_{ssd,conv,scan}_h200.csv docs/prefill_h200.svg
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict

import matplotlib.pyplot as plt

plt.rcParams["svg.hashsalt"] = "torch_mamba_ops"  # the same file from the same numbers
STYLES = {
    "ours": ("torch_mamba_ops", "black"),
    "vllm": ("vLLM", "tab:blue"),
    "vllm_q128": ("vLLM, chunks of 128", "tab:cyan"),
    "mamba_ssm": ("mamba_ssm", "tab:orange"),
    "causal_conv1d": ("causal_conv1d", "tab:green"),
    "reference": ("our reference, compiled", "lightgrey"),
}
TITLES = {"ssd": "SSD scan", "conv": "convolution", "scan": "selective scan"}
BAR = 0.8  # of the room for a contender


def main(*paths: str) -> None:
    """Reads the rows of all paths but the last and writes the picture there."""
    *sources, target = paths
    panels: dict[str, dict[str, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for source in sources:
        with open(source, newline="") as file:
            for row in csv.DictReader(file):
                panels[row["benchmark"]][row["case"]].append(row)
    lines = [sum(len(rows) + 1 for rows in cases.values()) for cases in panels.values()]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 1.4 + 0.2 * max(lines)), squeeze=False, layout="constrained"
    )
    shown = {}
    for axis, (benchmark, cases) in zip(axes[0], panels.items(), strict=True):
        top, middles = 0.0, []
        for rows in cases.values():
            middles.append(top + (len(rows) - 1) / 2)
            for row in rows:
                name, color = STYLES[row["contender"]]
                achieved = float(row["bytes"]) / float(row["microseconds"]) * 1e-6
                shown[name] = axis.barh(top, achieved, BAR, color=color)
                axis.text(achieved, top, f" {float(row['microseconds']):,.0f} us", va="center", fontsize=7)
                top += 1
            top += 1
        roof = max(_copy_rate(row) for rows in cases.values() for row in rows)
        axis.axvline(roof, color="tab:red", linewidth=1)
        axis.text(roof, -1, "copy ", ha="right", va="center", color="tab:red", fontsize=7)
        axis.set(title=TITLES[benchmark], xlabel="TB/s of what must be read and written", xlim=(0, 1.15 * roof))
        axis.set_yticks(middles, list(cases), fontsize=8)
        axis.set_ylim(max(lines) - 1, -1.6)
        axis.grid(axis="x", alpha=0.3)
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown), frameon=False)
    gpu, torch, triton = (row[name] for name in ("gpu", "torch", "triton"))
    figure.suptitle(f"Prefill, {gpu}, torch {torch}, Triton {triton}, bfloat16")
    figure.savefig(target, metadata={"Date": None})


def _copy_rate(row: dict[str, str]) -> float:
    """Of a device copy in the row's run, in TB/s."""
    return float(row["bytes"]) / float(row["microseconds"]) * 1e-6 / (float(row["percent_of_copy"]) / 100)


if __name__ == "__main__":
    main(*sys.argv[1:])
