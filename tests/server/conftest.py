"""A tiny model that never ends a text by itself, and a server that runs it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from prefix_store.model_loading import LoadedModel, load_base_model
from prefix_store.prefix import Prefix
from tests.engine.reference import random_prefix
from tests.server.live import LiveServer, live_server

MAX_LENGTH = 8192
"""Room for a request that runs for many seconds unless it is stopped."""


@pytest.fixture(scope="session")
def endless_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with many positions and no end-of-text token."""
    folder = tmp_path_factory.mktemp("endless") / "endless-llama"
    shutil.copytree(tiny_llama_dir, folder)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        settings["eos_token_id"] = None
        if name == "config.json":
            settings["max_position_embeddings"] = MAX_LENGTH
        (folder / name).write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def endless(endless_dir: Path) -> LoadedModel:
    """That model, loaded."""
    return load_base_model(
        str(endless_dir), device=torch.device("cpu"), dtype=torch.float32, cache_dir=endless_dir
    )


@pytest.fixture(scope="session")
def prefixes(endless: LoadedModel) -> dict[str, Prefix]:
    """A prefix for each of three tasks."""
    return {
        name: random_prefix(endless, length, seed=length)
        for name, length in (("short", 3), ("middle", 8), ("long", 21))
    }


@pytest.fixture(scope="module")
def server(
    endless: LoadedModel, prefixes: dict[str, Prefix], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """A server with the three tasks."""
    flags = ["--max-length", str(MAX_LENGTH), "--max-slots", "16"]
    with live_server(endless, tmp_path_factory.mktemp("data"), *flags) as server:
        for task_id, prefix in prefixes.items():
            server.upload(task_id, prefix)
        yield server
