"""Two real server processes on one store, as `deploy/` runs them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.prefix_store.servers import HOST, valkey
from tests.server_process import ServerProcess, running_server

PREFIX_BYTES = 2048  # of 4 positions, 2 layers, 2 heads, 16 numbers of 4 bytes, keys and values
ROOM = 10
"""Prefixes that each replica's cache has room for."""


@pytest.fixture(scope="session")
def replicas(
    tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[ServerProcess]]:
    """Two servers on one Valkey; their keys are in files of the first one's folder."""
    folder = tmp_path_factory.mktemp("replicas")
    with ExitStack() as opened:
        port = opened.enter_context(valkey(folder / "valkey"))
        flags = ("--dtype", "float32", "--redis-url", f"redis://{HOST}:{port}")
        flags += ("--prefix-cache-bytes", str(ROOM * PREFIX_BYTES))
        for name in ("admin", "metrics"):
            flags += (f"--{name}-key-file", str(folder / "one" / f"{name}.key"))

        def start(name: str) -> ServerProcess:
            return opened.enter_context(running_server(tiny_llama_dir, folder / name, *flags))

        with ThreadPoolExecutor(2) as threads:  # they start together
            servers = list(threads.map(start, ("one", "two")))
        yield servers


@pytest.fixture(scope="session")
def key(replicas: list[ServerProcess]) -> str:
    """The operator's, at both servers."""
    return replicas[0].key
