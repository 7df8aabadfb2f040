"""A real server on a tiny model, and something to upload to it."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from clients import Client
from clients.cli import app
from prefix_store.prefix import Prefix
from tests.clients.blocking import blocking_client
from tests.clients.command_line import Run
from tests.server_process import ServerProcess, running_server

LAYERS, HEADS, HEAD_DIM = 2, 2, 16
MAX_UPLOAD_BYTES = 64 * 1024


@pytest.fixture(scope="session")
def real_server(
    tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """One server for all tests of the clients; each uses task names of its own."""
    flags = ("--dtype", "float32", "--no-demo-tasks", "--max-upload-bytes", str(MAX_UPLOAD_BYTES))
    with running_server(tiny_llama_dir, tmp_path_factory.mktemp("clients"), *flags) as server:
        yield server


@pytest.fixture(autouse=True)
def own_data_dir(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the clients find the key of the real server, and no key of another one."""
    folder = tmp_path
    if "real_server" in request.fixturenames:
        folder = request.getfixturevalue("real_server").data_dir
    monkeypatch.setenv("PREFIXSERVE_DATA_DIR", str(folder))


@pytest.fixture
def heard_ctrl_c() -> Iterator[None]:
    """Processes start as from a terminal: a shell's background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    """Which of the two clients."""
    kind: str = request.param
    return kind


@pytest.fixture
def real_client(kind: str, real_server: ServerProcess) -> Iterator[Client]:
    """Either client on the real server."""
    with blocking_client(kind, real_server.url) as client:
        yield client


@pytest.fixture(scope="session")
def prefix() -> Prefix:
    """A random prefix of 4 positions for the tiny model."""
    shape = (LAYERS, HEADS, 4, HEAD_DIM)
    generator = torch.Generator().manual_seed(3)
    keys, values = (2 * torch.randn(shape, generator=generator) for _ in range(2))
    return Prefix.of(keys, values, method="prefix-tuning", template="{source}!")


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as PEFT saves a trained prefix of 3 positions."""
    folder = tmp_path_factory.mktemp("adapter")
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 3,
        "num_layers": LAYERS,
        "num_attention_heads": HEADS,
        "token_dim": HEADS * HEAD_DIM,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensor = torch.randn(3, LAYERS * 2 * HEADS * HEAD_DIM)
    save_file({"prompt_embeddings": tensor}, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def run(real_server: ServerProcess) -> Run:
    """Run a command on the real server."""

    def run(*arguments: str | Path, stdin: str | bytes | None = None, **environment: str) -> Result:
        result = CliRunner().invoke(
            app,
            [str(argument) for argument in arguments],
            input=stdin,
            env={"PREFIXSERVE_URL": real_server.url, **environment},
        )
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result

    return run
