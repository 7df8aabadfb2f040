"""The tasks that ship fit the default model and answer as they promise."""

from __future__ import annotations

import pytest
import torch

from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import SOURCE, Prefix
from prefix_store.validate import check_fits
from server.demo_tasks import DEMO_TASKS, DemoTask
from tests.engine.reference import greedy

TASKS = {task.task_id: task for task in DEMO_TASKS}


def read_prefix(task: DemoTask) -> Prefix:
    return Prefix.from_bytes(task.path.read_bytes())


def answer(base: LoadedModel, task: DemoTask) -> str:
    """What the task makes of its own example, greedily, by transformers alone."""
    prefix = read_prefix(task).to("cpu", torch.float32)
    prompt = base.tokenizer.encode(prefix.template.replace(SOURCE, task.example))
    ids, _ = greedy(base, prefix, tuple(prompt), max_new_tokens=64)
    text: str = base.tokenizer.decode(ids, skip_special_tokens=True)
    return text


@pytest.mark.parametrize("task", DEMO_TASKS, ids=lambda task: task.task_id)
def test_artefact_is_small_and_made_for_the_default_model(
    task: DemoTask, smollm2: LoadedModel
) -> None:
    assert task.path.stat().st_size < 1_000_000
    prefix = read_prefix(task)
    check_fits(prefix, smollm2.spec, max_prefix_length=64)
    assert (prefix.base_model, prefix.fingerprint, prefix.method, prefix.keys.dtype) == (
        smollm2.spec.name,
        smollm2.spec.fingerprint,
        "prefix-tuning",
        torch.bfloat16,
    )


@pytest.mark.parametrize("task", DEMO_TASKS, ids=lambda task: task.task_id)
def test_artefact_says_how_it_was_trained(task: DemoTask) -> None:
    training = read_prefix(task).training
    assert {"data_sha256", "init", "learning_rate", "batch_size", "seed", "steps"} <= set(training)
    assert 0 < float(training["dev_loss"]) < 2


def test_e2e_example_becomes_a_sentence_with_its_facts(smollm2: LoadedModel) -> None:
    text = answer(smollm2, TASKS["e2e"])
    assert text.startswith("The Eagle")
    assert text.endswith(".")
    assert all(fact in text for fact in ("coffee shop", "Chinese", "city centre"))


def test_webnlg_example_becomes_a_sentence_with_its_facts(smollm2: LoadedModel) -> None:
    text = answer(smollm2, TASKS["webnlg"])
    assert text.endswith(".")
    assert all(fact in text for fact in ("Aarhus Airport", "Tirstrup", "Aktieselskab"))


def test_sentiment_example_is_labelled(smollm2: LoadedModel) -> None:
    assert answer(smollm2, TASKS["sentiment"]) == "negative"
