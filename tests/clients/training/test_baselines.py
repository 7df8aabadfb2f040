"""What prefixes are compared with trains too, and is written as others read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

from clients import TrainingError
from clients.data import Row
from clients.training import Trained, TrainSettings, train
from clients.training.bottleneck import Bottleneck, add_bottlenecks
from prefix_store.model_loading import LoadedModel
from prefix_store.upload import read_upload
from prefix_store.validate import check_fits
from tests.conftest import tiny_model

Load = Callable[[], LoadedModel]
IDS = torch.tensor([[5, 6, 7, 8]])
SETTINGS: dict[str, Any] = {"batch_size": 4, "max_steps": 8, "prefix_length": 3}


def trained_with(method: Any, loaded: LoadedModel, rows: Sequence[Row], folder: Path) -> Trained:
    """A few steps that lower the loss."""
    settings = TrainSettings(method=method, learning_rate=0.01, dtype="float32", **SETTINGS)
    trained = train(settings, loaded, rows, folder, dev=rows)
    assert trained.prefix is None
    return trained


def test_finetuning_writes_a_whole_model(
    load_tiny: Load, rows: Sequence[Row], tmp_path: Path
) -> None:
    loaded, before = load_tiny(), load_tiny()
    trained = trained_with("finetune", loaded, rows, tmp_path / "run")
    assert trained.parameters == loaded.model.num_parameters()
    model = AutoModelForCausalLM.from_pretrained(trained.path)
    torch.testing.assert_close(model(IDS).logits, loaded.model(IDS).logits)
    assert not torch.allclose(model(IDS).logits, before.model(IDS).logits)


def test_lora_writes_a_peft_adapter(load_tiny: Load, rows: Sequence[Row], tmp_path: Path) -> None:
    loaded, before = load_tiny(), load_tiny().model
    trained = trained_with("lora", loaded, rows, tmp_path / "run")
    plain = before(IDS).logits
    adapted = PeftModel.from_pretrained(before, trained.path)
    torch.testing.assert_close(adapted(IDS).logits, loaded.model(IDS).logits)
    assert not torch.allclose(adapted(IDS).logits, plain)


def test_prompt_tuning_writes_a_peft_adapter(
    load_tiny: Load, rows: Sequence[Row], tmp_path: Path
) -> None:
    loaded = load_tiny()
    # An alias, as of the default model, whose weights are in a folder of another name.
    loaded = replace(loaded, spec=replace(loaded.spec, name="an-alias"))
    trained = trained_with("prompt-tuning", loaded, rows, tmp_path / "run")
    assert trained.parameters == 3 * loaded.spec.embedding_size
    saved = load_file(trained.path / "adapter_model.safetensors")
    start = loaded.model.get_input_embeddings()(
        torch.tensor(loaded.tokenizer.encode("colour : red")[:3])
    )
    names = ("adapter_config.json", "adapter_model.safetensors")  # what a client sends of a folder
    files = [(name, (trained.path / name).read_bytes()) for name in names]
    check_fits(read_upload(files, loaded.spec), loaded.spec, 3)
    moved = (saved["prompt_embeddings"] - start).abs().max()
    assert 0 < moved < 0.1
    assert isinstance(loaded.model(IDS, use_cache=True).past_key_values, DynamicCache)


def test_adapters_write_what_is_beside_the_model(
    load_tiny: Load, rows: Sequence[Row], tmp_path: Path
) -> None:
    loaded, before = load_tiny(), load_tiny()
    trained = trained_with("adapter", loaded, rows, tmp_path / "run")
    saved = load_file(trained.path)
    assert sum(tensor.numel() for tensor in saved.values()) == trained.parameters
    added = add_bottlenecks(before.model, 16)
    added.load_state_dict({name.removeprefix("adapters."): t for name, t in saved.items()})
    torch.testing.assert_close(before.model(IDS).logits, loaded.model(IDS).logits)


@pytest.mark.parametrize("shape", ["llama", "gpt2", "qwen2", "gpt_neox"])
def test_bottlenecks_hardly_change_the_model_at_first(shape: str) -> None:
    loaded = tiny_model(shape)
    plain = loaded.model(IDS).logits
    added = add_bottlenecks(loaded.model, 4)
    assert len(added) == 2 * loaded.spec.num_layers
    torch.testing.assert_close(loaded.model(IDS).logits, plain, atol=1e-2, rtol=1e-2)
    for bottleneck in added:
        assert isinstance(bottleneck, Bottleneck)
        torch.nn.init.normal_(bottleneck.up.bias)
    assert not torch.allclose(loaded.model(IDS).logits, plain, atol=1e-2, rtol=1e-2)


def test_model_with_other_names_for_its_parts_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"OPTForCausalLM has 2 parts named .* expected 4"):
        add_bottlenecks(tiny_model("opt").model, 4)
