"""Draw the results: tokens/s beside each peer, and how near every ratio is to its target."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.targets import TARGETS

LABELS = {
    "engine": "prefixserve, a task for each sequence",
    "vllm_base": "vLLM, base model",
    "vllm_lora": "vLLM, a LoRA adapter for each sequence",
    "llama_cpp": "llama.cpp, base model",
    "transformers_static": "transformers, base model",
    "peft": "PEFT, one prefix request at a time",
}
COLORS = dict(
    zip(LABELS, ("#1b6ca8", "#e07b39", "#f2b880", "#6a9955", "#8d8d8d", "#c9c9c9"), strict=True)
)


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Write a PNG of what `results` (the content of `latest.json`) has."""
    mpl.use("agg")
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    peers = results["benchmarks"].get("peers")
    if peers:
        _draw_peers(left, peers["results"]["tokens_per_second"])
    else:
        left.set_axis_off()
    _draw_ratios(right, results["ratios"])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw_peers(axes: Axes, rates: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Grouped bars: tokens/s by number of sequences."""
    shown: set[str] = set()
    for group, size in enumerate(rates):
        present = [name for name in LABELS if name in rates[size]]
        width = 0.86 / len(LABELS)
        for i, name in enumerate(present):
            x = group + (i - (len(present) - 1) / 2) * width
            rate = rates[size][name]["median"]
            label = None if name in shown else LABELS[name]
            axes.bar(x, rate, 0.92 * width, color=COLORS[name], label=label)
            axes.annotate(
                f"{rate:.0f}", (x, rate), (0, 2), textcoords="offset points", ha="center", size=7
            )
            shown.add(name)
    axes.set_xticks(range(len(rates)), [f"{size}" for size in rates])
    axes.set_xlabel("concurrent sequences")
    axes.set_ylabel("generated tokens/s, prefill included")
    axes.set_title("SmolLM2-135M, bfloat16, CPU")
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_ratios(axes: Axes, ratios: Mapping[str, float]) -> None:
    """Horizontal bars: the share of each target that is reached; less-is-better ones inverted."""
    names = [name for name in reversed(tuple(TARGETS)) if name in ratios]
    scores = [TARGETS[name].score(ratios[name]) for name in names]
    colors = ["#1b6ca8" if score >= 1 else "#c0504d" for score in scores]
    axes.barh(names, scores, color=colors)
    for y, (name, score) in enumerate(zip(names, scores, strict=True)):
        bound = "≤" if TARGETS[name].at_most else "≥"
        text = f"{ratios[name]:.3g}  (target {bound} {TARGETS[name].value:g})"
        axes.annotate(
            text,
            (max(1, min(score, 2)), y),
            (4, 0),
            textcoords="offset points",
            va="center",
            size=8,
        )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlim(0, 2.9)
    axes.set_xticks([0, 0.5, 1, 1.5, 2])
    axes.set_xlabel("share of the target that is reached (1 = met)")
    axes.set_title("Ratios against their targets")
    axes.spines[["top", "right"]].set_visible(False)
