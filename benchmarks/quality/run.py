"""One run: train it, let a server write the rows, score them, and keep the result as JSON."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.common import load_model
from benchmarks.quality.data import Split
from benchmarks.quality.plan import Run
from benchmarks.quality.texts import write_base_texts, write_texts
from clients.data import Row
from clients.evaluation import Output, score_outputs
from clients.training import Trained, train
from clients.training.run_folder import PREFIX_FILE
from prefix_store.prefix import Prefix

RESULT = "result.json"
_METRICS = ("BLEU", "ROUGE-L")
_NUM_EXAMPLES = 3


def carry_out(run: Run, rows: Split, runs: Path, console: Console) -> None:
    """Train, write and score, and keep `result.json` in the run's folder below `runs`.

    A run that was interrupted goes on from its last checkpoint; its time is not kept then.
    Checkpoints, and models that a baseline left, are removed in the end.

    Raises:
        TrainingInterruptedError: by Ctrl-C; it can be resumed.
    """
    folder = runs / run.name
    start = (
        None
        if run.start is None
        else Prefix.from_bytes((runs / run.start / PREFIX_FILE).read_bytes())
    )
    resumed = (folder / "run.json").is_file()
    dtype = torch.float32 if run.settings.method == "finetune" else None
    trained = train(
        run.settings,
        load_model(dtype),
        rows.train,
        folder,
        dev=rows.dev,
        start=start,
        resume=resumed,
        console=console,
    )
    facts = {
        "method": run.settings.method,
        "settings": run.settings.model_dump(mode="json"),
        "num_pairs": sum(len(row.references) for row in rows.train),
        "steps": trained.steps,
        "dev_loss": trained.dev_loss,
        "parameters": trained.parameters,
        "seconds": None if resumed else round(trained.seconds, 1),
    }
    _score(run.name, rows, folder, facts, partial(write_texts, run, trained, rows.train))
    _remove_leftovers(folder, trained)


def score_base_model(name: str, rows: Split, folder: Path) -> None:
    """The untouched model, prompted as one of `texts.BASES` says, scored like a run."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"method": name, "parameters": 0}
    _score(name, rows, folder, facts, partial(write_base_texts, name))


def _score(
    name: str,
    rows: Split,
    folder: Path,
    facts: dict[str, Any],
    write: Callable[[Sequence[Row]], list[Output]],
) -> None:
    everything = [row for part in rows.scored.values() for row in part]
    started = time.monotonic()
    outputs = write(everything)
    seconds = time.monotonic() - started
    scores, start = {}, 0
    for part, scored in rows.scored.items():
        scores[part] = _scores(name, scored, outputs[start : start + len(scored)])
        start += len(scored)
    result = {
        "name": name,
        **facts,
        "scores": scores,
        "writing_seconds": round(seconds, 1),
        "examples": [
            {"source": row.source, "text": output.text, "reference": row.references[0]}
            for row, output in list(zip(everything, outputs, strict=True))[:_NUM_EXAMPLES]
        ],
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        },
    }
    partial = folder / (RESULT + ".partial")
    partial.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(folder / RESULT)


def _scores(name: str, rows: Sequence[Row], outputs: Sequence[Output]) -> dict[str, Any]:
    result = score_outputs(name, rows, outputs, metrics=_METRICS)
    return {
        score.name: {"value": score.value, "low": score.low, "high": score.high}
        for score in result.scores
    }


def _remove_leftovers(folder: Path, trained: Trained) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    if trained.prefix is None and trained.path.is_dir():
        shutil.rmtree(trained.path)
