"""vLLM's calls to load and unload adapters, and what they must never open."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from peft import PrefixTuningConfig, get_peft_model

from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from tests.server.adapters import saved_adapter
from tests.server.live import LiveServer, live_server

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def folder(
    endless: LoadedModel, prefixes: dict[str, Prefix], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder of adapters beside one with what is nobody's business."""
    outside = tmp_path_factory.mktemp("outside")
    artefact = prefixes["short"].to_bytes()
    (outside / "secret.safetensors").write_bytes(artefact)
    root = outside / "adapters"
    for name in ("artefact", "nested/deeper", "empty", "two", "linked-file", "fifo", "large"):
        (root / name).mkdir(parents=True)
    for name in ("artefact/prefix", "nested/deeper/prefix", "two/one", "two/other"):
        (root / f"{name}.safetensors").write_bytes(artefact)
    (root / "linked-file" / "prefix.safetensors").symlink_to(outside / "secret.safetensors")
    (root / "linked-folder").symlink_to(outside)
    (root / "inside").symlink_to(root / "artefact")
    os.mkfifo(root / "fifo" / "prefix.safetensors")
    (root / "large" / "prefix.safetensors").write_bytes(bytes(2 << 20))
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapted = get_peft_model(copy.deepcopy(endless.model), config)
    for _, (name, content) in saved_adapter(adapted, endless, root / "peft"):
        (root / "peft" / name).write_bytes(content)
    return root


@pytest.fixture(scope="module")
def loading(
    endless: LoadedModel, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """A server that may load them."""
    flags = ["--adapter-dir", str(folder), "--max-upload-bytes", "1MiB"]
    flags += ["--audit-log", str(folder.parent / "audit.jsonl")]
    with live_server(endless, tmp_path_factory.mktemp("loading"), *flags) as server:
        yield server


def load(server: LiveServer, name: str, path: str, **more: bool) -> httpx.Response:
    body = {"lora_name": name, "lora_path": path} | more
    return server.client.post("/v1/load_lora_adapter", json=body)


def unload(server: LiveServer, name: str) -> httpx.Response:
    return server.client.post("/v1/unload_lora_adapter", json={"lora_name": name})


@pytest.mark.parametrize("path", ["artefact", "peft", "nested/deeper", "inside", "absolute"])
def test_an_adapter_is_loaded_named_and_unloaded(
    loading: LiveServer, folder: Path, path: str
) -> None:
    where = str(folder / "peft") if path == "absolute" else path
    answer = load(loading, "adapter", where)
    assert answer.status_code == httpx.codes.OK, answer.text
    assert answer.text == "Success: LoRA adapter 'adapter' added successfully."
    assert "adapter" in {m["id"] for m in loading.client.get("/v1/models").json()["data"]}
    body = {"model": "adapter", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    found = loading.client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert found == loading.generate(PROMPT, "adapter", max_new_tokens=4)["generated_text"]
    again = load(loading, "adapter", where)
    assert again.status_code == httpx.codes.BAD_REQUEST
    assert "has already been loaded" in again.json()["error"]["message"]
    assert load(loading, "adapter", where, load_inplace=True).status_code == httpx.codes.OK
    gone = unload(loading, "adapter")
    assert gone.text == "Success: LoRA adapter 'adapter' removed successfully."
    answer = unload(loading, "adapter")
    assert answer.status_code == httpx.codes.NOT_FOUND
    assert answer.json()["error"]["code"] == "model_not_found"
    lines = (folder.parent / "audit.jsonl").read_text().splitlines()[-5:]
    audited = [(entry["task"], entry["status"]) for entry in map(json.loads, lines)]
    assert audited == [("adapter", status) for status in (200, 400, 200, 200, 404)]


@pytest.mark.parametrize(
    "path",
    [
        "..",
        ".",
        "../adapters/../..",
        "artefact/../../",
        "/etc",
        "/",
        "linked-folder",
        "linked-folder/adapters/../",
        "linked-file",
        "nothing",
        "nul\0byte",
        "x" * 4096,
    ],
    ids=lambda path: path[:20].replace("\0", "0"),
)
def test_what_is_not_below_the_folder_is_as_if_it_were_not_there(
    loading: LiveServer, path: str
) -> None:
    answer = load(loading, "adapter", path)
    assert answer.status_code == httpx.codes.BAD_REQUEST, answer.text
    assert "there is no adapter at" in answer.json()["error"]["message"]
    assert loading.client.get("/v1/models/adapter").status_code == httpx.codes.NOT_FOUND


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("empty", 400, "has 0 files"),
        ("two", 400, "has 2 files"),
        ("fifo", 400, "not a regular file"),
        ("large", 413, "over this server's limit"),
        ("", 400, "must be provided"),
    ],
)
def test_what_is_no_adapter_is_refused(
    loading: LiveServer, path: str, status: int, says: str
) -> None:
    answer = load(loading, "adapter", path)
    assert answer.status_code == status, answer.text
    assert says in answer.json()["error"]["message"]


def test_the_base_models_name_is_taken(loading: LiveServer, endless: LoadedModel) -> None:
    answer = load(loading, endless.spec.name, "artefact")
    assert answer.status_code == httpx.codes.BAD_REQUEST
    assert "conflicts" in answer.json()["error"]["message"]


def test_loading_is_off_by_default(server: LiveServer) -> None:
    answer = load(server, "adapter", "artefact")
    assert answer.status_code == httpx.codes.NOT_FOUND
    assert unload(server, "middle").status_code == httpx.codes.NOT_FOUND
    assert server.client.get("/v1/models/middle").status_code == httpx.codes.OK
