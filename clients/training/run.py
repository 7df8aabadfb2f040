"""`train`: from rows to a file that a server takes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from clients._errors import TrainingError, TrainingInterruptedError
from clients.data import Row
from clients.training.build import build
from clients.training.callbacks import ProgressCallback, StopOnSignal, tensorboard_callback
from clients.training.examples import Examples, encode_rows
from clients.training.references import typical_rows
from clients.training.run_folder import open_run, run_facts, save_result
from clients.training.settings import TrainSettings
from clients.training.task_model import TaskModel
from clients.training.trainer import TaskTrainer
from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix

_EAGER_TOKENS = 512
_SHORTEST = 2  # a token of prompt, one of target


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """What training gave.

    Attributes:
        path: the prefix's file, or what a baseline saved.
        prefix: None for a baseline.
        steps: of which the last or, with dev rows, the best is kept.
        dev_loss: mean cross-entropy of the dev rows' targets, in nats; None without dev rows.
        seconds: since the start or the resumption.
        parameters: numbers to be stored for the task.
    """

    path: Path
    prefix: Prefix | None
    steps: int
    dev_loss: float | None
    seconds: float
    parameters: int


def train(
    settings: TrainSettings,
    loaded: LoadedModel,
    rows: Sequence[Row],
    output: Path,
    *,
    dev: Sequence[Row] = (),
    start: Prefix | None = None,
    resume: bool = False,
    tensorboard: bool = False,
    console: Console | None = None,
) -> Trained:
    """Train on `rows` and write what came out to `output`.

    The base model is frozen, unless a baseline trains it. Ctrl-C and SIGTERM leave a checkpoint.

    Args:
        loaded: in the dtype to compute in; float32 for `finetune`.
        output: folder of checkpoints and the result; made if missing.
        dev: held-out rows; with them, the checkpoint with the least loss is kept: on their first
            references or, if `settings.references` chooses, on their most typical ones.
        start: the prefix to start from, with `settings.init` `task:NAME`.
        resume: go on from the last checkpoint in `output`.
        tensorboard: write logs for TensorBoard below `output`.
        console: where progress is shown; default stderr.

    Raises:
        TrainingError: the rows, the settings and the model do not go together, or `output` holds
            another run; before training starts.
        TrainingDivergedError: the loss is not finite.
        TrainingInterruptedError: it was stopped and can be resumed.
        MissingExtraError: PEFT, sacrebleu or TensorBoard is needed and not installed.
        IncompatiblePrefixError: `start` is of another base model.
    """
    console = console or Console(stderr=True)
    longest = _longest(settings, loaded)
    chosen = rows if settings.references is None else typical_rows(rows, settings.references)
    examples = encode_rows(chosen, loaded, settings.template, longest)
    dev_examples = _dev_examples(settings, loaded, dev, longest)
    model = build(settings, loaded, chosen, start)
    if settings.checkpointing:
        model.checkpoint_activations()
    stop, progress = StopOnSignal(), ProgressCallback(console)
    callbacks: list[TrainerCallback] = [progress, stop]
    if tensorboard:
        callbacks.append(tensorboard_callback(output / "tensorboard"))
    facts = run_facts(settings, loaded, rows)
    open_run(output, facts, resume=resume)
    trainer = TaskTrainer(
        model, settings, examples, dev_examples, output=output, callbacks=callbacks
    )
    started = time.monotonic()
    try:
        with stop.listening(), fast_attention(loaded, examples):
            trainer.train(resume_from_checkpoint=_last_checkpoint(output) if resume else None)
    finally:
        progress.close()
    steps, of = trainer.state.global_step, trainer.state.max_steps
    if stop.stopped and steps < of:
        raise TrainingInterruptedError(
            f"training stopped at step {steps} of {of}; go on with --resume"
        )
    dev_loss = trainer.state.best_metric
    if dev_loss is not None:
        facts["dev_loss"] = f"{dev_loss:.4f}"
    seconds = time.monotonic() - started
    path, prefix = save_result(model, settings, loaded, output, {**facts, "steps": str(steps)})
    return Trained(
        path=path,
        prefix=prefix,
        steps=steps,
        dev_loss=dev_loss,
        seconds=seconds,
        parameters=_stored_parameters(model, prefix),
    )


def _last_checkpoint(folder: Path) -> str | None:
    found: str | None = get_last_checkpoint(folder)  # type: ignore[no-untyped-call]
    return found


def _longest(settings: TrainSettings, loaded: LoadedModel) -> int:
    """Tokens that a row may have."""
    taken = settings.prefix_length if settings.has_prefix else 0
    left = loaded.spec.max_positions - taken
    if left < _SHORTEST:
        raise TrainingError(
            f"prefix_length is {taken}, and {loaded.spec.name!r} has {loaded.spec.max_positions} "
            f"positions; expected at most {loaded.spec.max_positions - _SHORTEST}, to leave room "
            "for text"
        )
    return left


def _dev_examples(
    settings: TrainSettings, loaded: LoadedModel, rows: Sequence[Row], longest: int
) -> Examples | None:
    if not rows:
        return None
    if settings.references is not None:
        rows = typical_rows(rows, 1)
    examples = encode_rows(rows, loaded, settings.template, longest, every_reference=False)
    return Examples(sorted(examples.examples, key=len))


@contextmanager
def fast_attention(loaded: LoadedModel, examples: Examples) -> Iterator[None]:
    """On a CPU and for short rows, plain products: torch's fused attention is slow backwards."""
    model, longest = loaded.model, max(map(len, examples.examples))
    before = model.config._attn_implementation
    has_encoder = loaded.spec.encoder is not None  # and attention of its own
    if not has_encoder and model.device.type == "cpu" and longest <= _EAGER_TOKENS:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if not has_encoder:
            model.set_attn_implementation(before)


def _stored_parameters(model: TaskModel, prefix: Prefix | None) -> int:
    if prefix is not None:
        return sum(2 * group.keys.numel() for group in prefix.groups.values())
    return sum(tensor.numel() for tensor in model.state_dict().values())
