"""Uploading, listing, downloading, replacing and deleting tasks."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from httpx_sse import connect_sse
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix, version_of
from tests.engine.reference import greedy, random_prefix
from tests.server.live import LiveServer, live_server


@pytest.fixture
def task_id(server: LiveServer) -> Iterator[str]:
    """A task of the test's own, removed at its end."""
    name = f"task-{uuid.uuid4().hex}"
    yield name
    server.client.delete(f"/admin/tasks/{name}")


@pytest.fixture(scope="module")
def peft_dir(endless_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prefix-tuning adapter as PEFT itself writes it."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(endless_dir)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    adapted.save_pretrained(folder)
    return folder


def test_an_upload_answers_with_the_task_and_gives_the_same_bytes_back(
    server: LiveServer, prefixes: dict[str, Prefix], task_id: str
) -> None:
    data = prefixes["middle"].to_bytes()
    task = server.upload(task_id, prefixes["middle"])
    expected = {
        "task_id": task_id,
        "version": version_of(data),
        "prefix_length": 8,
        "bytes": len(data),
        "method": "random",
    }
    assert {name: task[name] for name in expected} == expected
    assert server.client.get(f"/admin/tasks/{task_id}").json() == task
    assert task in server.client.get("/admin/tasks").json()
    answer = server.client.get(f"/admin/tasks/{task_id}/prefix")
    assert answer.content == data
    assert f'filename="{task_id}.safetensors"' in answer.headers["content-disposition"]


def test_tasks_are_listed_by_name(server: LiveServer) -> None:
    names = [task["task_id"] for task in server.client.get("/admin/tasks").json()]
    assert names == sorted(names)
    assert {"short", "middle", "long"} <= {*names}
    assert server.client.get("/admin/task-count").json() == {"tasks": len(names)}


def test_tasks_are_listed_a_page_at_a_time(server: LiveServer) -> None:
    def page(**asked: object) -> list[str]:
        answer = server.client.get("/admin/tasks", params=asked)
        assert answer.status_code == httpx.codes.OK, answer.text
        return [task["task_id"] for task in answer.json()]

    names = page()
    assert page(limit=2) == names[:2]
    assert page(limit=2, after=names[1]) == names[2:4]
    assert page(after=names[-1]) == []
    assert page(after=f"{names[0]}-") == names[1:], "a name that no task has"
    for wrong in ({"limit": 0}, {"limit": 1001}, {"after": "../x"}):
        answer = server.client.get("/admin/tasks", params=wrong)
        assert answer.status_code == httpx.codes.UNPROCESSABLE_ENTITY, wrong


@pytest.mark.parametrize("reverse", [False, True])
def test_a_peft_adapter_generates_what_peft_does(
    server: LiveServer, endless: LoadedModel, peft_dir: Path, task_id: str, reverse: bool
) -> None:
    names = ["adapter_config.json", "adapter_model.safetensors"]
    files = [("file", (name, (peft_dir / name).read_bytes())) for name in names]
    answer = server.client.put(f"/admin/tasks/{task_id}", files=files[:: -1 if reverse else 1])
    assert answer.status_code == 201, answer.text
    assert (answer.json()["prefix_length"], answer.json()["method"]) == (6, "prefix-tuning")
    found = server.generate("Once upon a time", task_id, max_new_tokens=6, details=True)
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(endless.spec.name), peft_dir
    )
    prompt = endless.tokenizer("Once upon a time", return_tensors="pt")
    expected = adapted.generate(**prompt, max_new_tokens=6, do_sample=False)
    tokens = [token["id"] for token in found["details"]["tokens"]]
    assert tokens == expected[0, prompt["input_ids"].shape[1] :].tolist()


def test_a_text_is_as_good_as_the_text_before_every_input(server: LiveServer, task_id: str) -> None:
    text = "Translate to French.\n"
    task = server.client.put(f"/admin/tasks/{task_id}", json={"text": text}).json()
    assert task["method"] == "text"
    found = server.generate("Hello there", task_id, max_new_tokens=12)
    expected = server.generate(text + "Hello there", max_new_tokens=12)
    assert found["generated_text"] == expected["generated_text"]
    assert found["prefix_tokens"] == task["prefix_length"]
    assert found["prefix_tokens"] + found["prompt_tokens"] == expected["prompt_tokens"]


def test_a_template_goes_around_every_input(
    server: LiveServer, prefixes: dict[str, Prefix], task_id: str
) -> None:
    plain = prefixes["middle"]
    server.upload(task_id, Prefix.of(plain.keys, plain.values, "x", template="In: {source}\nOut:"))
    found = server.generate("a {source} b", task_id, max_new_tokens=6)
    expected = server.generate("In: a {source} b\nOut:", "middle", max_new_tokens=6)
    assert found["generated_text"] == expected["generated_text"]
    assert server.client.get(f"/admin/tasks/{task_id}").json()["template"] == "In: {source}\nOut:"


def test_a_replaced_prefix_is_for_requests_that_arrive_later(
    server: LiveServer, endless: LoadedModel, task_id: str
) -> None:
    old, new = (random_prefix(endless, 9, seed=seed) for seed in (91, 92))
    versions = [version_of(prefix.to_bytes()) for prefix in (old, new)]
    prompt_ids = tuple(endless.tokenizer("Hello")["input_ids"])
    server.upload(task_id, old)
    body = {"inputs": "Hello", "task_id": task_id, "parameters": {"max_new_tokens": 1500}}
    with connect_sse(server.client, "POST", "/generate_stream", json=body) as source:
        events = source.iter_sse()
        next(events)
        assert server.upload(task_id, new)["version"] == versions[1]
        later = server.generate("Hello", task_id, max_new_tokens=6, details=True)
        rest = [json.loads(event.data) for event in events]
    expected, _ = greedy(endless, old, prompt_ids, 200)
    assert [event["token"]["id"] for event in rest[:199]] == expected[1:]
    assert rest[-1]["details"]["version"] == versions[0]
    assert len(rest) == 1499
    expected, _ = greedy(endless, new, prompt_ids, 6)
    assert [token["id"] for token in later["details"]["tokens"]] == expected
    assert later["version"] == versions[1]


def test_a_deleted_task_is_gone_and_can_come_back(
    server: LiveServer, prefixes: dict[str, Prefix], task_id: str
) -> None:
    server.upload(task_id, prefixes["short"])
    expected = server.generate("Hello", task_id, max_new_tokens=3)
    assert server.client.delete(f"/admin/tasks/{task_id}").status_code == 204
    body = {"inputs": "Hello", "task_id": task_id}
    assert server.client.post("/generate", json=body).status_code == 404
    server.upload(task_id, prefixes["short"])
    assert server.generate("Hello", task_id, max_new_tokens=3) == expected


def test_one_artefact_under_two_names_outlives_one_of_them(
    server: LiveServer, prefixes: dict[str, Prefix], task_id: str
) -> None:
    server.upload(task_id, prefixes["short"])
    server.client.delete(f"/admin/tasks/{task_id}")
    assert server.client.get("/admin/tasks/short/prefix").content == prefixes["short"].to_bytes()


def test_prefixes_share_a_small_cache(
    endless: LoadedModel, prefixes: dict[str, Prefix], tmp_path: Path
) -> None:
    room = prefixes["long"].nbytes + prefixes["short"].nbytes
    with live_server(endless, tmp_path, "--prefix-cache-bytes", str(room)) as server:
        for task_id, prefix in prefixes.items():
            server.upload(task_id, prefix)
        for task_id in ("short", "long", "short", "middle", "long"):
            assert server.generate("Hello", task_id, max_new_tokens=2)["task_id"] == task_id
            assert server.metric("prefix_cache_bytes", tier="device") <= room
        counts = {"hits_total": 1, "misses_total": 4, "evictions_total": 3, "max_bytes": room}
        for name, count in counts.items():
            assert server.metric(f"prefix_cache_{name}", tier="device") == count
        assert server.metric("prefix_load_seconds_count", tier="device") == 4


def test_metrics_tell_what_was_done(server: LiveServer) -> None:
    names = ["prompt_tokens_total", "generated_tokens_total"]
    before = [server.metric(name, task="middle") for name in names]
    answered = server.metric("requests_total", task="middle", status="200")
    counted = [f"{name}_count" for name in ("time_to_first_token_seconds", "request_seconds")]
    timed = [server.metric(name) for name in counted]
    queued = server.metric("queue_seconds_count", tenant="default")
    server.generate("Hello", "middle", max_new_tokens=7)
    server.stream("Hello", "middle", max_new_tokens=7)
    assert [server.metric(name, task="middle") for name in names] == [before[0] + 2, before[1] + 14]
    assert server.metric("requests_total", task="middle", status="200") == answered + 2
    assert [server.metric(name) for name in counted] == [timed[0] + 2, timed[1] + 2]
    assert server.metric("queue_seconds_count", tenant="default") == queued + 2
    text = server.client.get("/metrics").text
    assert re.search(r'prefixserve_build_info\{.*model=".*endless-llama"', text)
