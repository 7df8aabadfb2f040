"""Loading the base model: what it gives, and plain words when it cannot."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from prefix_store.errors import ModelLoadError
from prefix_store.model_loading import LoadedModel, load_base_model


def load(name: Path | str, cache_dir: Path) -> LoadedModel:
    return load_base_model(
        str(name), device=torch.device("cpu"), dtype=torch.float32, cache_dir=cache_dir
    )


@pytest.fixture
def model_dir(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A model folder to spoil."""
    return shutil.copytree(tiny_llama_dir, tmp_path / "model")


def test_loads_a_folder_frozen(model_dir: Path, tmp_path: Path) -> None:
    loaded = load(model_dir, tmp_path)

    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert (loaded.spec.num_layers, loaded.spec.num_kv_heads, loaded.spec.head_dim) == (2, 2, 16)
    assert loaded.spec.max_positions == 512
    assert loaded.tokenizer("hello").input_ids


def test_the_default_model_is_the_one_it_says(smollm2: LoadedModel) -> None:
    spec = smollm2.spec

    assert (spec.num_layers, spec.num_kv_heads, spec.head_dim) == (30, 3, 64)
    assert spec.name == "smollm2-135m"


def test_never_reads_a_pickle(model_dir: Path, tmp_path: Path) -> None:
    torch.save(load(model_dir, tmp_path).model.state_dict(), model_dir / "pytorch_model.bin")
    (model_dir / "model.safetensors").unlink()

    with pytest.raises(ModelLoadError, match=r"no file named model\.safetensors"):
        load(model_dir, tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("model.safetensors", b"x" * 100, "header too large. Expected a Hugging Face id"),
        ("config.json", b"{", "not a valid JSON file"),
        ("config.json", b'{"model_type": "nope"}', "does not recognize this architecture"),
    ],
)
def test_a_bad_folder(
    model_dir: Path, tmp_path: Path, file: str, content: bytes, says: str
) -> None:
    (model_dir / file).write_bytes(content)

    with pytest.raises(ModelLoadError, match=f"cannot load the base model '{model_dir}': .*{says}"):
        load(model_dir, tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=f"no folder with a config.json at {tmp_path}/none"):
        load(tmp_path / "none", tmp_path)
    with pytest.raises(ModelLoadError, match=f"no folder with a config.json at {tmp_path}"):
        load(tmp_path, tmp_path)
    with pytest.raises(ModelLoadError, match=f"no GGUF file at {tmp_path}/none.gguf"):
        load(tmp_path / "none.gguf", tmp_path)


@pytest.mark.parametrize("content", [b"", b"GGUFxxxx", b"nonsense" * 100])
def test_a_bad_gguf_leaves_nothing_in_the_cache(tmp_path: Path, content: bytes) -> None:
    gguf, cache_dir = tmp_path / "model.gguf", tmp_path / "cache"
    gguf.write_bytes(content)

    with pytest.raises(ModelLoadError, match=f"cannot read the GGUF file {gguf}: "):
        load(gguf, cache_dir)

    assert list(cache_dir.iterdir()) == []
