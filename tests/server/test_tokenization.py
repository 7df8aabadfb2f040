"""Tokenizing does not depend on what was tokenized before, or on how long the text is."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer

from prefix_store.errors import ModelLoadError
from prefix_store.model_loading import LoadedModel
from server.tokenization import TextTokenizer
from tests.server.live import live_server

BOS = "<|im_start|>"


@pytest.fixture(scope="module")
def with_bos(endless: LoadedModel) -> LoadedModel:
    """The tiny model with a tokenizer that begins every text with a special token."""
    tokenizer = copy.deepcopy(endless.tokenizer)
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return replace(endless, tokenizer=tokenizer)


@pytest.mark.parametrize("repeats", [1, 1000])
async def test_special_tokens_are_added_unless_told_not_to(
    with_bos: LoadedModel, repeats: int
) -> None:
    tokenizer = TextTokenizer(with_bos.tokenizer)
    plain = await tokenizer.encode("naïve café " * repeats, add_special_tokens=False)
    bos = tokenizer.backend.token_to_id(BOS)
    assert await tokenizer.encode("naïve café " * repeats) == (bos, *plain)
    assert tokenizer.backend.decode(list(plain)) == "naïve café " * repeats


async def test_truncation_and_padding_of_the_models_own_do_not_count(endless: LoadedModel) -> None:
    tokenizer = copy.deepcopy(endless.tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    found = await TextTokenizer(tokenizer).encode("one two three four")
    assert found == tuple(endless.tokenizer("one two three four")["input_ids"])


def test_a_tokenizer_without_a_fast_form_is_refused() -> None:
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json"):
        TextTokenizer(ByT5Tokenizer())


def test_a_texts_prefix_has_the_special_token_once(with_bos: LoadedModel, tmp_path: Path) -> None:
    text = "Translate to French.\n"
    with live_server(with_bos, tmp_path) as server:
        server.client.put("/admin/tasks/text", json={"text": text})
        found = server.generate("Hello there", "text", max_new_tokens=12)
        expected = server.generate(text + "Hello there", max_new_tokens=12)
    assert found["generated_text"] == expected["generated_text"]
    assert found["prefix_tokens"] + found["prompt_tokens"] == expected["prompt_tokens"]
