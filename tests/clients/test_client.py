"""Every method of both clients, against a real server."""

from __future__ import annotations

import asyncio
import hashlib
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import httpx
import pytest

import clients
from clients import AsyncClient, Client, Parameters, _calls
from prefix_store.prefix import Prefix
from tests.clients.conftest import MAX_UPLOAD_BYTES
from tests.server_process import ServerProcess

INPUT = "The capital of France is"


@pytest.fixture(scope="session")
def task(real_server: ServerProcess, prefix: Prefix) -> str:
    """A task that stays."""
    with Client(real_server.url, api_key=real_server.key) as client:
        return client.upload("stays", prefix).task_id


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def test_a_task_from_upload_to_delete(
    real_client: Client, kind: str, prefix: Prefix, tmp_path: Path
) -> None:
    name = f"life-{kind}"
    artefact = tmp_path / "prefix.safetensors"
    artefact.write_bytes(prefix.to_bytes())
    stored = real_client.upload(name, artefact)
    assert stored.task_id == name
    assert stored.version == digest(artefact.read_bytes())
    assert (stored.prefix_length, stored.bytes) == (4, artefact.stat().st_size)
    assert (stored.method, stored.template) == ("prefix-tuning", "{source}!")
    assert abs(datetime.now(UTC) - stored.created_at) < timedelta(minutes=5)
    assert real_client.task(name) == stored
    assert stored in real_client.tasks()
    copy = real_client.download(name, tmp_path / "copy")
    assert copy.read_bytes() == artefact.read_bytes()
    assert sorted(tmp_path.iterdir()) == [copy, artefact]
    real_client.delete(name)
    assert name not in [task.task_id for task in real_client.tasks()]
    for call in (real_client.task, real_client.delete):
        with pytest.raises(clients.UnknownTaskError, match=name):
            call(name)


def test_tasks_are_listed_over_pages(
    real_client: Client, kind: str, prefix: Prefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"page-{kind}-{number}" for number in range(3)]
    for name in names:
        real_client.upload(name, prefix)
    every = [task.task_id for task in real_client.tasks()]
    assert real_client.count_tasks() == len(every)
    monkeypatch.setattr(_calls, "MOST_LISTED", 2)
    assert [task.task_id for task in real_client.tasks()] == every

    def listed(limit: int) -> list[str]:
        return [task.task_id for task in real_client.tasks(limit=limit, after=f"page-{kind}-")]

    assert [listed(limit) for limit in (1, 2, 3)] == [names[:limit] for limit in (1, 2, 3)]


def test_versions_and_splits(real_client: Client, kind: str, prefix: Prefix, adapter: Path) -> None:
    name = f"versions-{kind}"
    old = real_client.upload(name, prefix).version
    new = real_client.upload(name, adapter, activate=False, if_match=old).version
    kept = real_client.versions(name)
    assert [(one.version, one.active, one.percent) for one in kept] == [
        (new, False, 0),
        (old, True, 100),
    ]
    assert (kept[1].prefix_length, kept[1].method) == (4, "prefix-tuning")
    task = real_client.split(name, {old: 50, new: 50}, if_match=old)
    assert task.split == {old: 50, new: 50}
    users = [f"user-{number}" for number in range(30)]
    served = [
        real_client.generate(INPUT, task_id=name, user=user, max_new_tokens=1).version
        for user in users
    ]
    assert set(served) == {old, new}
    [last] = real_client.stream(INPUT, task_id=name, user=users[0], max_new_tokens=1)
    assert last.details is not None
    assert last.details.version == served[0]
    assert real_client.activate(name, new).version == new
    assert real_client.rollback(name, if_match=new).version == old
    for call in (
        lambda: real_client.rollback(name),
        lambda: real_client.delete_version(name, old),
        lambda: real_client.activate(name, new, if_match=new),
        lambda: real_client.upload(name, prefix, if_match=new),
    ):
        with pytest.raises(clients.ConflictError):
            call()
    real_client.delete_version(name, new)
    with pytest.raises(clients.UnknownTaskError, match="keeps no version"):
        real_client.activate(name, new)
    assert len(real_client.versions(name)) == 1
    real_client.delete(name)


def test_every_kind_of_upload(
    real_client: Client, kind: str, prefix: Prefix, adapter: Path
) -> None:
    name = f"kinds-{kind}"
    same = [real_client.upload(name, source) for source in (prefix, prefix.to_bytes())]
    assert {task.version for task in same} == {digest(prefix.to_bytes())}
    assert real_client.upload(name, adapter).prefix_length == 3
    sent: list[tuple[int, int]] = []
    task = real_client.upload(name, text=INPUT, progress=lambda *now: sent.append(now))
    assert (task.method, task.prefix_length) == ("text", 5)
    assert sent[-1][0] == sent[-1][1] > len(INPUT)


def test_generate(real_client: Client, task: str) -> None:
    with_task = real_client.generate(INPUT, task_id=task, max_new_tokens=8)
    bare = real_client.generate(INPUT, max_new_tokens=8)
    assert with_task.generated_text != bare.generated_text
    assert (with_task.task_id, with_task.prefix_tokens) == (task, 4)
    assert with_task.version == real_client.task(task).version
    assert (bare.task_id, bare.version, bare.prefix_tokens) == (None, None, 0)
    assert with_task.prompt_tokens == bare.prompt_tokens + 1  # the template adds a character
    details = with_task.details
    assert details.generated_tokens == len(details.tokens) == 8
    assert (details.finish_reason, details.seed) == ("length", None)
    assert "".join(token.text for token in details.tokens) == with_task.generated_text
    assert all(token.logprob <= 0 for token in details.tokens)


def test_generate_for_several_inputs(real_client: Client, task: str) -> None:
    inputs = [INPUT, "Once upon a time", INPUT]
    together = real_client.generate(inputs, task_id=task, max_new_tokens=6)
    alone = [real_client.generate(text, task_id=task, max_new_tokens=6) for text in inputs]
    assert [one.generated_text for one in together] == [one.generated_text for one in alone]


def test_every_parameter_is_taken(real_client: Client) -> None:
    parameters: Parameters = {
        "max_new_tokens": 5,
        "do_sample": True,
        "temperature": 1.5,
        "top_k": 500,
        "top_p": 0.99,
        "min_p": 0.001,
        "typical_p": 0.99,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.1,
        "seed": 7,
        "stop": ["\n\n\n"],
        "ignore_eos": True,
        "num_beams": 2,
        "length_penalty": 0.5,
        "early_stopping": "never",
        "no_repeat_ngram_size": 4,
        "min_new_tokens": 2,
        "truncate": 3,
        "top_n_tokens": 2,
        "return_full_text": True,
    }
    assert set(parameters) == set(Parameters.__annotations__)
    beams = {name: parameters.pop(name) for name in ("num_beams", "early_stopping")}
    first, second = (real_client.generate(INPUT, **parameters) for _ in range(2))
    best = real_client.generate(INPUT, max_new_tokens=5, **beams)
    assert best.details.generated_tokens == 5
    assert first == second
    assert first.details.seed == 7
    assert first.prompt_tokens == 3
    assert first.generated_text.startswith(INPUT)
    assert [len(top) for top in first.details.top_tokens] == [2] * first.details.generated_tokens
    text = real_client.generate(INPUT, max_new_tokens=20).generated_text
    stopped = real_client.generate(INPUT, max_new_tokens=20, stop=[text[4:7]])
    assert stopped.details.finish_reason == "stop_sequence"
    assert text.startswith(stopped.generated_text)


def test_stream(real_client: Client, task: str) -> None:
    whole = real_client.generate(INPUT, task_id=task, max_new_tokens=8)
    tokens = list(real_client.stream(INPUT, task_id=task, max_new_tokens=8, top_n_tokens=1))
    assert tuple(token.token for token in tokens) == whole.details.tokens
    assert [token.index for token in tokens] == list(range(1, 9))
    assert [token.generated_text for token in tokens[:-1]] == [None] * 7
    assert tokens[-1].generated_text == whole.generated_text
    details = tokens[-1].details
    assert details is not None
    assert (details.task_id, details.version) == (task, whole.version)
    assert (details.generated_tokens, details.prefix_tokens) == (8, 4)
    assert all(token.top_tokens == (token.token,) for token in tokens)


def test_closing_a_stream_stops_the_generation(real_client: Client) -> None:
    tokens = real_client.stream(INPUT, max_new_tokens=400)
    next(tokens)
    tokens.close()
    for attempt in count():
        if "prefixserve_running_requests 0.0" in real_client.metrics():
            break
        assert attempt < 1000


def test_health_and_info(real_client: Client) -> None:
    assert real_client.health() == clients.Health(ready=True)
    info = real_client.info()
    assert (info.num_layers, info.num_kv_heads, info.head_dim) == (2, 2, 16)
    assert (info.model_dtype, info.model_device_type) == ("float32", "cpu")
    assert info.max_total_tokens == 512


def test_errors_say_what_the_server_says(
    real_client: Client, kind: str, prefix: Prefix, tmp_path: Path
) -> None:
    name = f"errors-{kind}"
    with pytest.raises(clients.UnknownTaskError, match=name):
        real_client.generate(INPUT, task_id=name)
    with pytest.raises(clients.UnknownTaskError, match=name):
        next(real_client.stream(INPUT, task_id=name))
    with pytest.raises(clients.InvalidRequestError, match="512"):
        real_client.generate(INPUT, max_new_tokens=600)
    with pytest.raises(clients.InvalidRequestError, match="temperature"):
        real_client.generate(INPUT, temperature=-1)
    with pytest.raises(clients.InvalidRequestError, match="inputs"):
        real_client.generate([])
    too_deep = Prefix.of(prefix.keys.repeat(2, 1, 1, 1), prefix.values.repeat(2, 1, 1, 1), "x")
    with pytest.raises(clients.InvalidRequestError, match="keys") as caught:
        real_client.upload(name, too_deep)
    assert caught.value.error_type == "invalid_prefix"
    with pytest.raises(clients.PayloadTooLargeError, match=str(MAX_UPLOAD_BYTES)):
        real_client.upload(name, bytes(MAX_UPLOAD_BYTES + 1))
    with pytest.raises(clients.PayloadTooLargeError):
        real_client.upload(name, bytes(4 * 1024 * 1024))
    with pytest.raises(clients.UnknownTaskError):
        real_client.download(name, tmp_path / "x")
    assert name not in [task.task_id for task in real_client.tasks()]


async def test_an_async_client_asks_for_many_at_once(real_server: ServerProcess) -> None:
    inputs = [f"{INPUT} {number}" for number in range(12)]
    async with AsyncClient(real_server.url) as client:
        together = await asyncio.gather(*(client.generate(i, max_new_tokens=4) for i in inputs))
        alone = [await client.generate(text, max_new_tokens=4) for text in inputs]
    texts = [[answer.generated_text for answer in answers] for answers in (together, alone)]
    assert texts[0] == texts[1]


def test_threads_share_a_client(real_server: ServerProcess) -> None:
    with Client(real_server.url) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.generate(INPUT, max_new_tokens=4), range(16)))
    assert len({answer.generated_text for answer in answers}) == 1


def test_every_field_is_one_of_the_servers(real_server: ServerProcess) -> None:
    schemas = httpx.get(f"{real_server.url}/openapi.json").json()["components"]["schemas"]
    expected = {
        "Parameters": set(Parameters.__annotations__),
        "Token": set(clients.Token.model_fields),
        "Details": set(clients.Details.model_fields),
        "GenerateResponse": set(clients.Generation.model_fields),
        "StreamEvent": set(clients.StreamToken.model_fields),
        "TaskResponse": set(clients.Task.model_fields),
        "VersionResponse": set(clients.Version.model_fields),
        "InfoResponse": set(clients.ServerInfo.model_fields),
    }
    for name, fields in expected.items():
        assert fields <= set(schemas[name]["properties"]), name
