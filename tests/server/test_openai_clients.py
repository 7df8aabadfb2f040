"""OpenAI's own client and litellm, as they are, against this server."""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import ModuleType

import openai
import pytest

from prefix_store.model_loading import LoadedModel
from tests.server.live import LiveServer, live_server

# litellm's own types make pydantic warn.
pytestmark = pytest.mark.filterwarnings("ignore:Item .* using the `ReadOnly` qualifier:UserWarning")

PROMPT = "Once upon a time"
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
NO_KEY = "none"


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=NO_KEY, max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(server: LiveServer) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"{server.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key=NO_KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def litellm() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it is fetched at import
        return importlib.import_module("litellm")


def test_openai_completes(server: LiveServer, client: openai.OpenAI) -> None:
    expected = server.generate(PROMPT, "middle", max_new_tokens=8)["generated_text"]
    body = {"model": "middle", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    found = client.completions.create(**body, logprobs=2, echo=True)
    assert found.choices[0].text == PROMPT + expected
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == found.choices[0].text
    assert found.usage is not None
    assert found.usage.completion_tokens == 8
    chunks = list(
        client.completions.create(**body, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.text for chunk in chunks for c in chunk.choices) == expected
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


def test_openai_chats(client: openai.OpenAI) -> None:
    body = {"model": "middle", "messages": MESSAGES, "max_completion_tokens": 8, "temperature": 0}
    found = client.chat.completions.create(**body, logprobs=True, top_logprobs=1)
    text = found.choices[0].message.content
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert "".join(token.token for token in logprobs.content or []) == text
    chunks = list(client.chat.completions.create(**body, stream=True))
    assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_openai_lists_models(client: openai.OpenAI, endless: LoadedModel) -> None:
    ids = [model.id for model in client.models.list()]
    assert ids[0] == endless.spec.name
    assert {"short", "middle", "long"} <= set(ids)
    assert client.models.retrieve("middle").id == "middle"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_openai_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nobody") as unknown:
        client.completions.create(model="nobody", prompt=PROMPT)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.chat.completions.create(model="nobody", messages=MESSAGES, stream=True)
    with pytest.raises(openai.BadRequestError, match="does not support") as refused:
        client.completions.create(model="middle", prompt=PROMPT, suffix="end")
    assert refused.value.param == "suffix"


def test_openai_s_errors_speak_of_the_fields_that_were_sent(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"prompt\[0\]: .* lower max_tokens") as long:
        client.completions.create(model="middle", prompt=["Hi", PROMPT], max_tokens=100_000)
    with pytest.raises(openai.BadRequestError, match=r"prompt\[1\]: token 999999"):
        client.completions.create(model="middle", prompt=[[1], [999_999]])
    for name in ("max_tokens", "max_completion_tokens"):
        with pytest.raises(openai.BadRequestError, match=f"shorten messages, or lower {name}"):
            client.chat.completions.create(
                model="middle", messages=MESSAGES, extra_body={name: 100_000}
            )
    for foreign in ("inputs", "truncate", "max_new_tokens"):
        assert foreign not in long.value.message


def test_openai_sends_its_key(endless: LoadedModel, tmp_path: Path) -> None:
    with live_server(endless, tmp_path, auth=True) as server:
        url, key = f"{server.url}/v1", server.client.headers["Authorization"].split()[1]
        with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client:
            found = client.completions.create(
                model=endless.spec.name, prompt=PROMPT, max_tokens=2, temperature=0
            )
            assert found.usage is not None
            assert found.usage.completion_tokens == 2
        with openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError) as refused:
                client.completions.create(model=endless.spec.name, prompt=PROMPT)
            assert refused.value.code == "invalid_api_key"


def test_openai_raises_the_error_that_ends_a_stream(endless: LoadedModel, tmp_path: Path) -> None:
    with (
        live_server(endless, tmp_path, "--drain-seconds", "0") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=NO_KEY, max_retries=0) as client,
    ):
        body = {"model": endless.spec.name, "prompt": PROMPT, "max_tokens": 2000}
        events = iter(client.completions.create(**body, stream=True))
        next(events)
        server.stop()
        with pytest.raises(openai.APIError, match="shut down"):
            list(events)


async def test_openai_completes_asynchronously(
    server: LiveServer, async_client: openai.AsyncOpenAI
) -> None:
    expected = server.generate(PROMPT, "middle", max_new_tokens=8)["generated_text"]
    body = {"model": "middle", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    found = await async_client.completions.create(**body)
    assert found.choices[0].text == expected
    events = await async_client.completions.create(**body, stream=True)
    assert "".join([c.text async for event in events for c in event.choices]) == expected
    chats = await async_client.chat.completions.create(
        model="middle", messages=MESSAGES, max_tokens=4, stream=True
    )
    assert [event async for event in chats][-1].choices[0].finish_reason == "length"
    with pytest.raises(openai.NotFoundError):
        await async_client.completions.create(model="nobody", prompt=PROMPT)


def test_litellm_completes_and_chats(
    server: LiveServer, client: openai.OpenAI, litellm: ModuleType
) -> None:
    where = {"api_base": f"{server.url}/v1", "api_key": NO_KEY, "max_tokens": 8, "temperature": 0}
    expected = server.generate(PROMPT, "middle", max_new_tokens=8)["generated_text"]
    found = litellm.text_completion(PROMPT, "text-completion-openai/middle", **where)
    assert found.choices[0].text == expected
    text = (
        client.chat.completions.create(
            model="middle", messages=MESSAGES, max_tokens=8, temperature=0
        )
        .choices[0]
        .message.content
    )
    answer = litellm.completion("openai/middle", MESSAGES, **where)
    assert answer.choices[0].message.content == text
    chunks = litellm.completion("openai/middle", MESSAGES, stream=True, **where)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


async def test_litellm_raises_its_own_errors(server: LiveServer, litellm: ModuleType) -> None:
    where = {"api_base": f"{server.url}/v1", "api_key": NO_KEY, "num_retries": 0}
    with pytest.raises(litellm.NotFoundError, match="nobody"):
        litellm.completion("openai/nobody", MESSAGES, **where)
    with pytest.raises(litellm.BadRequestError, match="max_tokens"):
        await litellm.acompletion("openai/middle", MESSAGES, max_tokens=0, **where)
