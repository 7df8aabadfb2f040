"""transformers' Trainer, told how to train a task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy

from clients._errors import TrainingDivergedError
from clients.training.examples import Examples, LikeLengthSampler, collate, collate_pairs
from clients.training.settings import TrainSettings
from clients.training.task_model import TaskModel

DEV_LOSS = "eval_dev_loss"
_EVALUATIONS = 10
_LOGS = 100
_DEV_BATCH = 32


class TaskTrainer(Trainer):
    """Batches of rows of like length, and an end where the loss is no number any more."""

    def __init__(
        self,
        model: TaskModel,
        settings: TrainSettings,
        train: Examples,
        dev: Examples | None,
        *,
        output: Path,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        """
        Args:
            dev: rows to measure on now and then, for early stopping and the best checkpoint.
            output: folder of checkpoints.
        """
        patience = [EarlyStoppingCallback(settings.patience)] if dev and settings.patience else []
        super().__init__(
            model=model,
            args=training_arguments(
                settings,
                num_steps(settings, len(train)),
                output,
                model.base.device,
                dev is not None,
            ),
            data_collator=collate_pairs if model.base.config.is_encoder_decoder else collate,
            train_dataset=train,
            eval_dataset=dev,
            compute_metrics=_mean_over_targets,
            callbacks=[*callbacks, *patience, _MeasureAtTheEnd()],
        )
        self.remove_callback(PrinterCallback)
        self._settings = settings
        self._train = train

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> LikeLengthSampler:
        return LikeLengthSampler(self._train, self._settings.batch_size, self._settings.seed)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise TrainingDivergedError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}, with learning "
                f"rate {self._get_learning_rate():.3g}. Lower the learning rate."
            )
        return loss


class _MeasureAtTheEnd(TrainerCallback):
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if args.eval_strategy != IntervalStrategy.NO and state.global_step >= state.max_steps:
            control.should_evaluate = True


def num_steps(settings: TrainSettings, num_examples: int) -> int:
    """Steps of the whole training."""
    if settings.max_steps is not None:
        return settings.max_steps
    batches = math.ceil(num_examples / settings.batch_size)
    return max(1, round(settings.epochs * math.ceil(batches / settings.accumulate)))


def training_arguments(
    settings: TrainSettings, steps: int, output: Path, device: torch.device, has_dev: bool
) -> TrainingArguments:
    """The Trainer's own arguments for `settings`."""
    every = settings.eval_steps or max(1, steps // _EVALUATIONS)
    return TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=_DEV_BATCH,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.initial_learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=round(settings.warmup * steps),
        weight_decay=0.0,
        seed=settings.seed,
        logging_steps=max(1, steps // _LOGS),
        logging_nan_inf_filter=False,
        eval_strategy="steps" if has_dev else "no",
        eval_steps=every,
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=has_dev,
        metric_for_best_model=DEV_LOSS if has_dev else None,
        greater_is_better=False,
        # The others' frozen weights are in the dtype that they compute in.
        bf16=settings.method == "finetune" and settings.dtype_on(device) == torch.bfloat16,
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=device.type == "cuda",
        report_to=[],
        disable_tqdm=True,
        log_level="error",
    )


def _mean_over_targets(prediction: EvalPrediction) -> dict[str, float]:
    """The mean loss of all targets, whatever batches they were in."""
    row_loss, row_targets = cast("tuple[np.ndarray, np.ndarray]", prediction.predictions)
    return {DEV_LOSS: float(row_loss.sum() / row_targets.sum())}
