"""Training speed and memory beside PEFT's PrefixTuning with `prefix_projection`.

    python -m benchmarks.training [--rounds N] [--json]

Both train the same rows in the same order with transformers' Trainer and the same settings, turn
about, each time in a process of its own. A round's figure is the median seconds of a step, the
first ones left out; memory is the process's peak.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainerCallback

from benchmarks.common import DATA, PREFIX_LENGTH, ROOT, arguments, load_model, report
from clients.data import read_rows
from clients.training import TrainSettings
from clients.training.build import build
from clients.training.examples import Example, Examples, LikeLengthSampler, collate, encode_rows
from clients.training.run import fast_attention
from clients.training.trainer import TaskTrainer, training_arguments

TRAINERS = ("prefixserve", "peft")
STEPS, WARM_UP = 12, 3


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start."""
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop."""
        self.seconds.append(time.perf_counter() - self._started)


class PeftTrainer(Trainer):
    """A plain Trainer, with the rows in the same order."""

    def _get_train_sampler(self, *_: Any) -> LikeLengthSampler:
        examples = cast("Examples", self.train_dataset)
        return LikeLengthSampler(examples, self.args.train_batch_size, self.args.seed)


def work(trainer_name: str, steps: int) -> dict[str, float]:
    """Train in this process; seconds of a step and peak bytes."""
    loaded, clock = load_model(), Clock()
    settings = TrainSettings(prefix_length=PREFIX_LENGTH, max_steps=steps, init="random")
    rows = read_rows(DATA / "e2e" / "train.jsonl")
    examples = encode_rows(rows, loaded, settings.template, loaded.spec.max_positions)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        if trainer_name == "peft":
            device = loaded.model.device
            PeftTrainer(
                model=_peft_model(loaded.model),
                args=training_arguments(settings, steps, output, device, has_dev=False),
                data_collator=_with_mask,
                train_dataset=examples,
                callbacks=[clock],
            ).train()
        else:
            model = build(settings, loaded, rows, None)
            trainer = TaskTrainer(model, settings, examples, None, output=output, callbacks=[clock])
            with fast_attention(loaded, examples):
                trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    measured = clock.seconds[min(WARM_UP, steps - 1) :]
    return {"step_seconds": statistics.median(measured), "peak_bytes": peak}


def _peft_model(base: Any) -> Any:
    import peft  # noqa: PLC0415 - only where it is the one measured

    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=PREFIX_LENGTH,
        prefix_projection=True,
        encoder_hidden_size=512,
    )
    return peft.get_peft_model(base, config)


def _with_mask(examples: Sequence[Example]) -> dict[str, Tensor]:
    mask = [torch.ones(len(example), dtype=torch.int64) for example in examples]
    return {**collate(examples), "attention_mask": pad_sequence(mask, batch_first=True)}


def _measured(trainer_name: str, steps: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.training", "--worker", trainer_name]
    done = subprocess.run(
        [*command, "--steps", str(steps)], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    """Run and report."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--worker", choices=TRAINERS)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.worker, options.steps)))
        return
    rounds, steps = (1, 1) if options.smoke else (options.rounds, options.steps)
    # A smoke run keeps no figure, and starting two processes would be most of it.
    measure = work if options.smoke else _measured
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in TRAINERS}
    for _ in range(rounds):
        for name in TRAINERS:
            taken[name].append(measure(name, steps))
            if not options.json:
                print(name, taken[name][-1], file=sys.stderr)
    results = {
        name: {
            "step_seconds": statistics.median(found["step_seconds"] for found in rounds_of),
            "peak_bytes": max(found["peak_bytes"] for found in rounds_of),
        }
        for name, rounds_of in taken.items()
    }
    ours, theirs = (results[name] for name in TRAINERS)
    ratios = {
        "training_speed_vs_peft": theirs["step_seconds"] / ours["step_seconds"],
        "training_memory_vs_peft": ours["peak_bytes"] / theirs["peak_bytes"],
    }
    report("training", results, ratios)


if __name__ == "__main__":
    main()
