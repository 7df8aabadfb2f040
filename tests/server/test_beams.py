"""Beam search through the server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from prefix_store.model_loading import LoadedModel
from tests.server.live import LiveServer, live_server

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def narrow(endless: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with few slots, and beams for fewer."""
    flags = ["--max-slots", "4", "--max-beams", "3"]
    with live_server(endless, tmp_path_factory.mktemp("narrow"), *flags) as server:
        yield server


@pytest.mark.parametrize("more", [{}, {"no_repeat_ngram_size": 2, "length_penalty": 0.5}], ids=str)
def test_the_text_is_that_of_generate(
    narrow: LiveServer, endless: LoadedModel, more: dict[str, Any]
) -> None:
    params = {"num_beams": 3, "max_new_tokens": 9, **more}
    ids = endless.tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        output = endless.model.generate(**ids, do_sample=False, **params)
    expected = output[0, ids["input_ids"].shape[1] :].tolist()
    answer = narrow.generate(PROMPT, details=True, **params)
    assert [token["id"] for token in answer["details"]["tokens"]] == expected
    events = narrow.stream(PROMPT, **params)
    assert [event["token"]["id"] for event in events] == expected
    several = narrow.generate([PROMPT] * 3, details=True, **params)
    assert [answer["generated_text"]] * 3 == [one["generated_text"] for one in several]


def test_time_between_tokens_that_come_at_once_is_not_measured(narrow: LiveServer) -> None:
    def gaps() -> float:
        return narrow.metric("inter_token_seconds_count")

    before = gaps()
    narrow.generate(PROMPT, num_beams=3, max_new_tokens=6)
    assert gaps() == before
    narrow.generate(PROMPT, max_new_tokens=6)
    assert gaps() == before + 5


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        (
            {"num_beams": 4},
            "num_beams is 4; expected at most 3, this server's limit, which --max-beams",
        ),
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 2, "temperature": 0.5}, "beam search draws no tokens"),
        ({"num_beams": 2, "do_sample": True}, "beam search draws no tokens"),
        ({"early_stopping": "soon"}, "early_stopping"),
        ({"length_penalty": 11}, "length_penalty"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
        (
            {"min_new_tokens": 9, "max_new_tokens": 8},
            "min_new_tokens is 9, and max",
        ),
    ],
    ids=str,
)
def test_refuses(narrow: LiveServer, parameters: dict[str, Any], says: str) -> None:
    answer = narrow.client.post("/generate", json={"inputs": PROMPT, "parameters": parameters})
    assert answer.status_code == 422, answer.text
    assert says in answer.json()["error"]
