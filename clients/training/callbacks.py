"""What people see while it trains, and how they stop it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from clients._errors import MissingExtraError
from clients.training.trainer import DEV_LOSS


class ProgressCallback(TrainerCallback):
    """A bar with the loss and the time left on a terminal; elsewhere a line now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
        )
        self._losses: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._task = self._bar.add_task("Training", total=state.max_steps, losses="")
        self._bar.update(self._task, completed=state.global_step)
        self._bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        for name, shown in (("loss", "loss"), (DEV_LOSS, "dev loss")):
            if logs and name in logs:
                self._losses[shown] = logs[name]
        losses = ", ".join(f"{name} {value:.3f}" for name, value in self._losses.items())
        self._bar.update(self._task, losses=losses)
        if logs and DEV_LOSS in logs:
            self._console.print(f"step {state.global_step} of {state.max_steps}: {losses}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back."""
        self._bar.stop()


class StopOnSignal(TrainerCallback):
    """Ctrl-C or SIGTERM ends training after the step under way, with a checkpoint."""

    def __init__(self) -> None:
        self.stopped = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals over; a second one ends the program as it always does."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def stop(number: int, _: FrameType | None) -> None:
            self.stopped = True  # and nothing is printed: the console may be in the middle of it
            signal.signal(number, before[signal.Signals(number)])

        for number in before:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.stopped:
            control.should_save = control.should_training_stop = True


def tensorboard_callback(folder: Path) -> TrainerCallback:
    """Writes losses and learning rates for TensorBoard.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingExtraError("TensorBoard logging", error.name, "train") from error
    return TensorBoardCallback(SummaryWriter(folder))  # type: ignore[no-untyped-call]
