"""Whole trainings of a tiny model: what comes out, what is left alone, how they stop and go on."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.trainer_utils import get_last_checkpoint

from clients import (
    MissingExtraError,
    TrainingDivergedError,
    TrainingError,
    TrainingInterruptedError,
)
from clients.data import Row
from clients.training import TrainSettings, train
from clients.training.build import initial_ids
from clients.training.callbacks import ProgressCallback
from prefix_store.errors import IncompatiblePrefixError
from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix

Load = Callable[[], LoadedModel]
QUICK: dict[str, Any] = {"batch_size": 4, "max_steps": 6, "prefix_length": 3}


def losses_of(folder: Path) -> list[float]:
    """The loss of every step, as the last checkpoint remembers it."""
    checkpoint = get_last_checkpoint(str(folder))
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize("method", ["prefix", "direct"])
@pytest.mark.parametrize("init", ["", "random", "text:The colour of it is"])
def test_loss_falls_and_the_base_model_stays_bit_for_bit(
    method: Any, init: str, load_tiny: Load, rows: Sequence[Row], tmp_path: Path
) -> None:
    loaded = load_tiny()
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    rate = {"prefix": 0.02, "direct": 0.2}[method]
    settings = TrainSettings(
        method=method, init=init, batch_size=4, max_steps=40, prefix_length=3, learning_rate=rate
    )
    trained = train(settings, loaded, rows, tmp_path / "run", dev=rows)
    losses = losses_of(tmp_path / "run")
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert trained.dev_loss is not None
    assert trained.dev_loss < losses[0]
    after = loaded.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in loaded.model.parameters())


def test_artefact_says_how_it_was_made(
    load_tiny: Load, rows: Sequence[Row], tmp_path: Path
) -> None:
    loaded = load_tiny()
    settings = TrainSettings(**QUICK, template="{source}\nSay: ", seed=7)
    trained = train(settings, loaded, rows, tmp_path / "run", dev=rows)
    prefix = Prefix.from_bytes(trained.path.read_bytes())
    assert (prefix.method, prefix.template) == ("prefix-tuning", "{source}\nSay: ")
    assert (prefix.base_model, prefix.fingerprint) == (loaded.spec.name, loaded.spec.fingerprint)
    assert prefix.prefix_length == 3
    training = prefix.training
    assert (training["method"], training["steps"], training["seed"]) == ("prefix", "6", "7")
    assert training["base_fingerprint"] == loaded.spec.fingerprint
    assert float(training["dev_loss"]) == pytest.approx(trained.dev_loss, abs=1e-4)
    assert len(training["data_sha256"]) == 64
    assert trained.parameters == prefix.keys.numel() + prefix.values.numel()


def test_same_seed_same_bytes_and_another_seed_others(
    load_tiny: Load, rows: Sequence[Row], tmp_path: Path
) -> None:
    made = [
        train(TrainSettings(**QUICK, seed=seed), load_tiny(), rows, tmp_path / name).prefix
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    first, same, other = (prefix.to_bytes() for prefix in made if prefix)
    assert first == same != other


def test_accumulated_steps_weigh_every_target_alike(
    load_tiny: Load, rows: Sequence[Row], tmp_path: Path
) -> None:
    # Two epochs of all twelve examples: the same steps, whether computed at once or in parts.
    common: dict[str, Any] = {"method": "direct", "prefix_length": 3, "max_steps": 2}
    at_once, in_parts = (
        train(settings, load_tiny(), rows, tmp_path / str(settings.batch_size)).prefix
        for settings in (
            TrainSettings(**common, batch_size=12),
            TrainSettings(**common, batch_size=4, accumulate=3),
        )
    )
    assert at_once is not None
    assert in_parts is not None
    torch.testing.assert_close(at_once.keys, in_parts.keys, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_training_goes_on_to_the_same_curve_and_bytes(
    number: signal.Signals,
    load_tiny: Load,
    rows: Sequence[Row],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = TrainSettings(batch_size=4, max_steps=9, prefix_length=3)  # three epochs
    whole = train(settings, load_tiny(), rows, tmp_path / "whole", dev=rows)

    def interrupted_log(self: ProgressCallback, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == 4:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(ProgressCallback, "on_step_begin", interrupted_log)
        with pytest.raises(TrainingInterruptedError, match=r"stopped at step 5 of 9; .* --resume"):
            train(settings, load_tiny(), rows, tmp_path / "parts", dev=rows)
    resumed = train(settings, load_tiny(), rows, tmp_path / "parts", dev=rows, resume=True)
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")
    assert resumed.path.read_bytes() == whole.path.read_bytes()


def test_signals_are_given_back(load_tiny: Load, rows: Sequence[Row], tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    train(TrainSettings(**QUICK), load_tiny(), rows, tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before


def test_best_checkpoint_is_kept(load_tiny: Load, rows: Sequence[Row], tmp_path: Path) -> None:
    # Whatever training makes likelier, these targets get less likely.
    dev = [Row(row.source, ("zebra quantum",)) for row in rows]
    settings = TrainSettings(method="direct", learning_rate=0.2, **{**QUICK, "max_steps": 30})
    settings = settings.model_copy(update={"eval_steps": 1, "patience": 2})
    trained = train(settings, load_tiny(), rows, tmp_path / "run", dev=dev)
    assert trained.steps < 30
    checkpoint = get_last_checkpoint(str(tmp_path / "run"))
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    measured = [e["eval_dev_loss"] for e in state["log_history"] if "eval_dev_loss" in e]
    assert trained.dev_loss == min(measured) < measured[-1]
    assert trained.prefix is not None
    assert trained.prefix.training["dev_loss"] == f"{min(measured):.4f}"


def test_loss_that_is_no_number_ends_it(
    load_tiny: Load, rows: Sequence[Row], tmp_path: Path
) -> None:
    settings = TrainSettings(method="direct", learning_rate=1e38, batch_size=4, max_steps=20)
    with pytest.raises(
        TrainingDivergedError, match=r"the loss is \w+ at step \d+, with learning rate [\d.]+e\+3"
    ):
        train(settings, load_tiny(), rows, tmp_path / "run")


def test_run_is_neither_overwritten_nor_resumed_as_another(
    load_tiny: Load, rows: Sequence[Row], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(TrainingError, match="there is no run to resume"):
        train(TrainSettings(**QUICK), load_tiny(), rows, folder, resume=True)
    train(TrainSettings(**QUICK), load_tiny(), rows, folder)
    with pytest.raises(TrainingError, match="holds a run already"):
        train(TrainSettings(**QUICK), load_tiny(), rows, folder)
    with pytest.raises(TrainingError, match="with seed '1'; this one has '2'"):
        train(TrainSettings(**QUICK, seed=2), load_tiny(), rows, folder, resume=True)
    with pytest.raises(TrainingError, match="with data_sha256"):
        train(TrainSettings(**QUICK), load_tiny(), rows[:-1], folder, resume=True)


def test_a_missing_package_is_told_before_a_run_begins(
    load_tiny: Load, rows: Sequence[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(MissingExtraError, match=r"needs the package tensorboard.*\[train\]"):
        train(TrainSettings(**QUICK), load_tiny(), rows, tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_starts_at_another_tasks_prefix(
    load_tiny: Load, rows: Sequence[Row], tmp_path: Path
) -> None:
    loaded = load_tiny()
    first = train(TrainSettings(**QUICK), loaded, rows, tmp_path / "first").prefix
    settings = TrainSettings(
        method="direct",
        init="task:first",
        learning_rate=1e-12,
        batch_size=4,
        max_steps=1,
        prefix_length=3,
    )
    second = train(settings, loaded, rows, tmp_path / "second", start=first).prefix
    assert first is not None
    assert second is not None
    assert torch.equal(first.keys, second.keys)
    longer = settings.model_copy(update={"prefix_length": 4})
    with pytest.raises(TrainingError, match="'first' has prefix length 3; expected 4"):
        train(longer, loaded, rows, tmp_path / "longer", start=first)
    with pytest.raises(TrainingError, match="no prefix to start from"):
        train(settings, loaded, rows, tmp_path / "none")


def test_another_models_prefix_is_no_start(
    load_tiny: Load, tiny_llama: LoadedModel, rows: Sequence[Row], tmp_path: Path
) -> None:
    shape = (2, 2, 3, 4)
    foreign = Prefix.of(torch.zeros(shape), torch.zeros(shape), method="prefix-tuning")
    settings = TrainSettings(**QUICK, init="task:other")
    with pytest.raises(IncompatiblePrefixError, match="numbers per head"):
        train(settings, load_tiny(), rows, tmp_path / "run", start=foreign)


def test_prefix_longer_than_the_positions_left_is_refused(
    load_tiny: Load, rows: Sequence[Row], tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"prefix_length is 511, .* has 512 positions"):
        train(TrainSettings(prefix_length=511), load_tiny(), rows, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_default_start_is_the_first_rows_as_text(load_tiny: Load, rows: Sequence[Row]) -> None:
    loaded = load_tiny()
    ids = initial_ids(TrainSettings(prefix_length=9), loaded, rows)
    assert len(ids) == 9
    assert loaded.tokenizer.decode(ids).startswith("colour : red\nIt is")
    repeated = initial_ids(TrainSettings(prefix_length=5, init="text:red"), loaded, rows)
    assert repeated == tuple(loaded.tokenizer.encode("red") * 5)[:5]
