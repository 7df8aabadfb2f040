"""Trainings of tiny encoder-decoder models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from clients import TrainingError
from clients.data import Row
from clients.training import TrainSettings, train
from clients.training.prefixes import text_keys_values
from prefix_store.errors import IncompatiblePrefixError
from prefix_store.groups import CROSS, DECODER, ENCODER, GROUPS
from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from prefix_store.validate import check_fits
from tests.conftest import TINY_ENCODER_DECODERS, tiny_encoder_decoder
from tests.engine.seq2seq_reference import teacher_forced

QUICK: dict[str, Any] = {"batch_size": 4, "max_steps": 4, "prefix_length": 3}


@pytest.fixture(params=sorted(TINY_ENCODER_DECODERS))
def loaded(request: pytest.FixtureRequest, smollm2: LoadedModel) -> LoadedModel:
    """A tiny model with the real tokenizer."""
    return tiny_encoder_decoder(request.param, smollm2.tokenizer)


@pytest.mark.parametrize("method", ["prefix", "direct"])
@pytest.mark.parametrize("init", ["", "random"])
def test_loss_falls_and_is_that_of_the_prefix_by_hand(
    method: Any, init: str, loaded: LoadedModel, rows: Sequence[Row], tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    settings = TrainSettings(
        method=method,
        init=init,
        batch_size=4,
        max_steps=30,
        prefix_length=3,
        learning_rate={"prefix": 0.02, "direct": 0.2}[method],
        dtype="float32",
    )
    first = train(
        settings.model_copy(update={"max_steps": 1, "learning_rate": 1e-9}),
        loaded,
        rows,
        tmp_path / "first",
        dev=rows,
    )
    trained = train(settings, loaded, rows, tmp_path / "run", dev=rows)
    assert first.dev_loss is not None
    assert trained.dev_loss is not None
    assert trained.dev_loss < 0.97 * first.dev_loss
    after = loaded.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())

    prefix = Prefix.from_bytes(trained.path.read_bytes())
    check_fits(prefix, loaded.spec, 10)
    assert set(prefix.groups) == set(GROUPS)
    tokenizer = loaded.tokenizer
    losses = []
    for row in rows:
        source = tokenizer.encode(settings.template.replace("{source}", row.source))
        target = [*tokenizer.encode(row.references[0]), tokenizer.eos_token_id]
        logits = teacher_forced(loaded, prefix, tuple(source), target)
        losses += torch.nn.functional.cross_entropy(
            logits, torch.tensor(target), reduction="none"
        ).tolist()
    assert trained.dev_loss == pytest.approx(sum(losses) / len(losses), abs=1e-3)


@pytest.mark.parametrize("where", ["encoder", "decoder,encoder", "cross"])
def test_where(where: Any, loaded: LoadedModel, rows: Sequence[Row], tmp_path: Path) -> None:
    trained = train(TrainSettings(**QUICK, where=where), loaded, rows, tmp_path / "run")
    assert trained.prefix is not None
    assert set(trained.prefix.groups) == set(where.split(","))
    again = TrainSettings(**QUICK, where=where, init="task:it")
    went_on = train(again, loaded, rows, tmp_path / "again", start=trained.prefix)
    assert went_on.parameters == trained.parameters
    other = TrainSettings(**QUICK, where="encoder,cross", init="task:it")
    with pytest.raises(TrainingError, match="expected cross, encoder, what is to be trained"):
        train(other, loaded, rows, tmp_path / "other", start=trained.prefix)


def test_a_texts_keys_and_values_are_those_that_attention_gets(loaded: LoadedModel) -> None:
    ids = (11, 12, 13)
    found = text_keys_values(loaded.model, ids)
    assert {group: tensor.shape[1:] for group, tensor in found.items()} == {
        group: loaded.spec.shape(group, 3) for group in GROUPS
    }
    tensor = torch.tensor([ids])
    with torch.no_grad():
        cache = loaded.model(
            input_ids=tensor, decoder_input_ids=tensor, use_cache=True
        ).past_key_values
    for group, own in (
        (DECODER, cache.self_attention_cache),
        (CROSS, cache.cross_attention_cache),
    ):
        keys = torch.cat([layer.keys for layer in own.layers])
        torch.testing.assert_close(found[group][0], keys)
    assert loaded.model.config._attn_implementation == "prefix"


def test_what_does_not_go_with_an_encoder(
    loaded: LoadedModel, tiny_llama: LoadedModel, rows: Sequence[Row], tmp_path: Path
) -> None:
    for fields, says in (
        ({"method": "lora"}, "lora is for decoder-only"),
        ({"checkpointing": True}, "without checkpointing"),
        ({"prefix_length": 93}, "positions for 3 of each beside the prefix"),
    ):
        if loaded.spec.max_positions > 1000 and "prefix_length" in fields:
            continue
        with pytest.raises(TrainingError, match=says):
            train(TrainSettings(**(QUICK | fields)), loaded, rows, tmp_path / "run")
    decoder_only = Prefix.of(torch.ones(2, 2, 3, 8), torch.ones(2, 2, 3, 8), "x")
    settings = TrainSettings(**QUICK, init="task:it")
    with pytest.raises(IncompatiblePrefixError, match="a decoder-only model"):
        train(settings, loaded, rows, tmp_path / "run", start=decoder_only)


def test_where_is_for_models_that_have_it(
    smollm2: LoadedModel, rows: Sequence[Row], tmp_path: Path
) -> None:
    settings = TrainSettings(**QUICK, where=(ENCODER, DECODER))
    with pytest.raises(TrainingError, match="can have a prefix in decoder"):
        train(settings, smollm2, rows, tmp_path / "run")
    with pytest.raises(ValueError, match="where"):
        TrainSettings(where="nowhere")  # type: ignore[arg-type]


def test_the_whole_model(loaded: LoadedModel, rows: Sequence[Row], tmp_path: Path) -> None:
    settings = TrainSettings(method="finetune", batch_size=4, max_steps=30, learning_rate=1e-2)
    trained = train(settings, loaded, rows, tmp_path / "run", dev=rows)
    assert trained.path.is_dir()
    assert trained.dev_loss is not None
    assert trained.dev_loss < 5
