"""The whole product: one server process, three tasks and the base model in every batch."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from httpx_sse import aconnect_sse

from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from server.demo_tasks import DEMO_TASKS
from tests.engine.reference import greedy, random_prefix
from tests.server_process import ServerProcess, running_server

NEW_TOKENS = 12
TEXT_PROMPT = "Answer with the name of a city.\n"
INPUTS = [
    "name : Cotto | Type : coffee shop | food : Chinese | area : city centre",
    "Aarhus | leaderName | Jacob_Bundsgaard",
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
]


@dataclass(frozen=True)
class Task:
    """A task as the reference sees it."""

    prefix: Prefix | None
    template: str

    def prompt_ids(self, loaded: LoadedModel, inputs: str) -> tuple[int, ...]:
        return tuple(loaded.tokenizer(self.template.replace("{source}", inputs))["input_ids"])


@pytest.fixture(scope="module")
def tasks(smollm2: LoadedModel) -> dict[str | None, Task]:
    """The demo task trained on E2E, a random prefix, a text, and the bare base model."""
    trained = Prefix.from_bytes(next(t.path for t in DEMO_TASKS if t.task_id == "e2e").read_bytes())
    text_ids = smollm2.tokenizer(TEXT_PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        past = smollm2.model(text_ids, use_cache=True).past_key_values
    text = Prefix.of(
        torch.cat([layer.keys for layer in past.layers]),
        torch.cat([layer.values for layer in past.layers]),
        method="text",
    )
    return {
        "e2e": Task(trained.to("cpu", torch.float32), trained.template),
        "noise": Task(random_prefix(smollm2, 7, seed=5), "{source}"),
        "city": Task(text, "{source}"),
        None: Task(None, "{source}"),
    }


@pytest.fixture(scope="module")
def server(
    models_dir: Path, tasks: dict[str | None, Task], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """The default model in float32, and the three tasks uploaded."""
    data_dir = tmp_path_factory.mktemp("data")
    (data_dir / "models").symlink_to(models_dir.absolute())
    flags = ("--dtype", "float32", "--no-demo-tasks")
    with running_server("smollm2-135m", data_dir, *flags) as server:
        with httpx.Client(base_url=server.url, timeout=60, headers=server.headers) as client:
            for task_id in ("e2e", "noise"):
                artefact = _artefact(tasks[task_id])
                answer = client.put(f"/admin/tasks/{task_id}", files={"file": artefact})
                assert answer.status_code == httpx.codes.CREATED, answer.text
            answer = client.put("/admin/tasks/city", json={"text": TEXT_PROMPT})
            assert answer.status_code == httpx.codes.CREATED, answer.text
        yield server


def _artefact(task: Task) -> bytes:
    assert task.prefix is not None
    template = "" if task.template == "{source}" else task.template
    prefix = task.prefix
    return Prefix.of(prefix.keys, prefix.values, prefix.method, template=template).to_bytes()


async def _generate(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    answer = await client.post("/generate", json=body)
    assert answer.status_code == httpx.codes.OK, answer.text
    text: str = answer.json()["generated_text"]
    return text


async def _stream(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    async with aconnect_sse(client, "POST", "/generate_stream", json=body) as source:
        events = [json.loads(event.data) async for event in source.aiter_sse()]
    text = "".join(e["token"]["text"] for e in events if not e["token"]["special"])
    assert events[-1]["generated_text"] == text
    assert [e["generated_text"] for e in events[:-1]] == [None] * (len(events) - 1)
    return text


async def test_32_requests_of_three_tasks_and_the_base_model_at_once(
    server: ServerProcess, smollm2: LoadedModel, tasks: dict[str | None, Task]
) -> None:
    requests = [
        (task_id, inputs, streamed)
        for streamed in (False, True)
        for inputs in INPUTS
        for task_id in tasks
    ]
    assert len(requests) == 32
    async with httpx.AsyncClient(
        base_url=server.url, timeout=120, headers=server.headers
    ) as client:
        answers = await asyncio.gather(
            *(
                (_stream if streamed else _generate)(client, _body(task_id, inputs))
                for task_id, inputs, streamed in requests
            )
        )
    for (task_id, inputs, streamed), answer in zip(requests, answers, strict=True):
        task = tasks[task_id]
        expected, _ = greedy(smollm2, task.prefix, task.prompt_ids(smollm2, inputs), NEW_TOKENS)
        text = smollm2.tokenizer.decode(expected, skip_special_tokens=True)
        assert answer == text, (task_id, inputs, streamed)


@pytest.mark.parametrize(
    ("ignore_eos", "tokens", "reason"), [(False, 1, "eos_token"), (True, NEW_TOKENS, "length")]
)
def test_a_text_ends_where_the_model_ends_it_unless_told_not_to(
    server: ServerProcess, smollm2: LoadedModel, ignore_eos: bool, tokens: int, reason: str
) -> None:
    prompt = "<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\nYes."
    body = _body(None, prompt)
    body["parameters"] |= {"details": True, "ignore_eos": ignore_eos}
    answer = httpx.post(
        f"{server.url}/generate", json=body, timeout=60, headers=server.headers
    ).json()
    found = answer["details"]["tokens"]
    assert (len(found), answer["details"]["finish_reason"]) == (tokens, reason)
    assert (found[0]["text"], found[0]["special"]) == ("<|im_end|>", True)
    readable = "".join(token["text"] for token in found if not token["special"])
    assert answer["generated_text"] == readable


def _body(task_id: str | None, inputs: str) -> dict[str, Any]:
    body = {"inputs": inputs, "parameters": {"max_new_tokens": NEW_TOKENS}}
    return body if task_id is None else {**body, "task_id": task_id}
