"""Hugging Face's and LoRAX's own clients, as they are, against this server."""

from __future__ import annotations

import lorax
import pytest
import text_generation
from huggingface_hub import InferenceClient
from huggingface_hub.errors import ValidationError

from tests.server.live import LiveServer

# text-generation still calls pydantic's first API.
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def hub(server: LiveServer) -> InferenceClient:
    return InferenceClient(base_url=server.url)


@pytest.fixture(scope="module")
def tgi(server: LiveServer) -> text_generation.Client:
    return text_generation.Client(server.url, timeout=60)


def test_hugging_face_hub_generates(server: LiveServer, hub: InferenceClient) -> None:
    expected = server.generate(PROMPT, "middle", max_new_tokens=8, details=True)
    text = hub.text_generation(PROMPT, max_new_tokens=8, adapter_id="middle")
    assert text == expected["generated_text"]
    found = hub.text_generation(PROMPT, max_new_tokens=8, adapter_id="middle", details=True)
    assert found.generated_text == text
    assert found.details is not None
    assert found.details.finish_reason == "length"
    assert [t.id for t in found.details.tokens] == [t["id"] for t in expected["details"]["tokens"]]


def test_hugging_face_hub_streams(server: LiveServer, hub: InferenceClient) -> None:
    expected = server.generate(PROMPT, "middle", max_new_tokens=8)["generated_text"]
    settings = {"max_new_tokens": 8, "adapter_id": "middle", "stream": True}
    assert "".join(hub.text_generation(PROMPT, **settings)) == expected
    events = list(hub.text_generation(PROMPT, details=True, **settings))
    assert "".join(event.token.text for event in events) == expected
    assert events[-1].generated_text == expected
    assert events[-1].details is not None
    assert events[-1].details.generated_tokens == 8
    assert events[-1].details.input_length == 4


def test_hugging_face_hub_samples_with_every_parameter(
    server: LiveServer, hub: InferenceClient
) -> None:
    settings = {
        "max_new_tokens": 8,
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 30,
        "top_p": 0.9,
        "typical_p": 0.95,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.1,
        "seed": 5,
        "stop": ["\0"],
        "truncate": 3,
        "top_n_tokens": 2,
        "return_full_text": True,
        "best_of": 1,
        "decoder_input_details": False,
        "watermark": False,
    }
    expected = server.generate(PROMPT, details=True, **settings)
    found = hub.text_generation(PROMPT, details=True, **settings)
    assert found.generated_text == expected["generated_text"]
    assert found.details is not None
    assert found.details.seed == 5
    assert found.details.top_tokens is not None
    assert [len(top) for top in found.details.top_tokens] == [2] * 8


def test_hugging_face_hub_raises_its_own_errors(hub: InferenceClient) -> None:
    with pytest.raises(ValidationError, match="max_new_tokens"):
        hub.text_generation(PROMPT, max_new_tokens=100_000)


def test_text_generation_generates(server: LiveServer, tgi: text_generation.Client) -> None:
    expected = server.generate(PROMPT, max_new_tokens=8, details=True)
    found = tgi.generate(PROMPT, max_new_tokens=8)
    assert found.generated_text == expected["generated_text"]
    assert found.details.finish_reason == "length"
    assert [t.id for t in found.details.tokens] == [t["id"] for t in expected["details"]["tokens"]]


def test_text_generation_samples_and_stops(server: LiveServer, tgi: text_generation.Client) -> None:
    plain = tgi.generate(PROMPT, max_new_tokens=20, temperature=0.9, seed=3).generated_text
    stop = plain[5:8]
    found = tgi.generate(
        PROMPT, max_new_tokens=20, temperature=0.9, seed=3, stop_sequences=[stop], top_n_tokens=1
    )
    assert found.generated_text == plain[: plain.index(stop) + 3]
    assert found.details.finish_reason == "stop_sequence"
    assert found.details.seed == 3
    assert found.details.top_tokens is not None


def test_text_generation_streams(server: LiveServer, tgi: text_generation.Client) -> None:
    events = list(tgi.generate_stream(PROMPT, max_new_tokens=8))
    expected = server.generate(PROMPT, max_new_tokens=8)["generated_text"]
    assert "".join(event.token.text for event in events) == expected
    assert events[-1].generated_text == expected
    assert events[-1].details is not None
    assert events[-1].details.generated_tokens == 8


async def test_text_generation_streams_asynchronously(server: LiveServer) -> None:
    client = text_generation.AsyncClient(server.url, timeout=60)
    events = [event async for event in client.generate_stream(PROMPT, max_new_tokens=4)]
    found = await client.generate(PROMPT, max_new_tokens=4)
    assert events[-1].generated_text == found.generated_text


def test_text_generation_raises_its_own_errors(tgi: text_generation.Client) -> None:
    with pytest.raises(text_generation.errors.ValidationError, match="max_new_tokens"):
        tgi.generate(PROMPT, max_new_tokens=100_000)


def test_lorax_generates(server: LiveServer) -> None:
    client = lorax.Client(server.url)
    expected = server.generate(PROMPT, "middle", max_new_tokens=8, details=True)
    found = client.generate(
        PROMPT, adapter_id="middle", max_new_tokens=8, decoder_input_details=True
    )
    assert found.generated_text == expected["generated_text"]
    assert [t.id for t in found.details.tokens] == [t["id"] for t in expected["details"]["tokens"]]
    assert found.details.prompt_tokens == expected["prompt_tokens"] == len(found.details.prefill)
    events = list(client.generate_stream(PROMPT, adapter_id="middle", max_new_tokens=8))
    assert events[-1].generated_text == found.generated_text
    several = client.generate(
        PROMPT, adapter_id="middle", max_new_tokens=4, do_sample=True, best_of=3
    )
    assert len(several.details.best_of_sequences) == 2


async def test_lorax_streams_asynchronously(server: LiveServer) -> None:
    client = lorax.AsyncClient(server.url)
    stream = client.generate_stream(PROMPT, adapter_id="middle", max_new_tokens=4)
    expected = server.generate(PROMPT, "middle", max_new_tokens=4)["generated_text"]
    assert [event async for event in stream][-1].generated_text == expected


def test_lorax_raises_its_own_errors(server: LiveServer) -> None:
    client = lorax.Client(server.url)
    with pytest.raises(lorax.errors.NotFoundError, match="nobody"):
        client.generate(PROMPT, adapter_id="nobody")
    with pytest.raises(lorax.errors.ValidationError, match="adapter_source"):
        client.generate(PROMPT, adapter_id="middle", adapter_source="hub")
