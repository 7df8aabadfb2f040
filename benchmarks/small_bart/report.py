"""`docs/small-bart.md`: what was trained, what it scores and what it writes, all from results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.small_bart.data import COMPRESSION, E2E

Results = Mapping[str, Any]
_TITLES = {
    E2E: "Describing restaurants (E2E)",
    COMPRESSION: "Keeping the first sentence of a text (WebNLG)",
}
_WRITERS = {
    "without a prefix": "the base without a prefix",
    "all": "16 vectors in each of the three places",
    "all, 4 beams": "the same, with `num_beams` 4",
    "decoder": "48 vectors in the decoder",
}
_METRICS = ("BLEU", "ROUGE-1", "ROUGE-2", "ROUGE-L")


def write_report(results: Results, path: Path) -> None:
    """Write the page."""
    parts = [_introduction(results), _trainings(results)]
    parts += [_task(results["tasks"][task], title) for task, title in _TITLES.items()]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _introduction(results: Results) -> str:
    base, machine = results["base"], results["machine"]
    return f"""# A small BART and two tasks

No pretrained encoder-decoder model could be had where this was written, so a small one was trained
from scratch. This page is written by

    python -m benchmarks.small_bart

on {results["date"]}, with {machine["cores"]} cores ({machine["cpu"]}, torch {machine["torch"]}).

The base is a BART of {base["parameters"]:,} parameters with a byte-level BPE tokenizer of its own.
It saw {results["rows"]:,} rows once: half of them texts of WebNLG and E2E to be repaired (spans of
words masked, sentences in any order, as in BART's pretraining), half of them WebNLG's facts to be
put into words, some written as attributes. Of E2E it saw texts and facts of training rows, but
never which belong together; of dev rows nothing.

Then it is frozen, and each task gets a prefix (`prefixserve train`): in the encoder, the decoder
and between them, or as many vectors in the decoder alone, where PEFT can put one. Texts are greedy,
where nothing else is said, written by a server and scored by `prefixserve eval` on dev rows, whose
loss also chose the checkpoint; in brackets the 95 % bootstrap interval over rows. Each training
has one thread; other work shared the cores, so the first of its times is the one to compare.

The rule that finds a sentence's end takes some abbreviations for it; those targets were kept."""


def _trainings(results: Results) -> str:
    lines = [
        "| training | numbers stored | steps | dev loss | time |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, facts in (("base", results["base"]), *results["trainings"].items()):
        cells = [name, f"{facts['parameters']:,}", f"{facts['steps']:,}"]
        cells += [f"{facts['dev_loss']:.3f}", _minutes(facts)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _minutes(facts: Mapping[str, Any]) -> str:
    """On one thread of a machine that may do other things as well."""
    busy, wall = (facts[f"{kind}_seconds"] / 60 for kind in ("cpu", "wall"))
    last = " (its last part: it was interrupted)" if facts["resumed"] else ""
    return f"{busy:.1f} min of one core in {wall:.1f} min{last}"


def _task(task: Mapping[str, Any], title: str) -> str:
    lines = [
        f"## {title}",
        "",
        f"{task['rows']:,} rows.",
        "",
        f"| written by | {' | '.join(_METRICS)} |",
        f"| --- |{' --- |' * len(_METRICS)}",
    ]
    for name, writer in _WRITERS.items():
        scores = task["scores"][name]
        lines.append(f"| {writer} | {' | '.join(_score(scores[m]) for m in _METRICS)} |")
    lines += ["", "```"]
    for example in task["examples"]:
        lines += [f"source:    {example['source']}", f"reference: {example['reference']}"]
        lines += [f"  {name}: {example[name]}" for name in _WRITERS]
        lines.append("")
    lines[-1] = "```"
    return "\n".join(lines)


def _score(score: Mapping[str, float]) -> str:
    return f"{score['value']:.1f} ({score['low']:.1f} to {score['high']:.1f})"
