"""`docs/quality.md`: tables, plots, and where the paper's findings hold, all from results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.quality.data import HELD_OUT
from benchmarks.quality.plan import LENGTHS, LONG, METHODS, ROW_COUNTS, SEEDS, TYPICAL
from benchmarks.quality.plots import draw_length, draw_low_data
from benchmarks.quality.texts import BASE, BASE_BARE, BASE_PLAIN, BASES, INSTRUCTION

_ALIKE = 0.5  # BLEU; far less than the intervals
Results = Mapping[str, Mapping[str, Any]]
_NAMES = {
    "prefix": "prefix-tuning",
    "finetune": "full fine-tuning",
    "adapter": "bottleneck adapters",
    "lora": "LoRA, rank 8",
    "prompt-tuning": "prompt tuning",
}


def write_report(results: Results, docs: Path) -> None:
    """Write `quality.md` and its plots below `docs`; a run that is missing is said to be."""
    images = docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    draw_low_data(low_data(results), images / "quality-low-data.png")
    draw_length(length(results), images / "quality-length.png")
    parts = (
        _introduction(results),
        _methods(results),
        _low_data(results),
        _extrapolation(results),
        _length(results),
        _starts(results),
    )
    (docs / "quality.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def low_data(results: Results) -> dict[str, dict[int, list[float]]]:
    """Dev BLEU of each seed, by method and number of training pairs."""
    found: dict[str, dict[int, list[float]]] = {}
    for method in ("prefix", "finetune"):
        for rows in ROW_COUNTS:
            names = [f"low-{rows}-{method}-{seed}" for seed in SEEDS]
            scores = [bleu(results[name]) for name in names if name in results]
            if scores:
                found.setdefault(method, {})[rows] = scores
    return found


def length(results: Results) -> dict[int, Mapping[str, float]]:
    """Dev BLEU with its interval, by prefix length."""
    return {
        n: results[f"length-{n}"]["scores"]["dev"]["BLEU"]
        for n in LENGTHS
        if f"length-{n}" in results
    }


def bleu(result: Mapping[str, Any], part: str = "dev") -> float:
    """A run's BLEU on one of its scored parts."""
    return float(result["scores"][part]["BLEU"]["value"])


def _introduction(results: Results) -> str:
    dates = sorted(result["date"] for result in results.values())
    machine = next(iter(results.values()))["machine"] if results else {}
    cpu, cores, torch = (machine.get(name, "-") for name in ("cpu", "cores", "torch"))
    first, last = (dates[0], dates[-1]) if dates else ("-", "-")
    return f"""# Quality

Li & Liang (2021) with a small model: SmolLM2-135M-Instruct, frozen, in bfloat16, on E2E (400 inputs
with 3,424 references to train on, 147 inputs to score) and WebNLG. Everything on this page is
written by

    python -m benchmarks.quality

from the runs it keeps: {len(results)}, from {first} to {last}, on {cores} cores ({cpu}, torch
{torch}).

Texts are greedy and written through a server: prefixes and soft prompts as tasks, fine-tuned and
merged LoRA weights as its base model; bottleneck adapters, which it does not take, by transformers.
BLEU is sacrebleu's (13a), ROUGE-L rouge-score's, against all references, which stay as they are in
the data; in brackets the 95 % bootstrap interval over rows. The checkpoint with the least loss on
dev rows is scored. Seeds are 1, where nothing else is said. Training times include measuring, on
cores that other work shared at times, so they are upper bounds."""


def _methods(results: Results) -> str:
    lines = [
        "## Prefix-tuning beside other methods, on E2E",
        "",
        "All with batches of 8 and the same number of steps, but for the first two; the second "
        "goes on from the first (`--init task:... --references 2`). "
        "The base model's instruction is "
        f"“{INSTRUCTION.strip()}”",
        "",
        "| method | BLEU | ROUGE-L | stored per task | steps | training | dev loss |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    named = [(LONG, "prefix-tuning, longer")]
    named += [(TYPICAL, "then on the two most typical references")]
    named += [(f"methods-{method}", _NAMES[method]) for method in METHODS]
    named += [(BASE, "base model, hand-written instruction in its chat template")]
    named += [(BASE_PLAIN, "base model, the same instruction as plain text")]
    named += [(BASE_BARE, "base model, the source alone")]
    for key, name in named:
        lines.append(_method_row(name, results.get(key)))
    return "\n".join([*lines, "", *_methods_findings(results)])


def _method_row(name: str, result: Mapping[str, Any] | None) -> str:
    if result is None:
        return f"| {name} | not run | | | | | |"
    scores = result["scores"]["dev"]
    loss = result.get("dev_loss")
    cells = (
        name,
        _with_interval(scores["BLEU"]),
        _with_interval(scores["ROUGE-L"]),
        f"{result['parameters']:,} numbers",
        str(result.get("steps", "-")),
        _duration(result.get("seconds")),
        "-" if loss is None else f"{loss:.3f}",
    )
    return f"| {' | '.join(cells)} |"


def _methods_findings(results: Results) -> list[str]:
    prefix, finetune = (results.get(f"methods-{name}") for name in ("prefix", "finetune"))
    if prefix is None or finetune is None:
        return []
    ours, theirs = bleu(prefix), bleu(finetune)
    share = prefix["parameters"] / finetune["parameters"]
    found = [
        "The paper: with 0.1 % of the parameters prefix-tuning is as good as fine-tuning. "
        f"Here, with {share:.2%}: {_verdict(ours >= theirs - 1)}, BLEU {ours:.1f} and {theirs:.1f}."
    ]
    bases = [bleu(results[name]) for name in BASES if name in results]
    if len(bases) == len(BASES) and TYPICAL in results:
        chat, plain, bare = (f"{bleu(results[TYPICAL]) / base:.1f}" for base in bases)
        found.append(
            f"The best prefix has {chat} times the BLEU of the base model with the instruction in "
            f"its chat template, {plain} times with the instruction alone, {bare} times with the "
            "source alone."
        )
    return found


def _low_data(results: Results) -> str:
    scores = low_data(results)
    lines = [
        "## Little data, on E2E",
        "",
        f"Pairs are drawn with seeds {' and '.join(map(str, SEEDS))}; "
        "the number of steps is the same everywhere.",
        "",
        "| training pairs | prefix-tuning | full fine-tuning |",
        "| --- | --- | --- |",
    ]
    for rows in ROW_COUNTS:
        cells = (_each(scores.get(method, {}).get(rows)) for method in ("prefix", "finetune"))
        lines.append(f"| {rows} | {' | '.join(cells)} |")
    lines += ["", "![BLEU by number of training pairs](images/quality-low-data.png)"]
    both = sorted(set(scores.get("prefix", {})) & set(scores.get("finetune", {})))
    if both:
        better = [n for n in both if mean(scores["prefix"][n]) > mean(scores["finetune"][n])]
        lines += [
            "",
            "The paper: prefix-tuning is ahead of fine-tuning when data is scarce. Here: "
            f"{_verdict(len(better) == len(both), some=bool(better))}; it is ahead, by the mean of "
            f"seeds, with {_listed(better)} of {_listed(both)} pairs.",
        ]
    return "\n".join(lines)


def _extrapolation(results: Results) -> str:
    lines = [
        "## Categories that training did not see, on WebNLG",
        "",
        f"{', '.join(HELD_OUT)} are held out of training.",
        "",
        "| method | seen: BLEU | seen: ROUGE-L | unseen: BLEU | unseen: ROUGE-L |",
        "| --- | --- | --- | --- | --- |",
    ]
    found = {}
    for method in ("prefix", "finetune"):
        result = results.get(f"extrapolation-{method}")
        if result is None:
            lines.append(f"| {_NAMES[method]} | not run | | | |")
            continue
        found[method] = bleu(result, "unseen")
        cells = [
            _with_interval(result["scores"][part][metric])
            for part in ("seen", "unseen")
            for metric in ("BLEU", "ROUGE-L")
        ]
        lines.append(f"| {_NAMES[method]} | {' | '.join(cells)} |")
    if len(found) == 2:
        ahead = found["prefix"] - found["finetune"]
        seen = [bleu(results[f"extrapolation-{method}"], "seen") for method in found]
        holds = _verdict(ahead > _ALIKE, some=abs(ahead) <= _ALIKE and seen[0] < seen[1])
        lines += [
            "",
            "The paper: prefix-tuning is ahead of fine-tuning on unseen categories. Here: "
            f"{holds}; there it is {_difference(ahead)}, "
            f"and on seen categories {_difference(seen[0] - seen[1])}.",
        ]
    return "\n".join(lines)


def _length(results: Results) -> str:
    lines = [
        "## Prefix length, on E2E",
        "",
        "| vectors | BLEU |",
        "| --- | --- |",
    ]
    scores = length(results)
    for n in LENGTHS:
        lines.append(f"| {n} | {_with_interval(scores[n]) if n in scores else 'not run'} |")
    lines += ["", "![BLEU by prefix length](images/quality-length.png)"]
    if len(scores) > 1:
        most = max(score["value"] for score in scores.values())
        alike = [n for n, score in scores.items() if most - score["value"] <= _ALIKE]
        lines += [
            "",
            "The paper: BLEU rises with length up to a threshold (10 for table-to-text) and falls "
            f"a little behind it. Here it rises as far as {min(alike)}; "
            f"within {_ALIKE} of the best are {_listed(alike)}.",
        ]
    return "\n".join(lines)


def _starts(results: Results) -> str:
    starts = {
        "real words": [f"low-100-prefix-{seed}" for seed in SEEDS],
        "random": [f"low-100-random-{seed}" for seed in SEEDS],
    }
    found = {
        start: [bleu(results[name]) for name in names if name in results]
        for start, names in starts.items()
    }
    lines = ["## Where training starts, with 100 training pairs of E2E", ""]
    lines += ["| start | BLEU by seed |", "| --- | --- |"]
    lines += [f"| {start} | {_each(scores)} |" for start, scores in found.items()]
    if all(found.values()):
        holds = mean(found["real words"]) > mean(found["random"])
        lines += [
            "",
            "The paper: with little data, real words are a much better start than random numbers. "
            f"Here: {_verdict(holds)}.",
        ]
    return "\n".join(lines)


def _difference(ahead: float) -> str:
    if abs(ahead) <= _ALIKE:
        return f"as good ({ahead:+.1f} BLEU)"
    return f"{abs(ahead):.1f} BLEU {'ahead' if ahead > 0 else 'behind'}"


def _verdict(holds: bool, *, some: bool = False) -> str:
    return "it holds" if holds else "it holds in part" if some else "it does not hold"


def _with_interval(score: Mapping[str, float]) -> str:
    return f"{score['value']:.1f} ({score['low']:.1f} to {score['high']:.1f})"


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds / 60:.1f} min"


def _each(scores: Sequence[float] | None) -> str:
    return ", ".join(f"{score:.1f}" for score in scores) if scores else "not run"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
