"""The plots of `docs/quality.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_STYLES = {
    "prefix": ("prefix-tuning", "#1b6ca8"),
    "finetune": ("full fine-tuning", "#e07b39"),
}


def draw_low_data(scores: Mapping[str, Mapping[int, Sequence[float]]], path: Path) -> None:
    """BLEU by number of training pairs: the mean of seeds, and from the least to the greatest."""
    figure, axes = _figure()
    for method, (label, color) in _STYLES.items():
        by_rows = scores.get(method)
        if not by_rows:
            continue
        sizes = sorted(by_rows)
        axes.plot(sizes, [mean(by_rows[n]) for n in sizes], "o-", color=color, label=label)
        lows, highs = ([pick(by_rows[n]) for n in sizes] for pick in (min, max))
        axes.fill_between(sizes, lows, highs, color=color, alpha=0.2, linewidth=0)
        axes.set_xticks(sizes, map(str, sizes))
    axes.set_xlabel("training pairs")
    if scores:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def draw_length(scores: Mapping[int, Mapping[str, float]], path: Path) -> None:
    """BLEU by prefix length, with 95 % intervals."""
    figure, axes = _figure()
    lengths = sorted(scores)
    values = [scores[n]["value"] for n in lengths]
    errors = [
        [scores[n]["value"] - scores[n]["low"] for n in lengths],
        [scores[n]["high"] - scores[n]["value"] for n in lengths],
    ]
    axes.errorbar(lengths, values, errors, fmt="o-", color="#1b6ca8", capsize=3)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, map(str, lengths))
    axes.set_xlabel("prefix length, vectors")
    figure.savefig(path, dpi=120)


def _figure() -> tuple[Figure, Axes]:
    mpl.use("agg")
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.set_ylabel("BLEU on E2E's dev rows")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
