"""Which tasks are trained, on what, and how: the experiments of Li & Liang 2021, made small."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from clients.training.settings import TASK, Method, TrainSettings

Experiment = Literal["methods", "length", "extrapolation", "low_data"]
EXPERIMENTS: tuple[Experiment, ...] = ("methods", "length", "extrapolation", "low_data")

PREFIX_LENGTH = 16
LENGTHS = (1, 4, 16, 64)
ROW_COUNTS = (50, 100, 200, 400)
SEEDS = (1, 2)
METHODS: tuple[Method, ...] = ("prefix", "finetune", "adapter", "lora", "prompt-tuning")

_STEPS: dict[Experiment, int] = {
    "methods": 400,
    "length": 200,
    "extrapolation": 300,
    "low_data": 100,
}
LONG, TYPICAL = "methods-prefix-long", "methods-prefix-typical"
_LONG_STEPS = 900
_TYPICAL_SETTINGS = {"references": 2, "max_steps": 120, "eval_steps": 40, "learning_rate": 3e-4}
_E2E_INIT = (
    "text:Describe the restaurant in fluent English sentences, using all of the given facts:"
)
_WEBNLG_INIT = "text:Write fluent English sentences that state all of the given facts, and no more:"


@dataclass(frozen=True, slots=True)
class Run:
    """One task to train and to score.

    Attributes:
        name: of its folder; no two runs share one.
        data: which rows; `webnlg` leaves out the held-out categories.
        num_pairs: source and target pairs to train on, drawn with the settings' seed; None for all.
    """

    name: str
    experiment: Experiment
    data: Literal["e2e", "webnlg"]
    settings: TrainSettings
    num_pairs: int | None = None

    @property
    def start(self) -> str | None:
        """The run whose prefix it starts from, if any; that one comes before it."""
        init = self.settings.init
        return init.removeprefix(TASK) if init.startswith(TASK) else None


def plan() -> tuple[Run, ...]:
    """Every run, in the order in which they are worth having."""
    return (*_methods(), *_length(), *_extrapolation(), *_low_data())


def _settings(
    experiment: Experiment,
    method: Method,
    *,
    init: str = _E2E_INIT,
    seed: int = 1,
    prefix_length: int = PREFIX_LENGTH,
    steps: int | None = None,
) -> TrainSettings:
    steps = steps or _STEPS[experiment]
    return TrainSettings(
        method=method,
        init=init,
        seed=seed,
        prefix_length=prefix_length,
        max_steps=steps,
        eval_steps=max(1, steps // 4),
        patience=0,
    )


def _methods() -> Iterator[Run]:
    long = _settings("methods", "prefix", steps=_LONG_STEPS)
    yield Run(LONG, "methods", "e2e", long)
    typical = long.model_copy(update={**_TYPICAL_SETTINGS, "init": f"{TASK}{LONG}"})
    yield Run(TYPICAL, "methods", "e2e", typical)
    for method in METHODS:
        yield Run(f"methods-{method}", "methods", "e2e", _settings("methods", method))


def _length() -> Iterator[Run]:
    for length in LENGTHS:
        settings = _settings("length", "prefix", prefix_length=length)
        yield Run(f"length-{length}", "length", "e2e", settings)


def _extrapolation() -> Iterator[Run]:
    for method in ("prefix", "finetune"):
        settings = _settings("extrapolation", method, init=_WEBNLG_INIT)
        yield Run(f"extrapolation-{method}", "extrapolation", "webnlg", settings)


def _low_data() -> Iterator[Run]:
    for seed in SEEDS:
        for rows in ROW_COUNTS:
            for method in ("prefix", "finetune"):
                settings = _settings("low_data", method, seed=seed)
                yield Run(f"low-{rows}-{method}-{seed}", "low_data", "e2e", settings, rows)
        settings = _settings("low_data", "prefix", seed=seed, init="random")
        yield Run(f"low-100-random-{seed}", "low_data", "e2e", settings, 100)
