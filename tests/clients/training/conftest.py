"""Rows that a tiny model can learn, and that model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clients.data import Row
from prefix_store.model_loading import LoadedModel, load_base_model

WORDS = ("red", "green", "blue", "black", "white", "brown")


@pytest.fixture
def rows() -> list[Row]:
    """A colour, and two ways to say it."""
    return [Row(f"colour : {word}", (f"It is {word}.", f"The colour is {word}.")) for word in WORDS]


@pytest.fixture
def load_tiny(tiny_llama_dir: Path, tmp_path: Path) -> Callable[[], LoadedModel]:
    """Loads the tiny model anew, as training may change what it is given."""

    def load() -> LoadedModel:
        return load_base_model(
            str(tiny_llama_dir),
            device=torch.device("cpu"),
            dtype=torch.float32,
            cache_dir=tmp_path / "models",
        )

    return load
