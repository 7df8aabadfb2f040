"""Every refusal has one shape and says what is wrong, what was found and what to do."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from safetensors.torch import save

from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from server.api.error_responses import install_error_handlers
from tests.engine.reference import random_prefix
from tests.prefix_store.damage import damaged
from tests.server.conftest import MAX_LENGTH
from tests.server.live import LiveServer, live_server

JSON = {"Content-Type": "application/json"}


def refusal(answer: httpx.Response) -> tuple[int, str, str]:
    """Status, kind and message of an answer that must have the one shape."""
    body = answer.json()
    assert {*body} == {"error", "error_type"}, body
    assert answer.headers["content-type"] == "application/json"
    assert body["error"]
    return answer.status_code, body["error_type"], body["error"]


def generate(server: LiveServer, **body: Any) -> tuple[int, str, str]:
    """The refusal of a request that is sent as it is, NaN included."""
    return refusal(server.client.post("/generate", content=json.dumps(body), headers=JSON))


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
def test_an_unknown_task_is_404(server: LiveServer, path: str) -> None:
    answer = server.client.post(path, json={"inputs": "x", "task_id": "nobody"})
    status, kind, message = refusal(answer)
    assert (status, kind) == (404, "not_found")
    assert "'nobody'" in message


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_too_long_is_422_with_all_the_numbers(server: LiveServer, path: str) -> None:
    body = {"inputs": "Hello there", "task_id": "long", "parameters": {"max_new_tokens": 9000}}
    status, kind, message = refusal(server.client.post(path, json=body))
    assert (status, kind) == (422, "validation")
    for part in ("21 prefix", "2 prompt", "9000 max_new_tokens", "= 9023", f"of {MAX_LENGTH}"):
        assert part in message


def test_a_prompt_that_leaves_no_room_is_422(server: LiveServer) -> None:
    status, _, message = generate(server, inputs="word " * MAX_LENGTH, task_id="short")
    assert status == 422
    assert "3 prefix" in message


def test_in_a_list_the_input_is_named_and_nothing_runs(server: LiveServer) -> None:
    before = server.metric("prompt_tokens_total", task="base")
    status, _, message = generate(server, inputs=["Hi", "word " * MAX_LENGTH])
    assert (status, message[:10]) == (422, "inputs[1]:")
    assert server.metric("prompt_tokens_total", task="base") == before


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, ["inputs is missing"]),
        ({"inputs": ""}, ["inputs", "not empty"]),
        ({"inputs": []}, ["inputs", "1 to 128"]),
        ({"inputs": ["x", ""]}, ["inputs", "not empty"]),
        ({"inputs": ["x"] * 129}, ["inputs", "1 to 128"]),
        ({"inputs": 3}, ["inputs", "found 3"]),
        ({"inputs": "x", "input": "y"}, ["input is not a field"]),
        ({"inputs": "x", "\ud800": "y"}, ["body", r"\ud800"]),
        ({"inputs": "\ud800"}, ["inputs"]),
        ({"inputs": "x", "task_id": "\ud800"}, ["task_id"]),
        ({"inputs": "x", "task_id": "../etc"}, ["task_id", "'../etc'"]),
        ({"inputs": "x", "task_id": 7}, ["task_id", "found 7"]),
        ({"inputs": "x", "stream": "yes"}, ["stream", "'yes'"]),
        ({"inputs": ["x", "y"], "stream": True}, ["list of 2", "stream"]),
        ({"inputs": "x", "parameters": 1}, ["parameters"]),
    ],
)
def test_a_wrong_body_is_422(server: LiveServer, body: dict[str, Any], words: list[str]) -> None:
    status, kind, message = generate(server, **body)
    assert (status, kind) == (422, "validation"), message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"temprature": 1}, ["parameters.temprature is not a field"]),
        ({"temperature": -1}, ["temperature", "equal to 0", "-1"]),
        ({"temperature": "hot"}, ["temperature", "'hot'"]),
        ({"temperature": float("nan")}, ["temperature", "finite", "nan"]),
        ({"repetition_penalty": float("inf")}, ["repetition_penalty", "finite"]),
        ({"repetition_penalty": 0}, ["repetition_penalty", "0.01"]),
        ({"frequency_penalty": 2.5}, ["frequency_penalty", "equal to 2"]),
        ({"top_p": 0}, ["top_p", "greater than 0"]),
        ({"top_p": 1.1}, ["top_p", "equal to 1"]),
        ({"typical_p": 0}, ["typical_p"]),
        ({"min_p": 2}, ["min_p"]),
        ({"top_k": -1}, ["top_k"]),
        ({"top_k": 1.5}, ["top_k", "integer"]),
        ({"seed": -1}, ["seed"]),
        ({"seed": 2**64}, ["seed"]),
        ({"max_new_tokens": 0}, ["max_new_tokens", "equal to 1", "found 0"]),
        ({"max_new_tokens": "9"}, ["max_new_tokens", "'9'"]),
        ({"max_new_tokens": True}, ["max_new_tokens"]),
        ({"truncate": 0}, ["truncate"]),
        ({"ignore_eos": 1}, ["ignore_eos", "found 1"]),
        ({"top_n_tokens": 21}, ["top_n_tokens", "20"]),
        ({"stop": [""]}, ["stop"]),
        ({"stop": ["x"] * 17}, ["stop", "16"]),
        ({"stop": "x"}, ["stop", "list"]),
        ({"watermark": True}, ["watermark", "not support", "false"]),
        ({"best_of": 2}, ["best_of is 2", "greedy"]),
        ({"best_of": 21}, ["best_of", "20"]),
        ({"adapter_id": "short"}, ["'middle'", "'short'"]),
    ],
)
def test_a_wrong_parameter_is_422_and_named(
    server: LiveServer, parameters: dict[str, Any], words: list[str]
) -> None:
    status, kind, message = generate(server, inputs="x", task_id="middle", parameters=parameters)
    assert (status, kind) == (422, "validation"), message
    assert all(word in message for word in words), message


def test_several_wrong_fields_are_named_at_once(server: LiveServer) -> None:
    _, _, message = generate(server, inputs="x", parameters={"top_k": -1, "seed": -1})
    assert "top_k" in message
    assert "seed" in message


def test_a_long_wrong_value_is_cut_short(server: LiveServer) -> None:
    _, _, message = generate(server, inputs="x", parameters={"temperature": "hot" * 1000})
    assert len(message) < 250


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"{", 422, "not JSON"),
        (b"", 422, "empty"),
        (b"[]", 422, "body"),
        (b'"\xff"', 400, "body"),
        (b"[" * 100_000, 400, "body"),
    ],
)
def test_what_is_not_json_is_refused(
    server: LiveServer, content: bytes, status: int, words: str
) -> None:
    for path in ("/generate", "/generate_stream", "/"):
        found, _, message = refusal(server.client.post(path, content=content, headers=JSON))
        assert (found, words in message) == (status, True), message


def test_json_must_be_declared(server: LiveServer) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = server.client.post("/generate", content=b'{"inputs": "x"}', headers=headers)
    status, _, message = refusal(answer)
    assert status == 415
    assert "Content-Type: application/json" in message


def test_unknown_pages_and_methods_have_the_shape_too(server: LiveServer) -> None:
    assert refusal(server.client.get("/nowhere"))[:2] == (404, "not_found")
    status, _, message = refusal(server.client.get("/generate"))
    assert status == 405
    assert "POST" in message


@pytest.fixture(scope="module")
def small(
    endless: LoadedModel, prefixes: dict[str, Prefix], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """One slot, nobody waits, and small bodies."""
    flags = ["--max-slots", "1", "--max-waiting", "0", "--max-body-bytes", "2KiB"]
    flags += ["--max-upload-bytes", "70KiB", "--max-length", "256"]
    with live_server(endless, tmp_path_factory.mktemp("small"), *flags) as server:
        server.upload("short", prefixes["short"])
        yield server


def test_a_full_queue_is_429_and_takes_none_of_a_list(small: LiveServer) -> None:
    small.generate("a", "short", max_new_tokens=2)
    body = {"inputs": ["a", "b", "c"], "task_id": "short", "parameters": {"max_new_tokens": 200}}
    answer = small.client.post("/generate", json=body)
    assert refusal(answer)[:2] == (429, "overloaded")
    assert int(answer.headers["retry-after"]) >= 1
    assert small.metric("running_requests") == 0
    # Refused before anything is done for it, so a flood costs others little.
    answer = small.client.post("/generate", json={**body, "task_id": "never-looked-up"})
    assert refusal(answer)[:2] == (429, "overloaded")
    assert small.generate("a", "short", max_new_tokens=2)["task_id"] == "short"
    assert small.metric("requests_total", task="short", status="429") == 1


def test_a_large_body_is_413_declared_or_not(small: LiveServer) -> None:
    body = json.dumps({"inputs": "x" * 3000}).encode()
    pieces = (body[start : start + 500] for start in range(0, len(body), 500))
    for content in (body, pieces):
        status, kind, message = refusal(
            small.client.post("/generate", content=content, headers=JSON)
        )
        assert (status, kind) == (413, "too_large")
        assert "2048" in message
    assert small.generate("x", max_new_tokens=1)


def test_a_large_upload_is_413_and_stores_nothing(small: LiveServer, endless: LoadedModel) -> None:
    path = "/admin/tasks/large"
    large = random_prefix(endless, 300, seed=1).to_bytes()
    larger = bytes(200_000)
    for content in (large, larger):
        status, kind, message = refusal(small.client.put(path, files={"file": ("x", content)}))
        assert (status, kind) == (413, "too_large")
        assert "max-upload-bytes" in message
    multipart = {"Content-Type": "multipart/form-data; boundary=x"}
    pieces = (bytes(10_000) for _ in range(40))
    assert refusal(small.client.put(path, content=pieces, headers=multipart))[0] in (400, 413)
    # A multipart body is a large one only where uploads are.
    answer = small.client.post("/generate", content=bytes(10_000), headers=multipart)
    assert refusal(answer)[0] == 413
    assert refusal(small.client.get(path))[0] == 404


def _with(prefix: Prefix, **fields: Any) -> bytes:
    values = {"keys": prefix.keys, "values": prefix.values, "method": prefix.method}
    return Prefix.of(**(values | fields)).to_bytes()


def _broken(prefix: Prefix, number: float) -> bytes:
    """The artefact with its last number replaced."""
    data = bytearray(prefix.to_bytes())
    data[-4:] = torch.tensor([number]).numpy().tobytes()
    return bytes(data)


def _bad_uploads(prefix: Prefix) -> dict[str, tuple[bytes, list[str]]]:
    """Uploads that must be refused, and what must be said of them."""
    keys, found = prefix.keys, list(prefix.keys.shape)
    return {
        "text": (b"hello", ["safetensors"]),
        "empty": (b"", ["empty"]),
        "truncated": (prefix.to_bytes()[:-9], ["safetensors"]),
        "a pickle": (b"\x80\x04\x95\x10\x00\x00\x00", ["pickle"]),
        "a zip, as torch.save writes": (b"PK\x03\x04" + bytes(100), ["safetensors"]),
        "another number of layers": (
            _with(prefix, keys=keys[:1], values=keys[:1]),
            ["decoder.keys", "layers", str([1, *found[1:]]), str(found)],
        ),
        "another number of heads": (
            _with(prefix, keys=keys[:, :1], values=keys[:, :1]),
            ["decoder.keys", "heads", str([found[0], 1, *found[2:]])],
        ),
        "another head size": (
            _with(prefix, keys=keys[..., :4], values=keys[..., :4]),
            ["decoder.keys", str([*found[:3], 4])],
        ),
        "too long": (
            _with(prefix, keys=keys.repeat(1, 1, 4000, 1), values=keys.repeat(1, 1, 4000, 1)),
            ["decoder.keys", "12000", str(MAX_LENGTH - 2)],
        ),
        "NaN": (_broken(prefix, float("nan")), ["decoder.values", "NaN"]),
        "Inf": (_broken(prefix, float("inf")), ["decoder.values", "Inf"]),
        "another model by fingerprint": (
            _with(prefix, fingerprint="ab" * 32, base_model="gpt2"),
            ["gpt2", "endless-llama"],
        ),
        "another model by name": (_with(prefix, base_model="gpt2"), ["gpt2", "endless-llama"]),
        **{kind: (data, [says]) for kind, (data, says) in damaged(prefix.to_bytes()).items()},
    }


def _bad_adapters(size: int) -> list[tuple[dict[str, Any], torch.Tensor, str]]:
    """Configuration and embeddings of PEFT adapters that must be refused, and words of why."""
    soft, good = {"peft_type": "PROMPT_TUNING"}, torch.ones(4, size)
    return [
        ({"peft_type": "LORA"}, good, "'LORA'; expected one of PREFIX_TUNING"),
        ({}, good, "peft_type 'None'"),
        ({"peft_type": "PREFIX_TUNING"}, good, "prompt_embeddings has shape"),
        (soft, torch.ones(4, size + 1), f"expected [4, {size}]"),
        (soft, torch.ones(MAX_LENGTH, size), f"at most {MAX_LENGTH - 2}"),
        (soft, good / 0, "Inf"),
        (soft, good.double(), "float64"),
        (soft | {"base_model_name_or_path": "gpt2"}, good, "'gpt2'"),
        (soft | {"num_virtual_tokens": 5}, good, "num_virtual_tokens 5; expected 4"),
    ]


def test_a_bad_adapter_is_422_says_why_and_stores_nothing(
    server: LiveServer, endless: LoadedModel
) -> None:
    before = server.client.get("/admin/tasks").json()
    for config, embeddings, says in _bad_adapters(endless.spec.embedding_size):
        files = [
            ("file", ("adapter_config.json", json.dumps(config).encode())),
            ("file", ("adapter_model.safetensors", save({"prompt_embeddings": embeddings}))),
        ]
        answer = server.client.put("/admin/tasks/short", files=files)
        status, error_type, message = refusal(answer)
        assert (status, error_type, says in message) == (422, "invalid_prefix", True), message
    assert server.client.get("/admin/tasks").json() == before


def test_an_upload_cut_half_way_stores_nothing(
    server: LiveServer, prefixes: dict[str, Prefix]
) -> None:
    before = server.client.get("/admin/tasks").json()
    files = {"file": ("f", prefixes["long"].to_bytes())}
    whole = server.client.build_request("PUT", "/admin/tasks/short", files=files)
    lines = [f"{name}: {value}" for name, value in whole.headers.items()]
    head = "\r\n".join(["PUT /admin/tasks/short HTTP/1.1", *lines, "", ""]).encode()
    body = whole.read()
    address = (whole.url.host, whole.url.port or 80)
    for sent in (1, len(body) // 2, len(body) - 1):
        with socket.create_connection(address, timeout=30) as connection:
            connection.sendall(head + body[:sent])
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):  # until the server has closed it too
                pass
    assert server.client.get("/admin/tasks").json() == before


def test_a_bad_upload_is_422_says_why_and_stores_nothing(
    server: LiveServer, prefixes: dict[str, Prefix]
) -> None:
    before = server.client.get("/admin/tasks").json()
    for kind, (content, words) in _bad_uploads(prefixes["short"]).items():
        for task_id in ("bad", "short"):
            answer = server.client.put(f"/admin/tasks/{task_id}", files={"file": ("f", content)})
            status, error_type, message = refusal(answer)
            assert (status, error_type) == (422, "invalid_prefix"), kind
            assert all(word in message for word in words), (kind, message)
    assert server.client.get("/admin/tasks").json() == before


@pytest.mark.parametrize(
    ("request_body", "status", "words"),
    [
        ({"files": {"document": b"x"}}, 422, "document"),
        ({"data": {"file": "x"}, "files": {"other": b"x"}}, 422, "'file'"),
        ({"files": [("file", b"x")] * 3}, 400, "2"),
        ({"content": b"x"}, 415, "multipart/form-data"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "boundary"),
        ({"json": {}}, 422, "text is missing"),
        ({"json": {"text": ""}}, 422, "text"),
        ({"json": {"text": "x", "template": "y"}}, 422, "template is not a field"),
        ({"json": {"text": "word " * 9000}}, 422, f"1 to {MAX_LENGTH - 2}"),
        ({"content": b"{", "headers": JSON}, 422, "JSON"),
    ],
)
def test_a_wrong_form_of_upload_is_refused(
    server: LiveServer, request_body: dict[str, Any], status: int, words: str
) -> None:
    found, _, message = refusal(server.client.put("/admin/tasks/bad", **request_body))
    assert (found, words in message) == (status, True), message
    assert server.client.get("/admin/tasks/bad").status_code == 404


@pytest.mark.parametrize("name", ["a b", ".hidden", "x" * 129, "é", "a\n", "\x00", "a\x7f", "a\\b"])
def test_a_wrong_task_name_is_422_everywhere(
    server: LiveServer, prefixes: dict[str, Prefix], name: str
) -> None:
    url = f"{server.url}/admin/tasks/{quote(name)}"
    upload = {"file": prefixes["short"].to_bytes()}
    answers = [
        server.client.put(url, files=upload),
        server.client.put(url, json={"text": "x"}),
        server.client.get(url),
        server.client.delete(url),
    ]
    for answer in answers:
        status, kind, message = refusal(answer)
        assert (status, kind) == (422, "validation")
        assert "task_id" in message


@pytest.mark.parametrize("name", ["a/b", "a%2Fb", "../short", "", "/", "x" * 1_000_000])
def test_a_name_that_is_no_path_segment_stores_nothing(
    server: LiveServer, prefixes: dict[str, Prefix], name: str
) -> None:
    before = server.client.get("/admin/tasks").json()
    upload = {"file": prefixes["middle"].to_bytes()}
    request = server.client.build_request("PUT", server.url, files=upload)
    # Sent as it is: a client would take `..` out.
    request.extensions["target"] = f"/admin/tasks/{name}".encode()
    answer = server.client.send(request)
    assert 400 <= answer.status_code < 500, answer.status_code
    assert server.client.get("/admin/tasks").json() == before


def test_missing_tasks_are_404(server: LiveServer) -> None:
    for method, path in (("GET", ""), ("GET", "/prefix"), ("DELETE", "")):
        answer = server.client.request(method, f"/admin/tasks/nobody{path}")
        assert refusal(answer)[:2] == (404, "not_found")


def test_refused_requests_are_counted_and_name_no_task(server: LiveServer) -> None:
    def refused(status: int) -> float:
        return server.metric("requests_total", task="other", status=str(status))

    before = refused(404), refused(422)
    for number in range(3):
        generate(server, inputs="x", task_id=f"invented-{number}")
        generate(server, inputs="", task_id=f"invented-{number}")
        generate(server, inputs=["x"], task_id=f"invented-{number}", stream=True)
    assert (refused(404), refused(422)) == (before[0] + 3, before[1] + 6)
    assert "invented" not in server.client.get("/metrics").text


def test_what_nobody_expected_is_a_500_that_tells_nothing() -> None:
    app = FastAPI()
    install_error_handlers(app)

    @app.get("/")
    async def fail() -> None:
        raise RuntimeError("a secret")

    with TestClient(app, raise_server_exceptions=False) as client:
        status, kind, message = refusal(client.get("/"))
    assert (status, kind) == (500, "internal")
    assert "secret" not in message
