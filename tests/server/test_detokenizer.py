"""Streamed texts add up to the generated text, whatever the tokens are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefix_store.model_loading import LoadedModel
from server.detokenizer import Detokenizer
from server.tokenization import TextTokenizer

VOCABULARY = 49152
STORY = "Zoë's 👩‍🚀 café — naïve 東京 ﷽ \U0001f600!"


@pytest.fixture(scope="module")
def tokenizer(smollm2: LoadedModel) -> TextTokenizer:
    return TextTokenizer(smollm2.tokenizer)


@pytest.fixture(scope="module")
def byte_tokens(tokenizer: TextTokenizer) -> list[int]:
    """Tokens that are not whole characters on their own."""
    return [i for i in range(VOCABULARY) if "\ufffd" in tokenizer.token_text(i)]


def pieces(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    """The texts of the non-special tokens up to a stop string."""
    texts = []
    for position, token_id in enumerate(ids, start=1):
        token = detokenizer.push(token_id, last=position == len(ids))
        texts += [] if token.special else [token.text]
        if token.stopped:
            break
    return texts


@given(data=st.data())
def test_the_pieces_are_the_text_whatever_the_tokens(
    data: st.DataObject, tokenizer: TextTokenizer, byte_tokens: list[int]
) -> None:
    token = st.sampled_from(byte_tokens) | st.integers(0, VOCABULARY - 1)
    ids = data.draw(st.lists(token, min_size=1, max_size=24))
    detokenizer = Detokenizer(tokenizer)
    text = "".join(pieces(detokenizer, ids))
    whole = tokenizer.backend.decode(ids, skip_special_tokens=True)
    assert text == detokenizer.text
    assert whole.startswith(text)
    if not tokenizer.is_special(ids[-1]):
        assert set(whole[len(text) :]) <= {"\ufffd"}


@given(text=st.text(min_size=1))
def test_a_text_comes_back_unchanged(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.backend.encode(text, add_special_tokens=False).ids
    whole = tokenizer.backend.decode(ids)
    assert "".join(pieces(Detokenizer(tokenizer), ids)) == whole.rstrip("\ufffd")


def test_no_piece_ever_has_half_a_character(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.backend.encode(STORY, add_special_tokens=False).ids
    texts = pieces(Detokenizer(tokenizer), ids)
    assert "".join(texts) == STORY
    assert "" in texts  # some token alone was no whole character
    assert not any("\ufffd" in text for text in texts)


def test_half_a_character_at_the_end_is_left_out(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.backend.encode("so \U0001f600", add_special_tokens=False).ids
    detokenizer = Detokenizer(tokenizer)
    pieces(detokenizer, ids[:-1])
    assert detokenizer.text.strip() == "so"


def test_a_special_token_is_named_and_is_no_text(tokenizer: TextTokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    end = tokenizer.backend.token_to_id("<|im_end|>")
    token = detokenizer.push(end, last=True)
    assert (token.text, token.special, detokenizer.text) == ("<|im_end|>", True, "")


@given(data=st.data())
def test_a_stop_string_ends_the_text_wherever_the_tokens_part(
    data: st.DataObject, tokenizer: TextTokenizer
) -> None:
    start = data.draw(st.integers(0, len(STORY) - 1))
    end = data.draw(st.integers(start + 1, len(STORY)))
    stop = STORY[start:end]
    detokenizer = Detokenizer(tokenizer, [stop, "never there"])
    # One character a time gives tokens that part differently from the text's own.
    ids = [i for char in STORY for i in tokenizer.backend.encode(char).ids]
    text = "".join(pieces(detokenizer, ids))
    assert text == detokenizer.text == STORY[: STORY.index(stop) + len(stop)]


def test_the_stop_string_complete_first_wins(tokenizer: TextTokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, ["quick brown fox", "brown", "k b"])
    ids = tokenizer.backend.encode("the quick brown fox").ids
    assert "".join(pieces(detokenizer, ids)) == "the quick b"


def test_a_special_token_can_be_a_stop_string(tokenizer: TextTokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, ["<|im_start|>"])
    assert detokenizer.push(tokenizer.backend.token_to_id("<|im_start|>")).stopped


def test_a_text_without_a_stop_string_does_not_stop(tokenizer: TextTokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, ["foxes"])
    ids = tokenizer.backend.encode("the quick brown fox").ids
    assert "".join(pieces(detokenizer, ids)) == "the quick brown fox"
