"""Every operation of /openapi.json, with requests made from its own description."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from server.api.authentication import OPEN_PATHS
from tests.server.live import LiveServer, live_server

CONFIG = Path(__file__).with_name("schemathesis.toml")
# Bodies with thousands of combinations; and what takes the same parameters as other operations.
LEFT_OUT = (
    "^/(generate|generate_stream|tokenize|v1/completions|v1/chat/completions|)$"
    "|^/admin/tasks/{task_id}/(activate|rollback|split|versions.*)$"
)
SECONDS = 250


@pytest.fixture(scope="module")
def guarded(
    endless: LoadedModel, prefixes: dict[str, Prefix], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """A server that asks for keys and has all the calls there are."""
    folder = tmp_path_factory.mktemp("adapters")
    flags = ["--max-length", "64", "--max-slots", "16", "--adapter-dir", str(folder)]
    with live_server(endless, tmp_path_factory.mktemp("guarded"), *flags, auth=True) as server:
        server.upload("e2e", prefixes["short"])
        yield server


def schemathesis(server: LiveServer, folder: Path, *flags: str) -> None:
    """Run its command line; requests that every run makes alike, and one at a time."""
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run"]
    command += [f"{server.url}/openapi.json", "--no-color", "--generation-deterministic"]
    done = subprocess.run(
        [*command, "--no-shrink", "--workers", "1", *flags],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]


def key_of(server: LiveServer) -> list[str]:
    return ["--header", f"Authorization: {server.client.headers['Authorization']}"]


def test_every_operation_keeps_to_its_description(guarded: LiveServer, tmp_path: Path) -> None:
    flags = ["--phases", "examples,fuzzing", "--max-examples", "2"]
    schemathesis(guarded, tmp_path, *key_of(guarded), *flags)


def test_what_is_missing_wrong_or_at_a_bound(guarded: LiveServer, tmp_path: Path) -> None:
    """Parameter by parameter, and methods that there are not."""
    flags = ["--phases", "coverage", "--exclude-path-regex", LEFT_OUT]
    schemathesis(guarded, tmp_path, *key_of(guarded), *flags)


def test_without_a_key_it_is_401_as_described(guarded: LiveServer, tmp_path: Path) -> None:
    schemathesis(guarded, tmp_path, "--phases", "examples,fuzzing", "--max-examples", "1")
    paths = httpx.get(f"{guarded.url}/openapi.json").json()["paths"]
    for path, operations in paths.items():
        for method in operations:
            answer = httpx.request(method, f"{guarded.url}{path}")
            assert answer.status_code == (200 if path in OPEN_PATHS else 401), path
