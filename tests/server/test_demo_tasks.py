"""The tasks that ship fit the default model and answer as they promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from prefix_store.validate import check_fits
from server.demo_tasks import DEMO_TASKS, DemoTask
from server.demo_tasks.data import (
    Example,
    Row,
    detokenise,
    encode,
    endless_batches,
    prompt_ids,
    read_rows,
)
from server.demo_tasks.evaluate import bleu
from server.demo_tasks.prefix_model import greedy_texts, target_loss, text_keys_values

TASKS = {task.task_id: task for task in DEMO_TASKS}
ARTEFACTS = [task for task in DEMO_TASKS if task.kind == "artefact"]


def read_prefix(task: DemoTask) -> Prefix:
    return Prefix.from_bytes(task.path.read_bytes())


def answer(base: LoadedModel, task: DemoTask) -> str:
    """What the task makes of its own example, greedily."""
    if task.kind == "artefact":
        prefix = read_prefix(task)
        keys, values, template = prefix.keys, prefix.values, prefix.template
    else:
        text = task.path.read_text(encoding="utf-8")
        ids = base.tokenizer.encode(text, add_special_tokens=False)
        (keys, values), template = text_keys_values(base.model, ids), "{source}"
    prompt = prompt_ids(base.tokenizer, template, task.example)
    return greedy_texts(base, keys, values, [prompt], max_new_tokens=64)[0]


@pytest.mark.parametrize("task", ARTEFACTS, ids=lambda task: task.task_id)
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


@pytest.mark.parametrize("task", ARTEFACTS, ids=lambda task: task.task_id)
def test_artefact_says_how_it_was_trained(task: DemoTask) -> None:
    training = read_prefix(task).training
    assert {"data", "data_sha256", "initial_text", "steps", "lr", "batch", "seed"} <= set(training)
    assert float(training["dev_bleu"]) > 0


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
    assert answer(smollm2, TASKS["sentiment"]).strip() == "Sentiment: negative"


def test_detokenise_joins_what_was_split() -> None:
    split = "The Vaults , isn 't kids - friendly ; it 's £ 20 - 25 ."
    assert detokenise(split) == "The Vaults, isn't kids-friendly; it's £20-25."


def test_detokenise_leaves_plain_text_alone() -> None:
    plain = "Acta Math. Hungar. is 2702.0 m (8,865 ft) – a 'Technical Campus' in Izmir."
    assert detokenise(plain) == plain


def test_rows_are_read_with_joined_references(tmp_path: Path) -> None:
    file = tmp_path / "dev.jsonl"
    file.write_text(json.dumps({"source": "name : A", "references": ["A , here ."]}) + "\n")
    assert read_rows(file) == (Row("name : A", ("A, here.",)),)


def test_target_ends_in_eos_and_prompt_is_what_a_server_encodes(smollm2: LoadedModel) -> None:
    tokenizer = smollm2.tokenizer
    example = encode(tokenizer, "{source}\n", "name : Cotto", "Cotto is here.")
    assert list(example.prompt_ids) == tokenizer.encode("name : Cotto\n")
    assert tokenizer.decode(list(example.target_ids)) == "Cotto is here.<|im_end|>"


def test_each_epoch_holds_every_example_once_in_other_batches() -> None:
    examples = [Example((1,) * (n % 7 + 1), (n,)) for n in range(50)]
    batches = endless_batches(examples, batch_size=8, seed=1)
    first, second = ([next(batches) for _ in range(7)] for _ in range(2))
    assert sorted(e.target_ids[0] for batch in first for e in batch) == list(range(50))
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}


def test_padding_does_not_change_the_loss(tiny_llama: LoadedModel) -> None:
    keys, values = text_keys_values(tiny_llama.model, (3, 1, 4))
    batch = [Example((9, 8, 7, 6, 5), (11, 12, 2)), Example((13,), (14, 2))]
    alone = [target_loss(tiny_llama.model, keys, values, [example]) for example in batch]
    together = target_loss(tiny_llama.model, keys, values, batch)
    torch.testing.assert_close(together, (3 * alone[0] + 2 * alone[1]) / 5)


def test_loss_behind_a_texts_prefix_is_transformers_loss_after_the_text(
    tiny_llama: LoadedModel,
) -> None:
    text, prompt, target = (3, 1, 4, 1, 5), (9, 2, 6), (8, 2)
    keys, values = text_keys_values(tiny_llama.model, text)
    behind_prefix = target_loss(tiny_llama.model, keys, values, [Example(prompt, target)])
    ids = torch.tensor([text + prompt + target])
    labels = torch.tensor([[-100] * len(text + prompt) + list(target)])
    torch.testing.assert_close(behind_prefix, tiny_llama.model(input_ids=ids, labels=labels).loss)


def test_bleu_takes_rows_with_different_numbers_of_references() -> None:
    rows = [Row("a", ("the cat sat on the mat",)), Row("b", ("no", "a dog ran in the park"))]
    assert bleu(["the cat sat on the mat", "a dog ran in the park"], rows) == pytest.approx(100)
