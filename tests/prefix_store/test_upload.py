"""Uploads: what PEFT saved is what it feeds the model, and anything else is refused plainly."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from peft import (
    CartridgeConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
)
from safetensors.torch import save

from prefix_store.errors import IncompatiblePrefixError, InvalidPrefixError
from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from prefix_store.upload import read_upload
from tests.prefix_store.examples import HEAD_DIM, HEADS, LAYERS, LENGTH, SPEC, a_prefix, artefact

CONFIGS = {
    "prefix-tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7),
    "projected": PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=7, prefix_projection=True, encoder_hidden_size=16
    ),
    "cartridge": CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=7, num_frozen_tokens=2),
}


def saved(model: LoadedModel, config: PeftConfig, folder: Path) -> PeftModel:
    """A PEFT model with random weights, saved to `folder`."""
    adapted = get_peft_model(copy.deepcopy(model.model), copy.deepcopy(config))
    adapted.save_pretrained(folder)
    return adapted


def pair(folder: Path) -> list[tuple[str, bytes]]:
    names = ("adapter_config.json", "adapter_model.safetensors")
    return [(name, (folder / name).read_bytes()) for name in names]


@pytest.mark.parametrize("kind", CONFIGS)
def test_imports_the_keys_and_values_that_peft_feeds_the_model(
    tiny: LoadedModel, kind: str, tmp_path: Path
) -> None:
    fed = saved(tiny, CONFIGS[kind], tmp_path).get_prompt(batch_size=1)

    for files in (pair(tmp_path), pair(tmp_path)[::-1]):
        prefix = read_upload(files, tiny.spec)

        assert prefix.method == ("cartridge" if kind == "cartridge" else "prefix-tuning")
        for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            assert torch.equal(keys, fed.layers[layer].keys[0])
            assert torch.equal(values, fed.layers[layer].values[0])
        assert Prefix.from_bytes(prefix.to_bytes()).prefix_length == 7


def test_refuses_another_kind_of_adapter(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    saved(tiny_llama, LoraConfig(task_type="CAUSAL_LM"), tmp_path)

    with pytest.raises(
        InvalidPrefixError, match="peft_type 'LORA'; expected PREFIX_TUNING or CARTRIDGE"
    ):
        read_upload(pair(tmp_path), tiny_llama.spec)


def test_reads_an_artefact_of_ours() -> None:
    prefix = a_prefix(template="{source}\n")

    assert read_upload([("x", prefix.to_bytes())], SPEC).to_bytes() == prefix.to_bytes()


COLUMNS = LAYERS * 2 * HEADS * HEAD_DIM
PEFT = {
    "peft_type": "PREFIX_TUNING",
    "task_type": "CAUSAL_LM",
    "num_layers": LAYERS,
    "num_attention_heads": HEADS,
    "token_dim": HEADS * HEAD_DIM,
    "num_virtual_tokens": LENGTH,
    "num_transformer_submodules": 1,
    "base_model_name_or_path": "org/Base-Model",
}
GOOD = torch.ones(LENGTH, COLUMNS)


def adapter(tensor: torch.Tensor = GOOD, **config: object) -> list[tuple[str, bytes]]:
    """A PEFT adapter written by hand, so that it may be wrong in one place."""
    return [
        ("adapter_config.json", json.dumps(PEFT | config).encode()),
        ("adapter_model.safetensors", save({"prompt_embeddings": tensor})),
    ]


def test_the_hand_written_adapter_is_good() -> None:
    prefix = read_upload(adapter(), SPEC)

    assert prefix.prefix_length == LENGTH
    assert prefix.base_model == "org/Base-Model"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        pytest.param([], "found no file; expected one prefix artefact, or both", id="nothing"),
        pytest.param(adapter()[:1], "JSON without tensors; upload both", id="config alone"),
        pytest.param(adapter()[1:], "one half of a PEFT adapter; upload both", id="weights alone"),
        pytest.param(adapter()[:1] * 2, "expected one prefix artefact", id="two configs"),
        pytest.param(adapter()[1:] * 2, "expected one prefix artefact", id="two weights"),
        pytest.param(adapter() * 2, "expected one prefix artefact", id="four files"),
        pytest.param([("a", artefact()), ("b", artefact())], "found 'a', 'b'", id="two artefacts"),
        pytest.param(
            [adapter()[0], ("x", artefact())], "expected exactly 'prompt_emb", id="no pair"
        ),
        pytest.param(
            [adapter()[0], ("adapter_model.bin", pickle.dumps({"a": 1}))],
            "'adapter_model.bin' is not safetensors: it looks like a Python pickle",
            id="pickle in a pair",
        ),
        pytest.param(
            [("p.pt", b"PK\x03\x04" + bytes(50))], "'p.pt' is not safetensors: .* zip", id="zip"
        ),
        pytest.param([("a", b'{"peft_type"')], "JSON without tensors", id="half a config"),
        pytest.param([("a", b'{"peft"'), adapter()[1]], "is not JSON", id="half a config, pair"),
        pytest.param(
            [("a", b'{"a":' * 20_000), adapter()[1]], "100000 bytes; .* 65536", id="large config"
        ),
        pytest.param([("a", b'{"a":' * 9_000), adapter()[1]], "is not JSON", id="deep config"),
        pytest.param(adapter(peft_type=["x"]), "peft_type .* expected PREFIX", id="type a list"),
        pytest.param(adapter(peft_type=None), "peft_type 'None'", id="no type"),
        pytest.param(
            adapter(num_transformer_submodules=2, task_type="SEQ_2_SEQ_LM"),
            "encoder-decoder .* 'SEQ_2_SEQ_LM'.* expected CAUSAL_LM",
            id="encoder-decoder",
        ),
        pytest.param(adapter(base_model_name_or_path=[1]), "base_model is", id="name a list"),
        pytest.param(adapter(GOOD[0]), r"prompt_embeddings has shape \[48\]", id="one dimension"),
        pytest.param(adapter(GOOD.double()), "prompt_embeddings has dtype float64", id="float64"),
        pytest.param(adapter(GOOD / 0), "prompt_embeddings holds Inf", id="Inf"),
        pytest.param(
            [adapter()[0], ("w", save({"prompt_embeddings": GOOD, "more": GOOD + 0}))],
            "holds the tensors 'more', 'prompt_embeddings'; expected exactly",
            id="tensor too many",
        ),
    ],
)
def test_refuses(files: list[tuple[str, bytes]], says: str) -> None:
    with pytest.raises(InvalidPrefixError, match=says):
        read_upload(files, SPEC)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        pytest.param(adapter(num_layers=9), "num_layers 9; expected 2", id="layers"),
        pytest.param(adapter(num_attention_heads=9), "num_attention_heads 9; .* 3", id="heads"),
        pytest.param(adapter(token_dim=9), "token_dim 9; expected 12", id="width"),
        pytest.param(adapter(num_virtual_tokens=9), "num_virtual_tokens 9; .* 5", id="length"),
        pytest.param(
            adapter(torch.ones(LENGTH, 7)),
            r"prompt_embeddings has shape \[5, 7\]; expected \[5, 48\] .* 2 layers x 2 x 3",
            id="columns",
        ),
    ],
)
def test_refuses_other_sizes(files: list[tuple[str, bytes]], says: str) -> None:
    with pytest.raises(IncompatiblePrefixError, match=says):
        read_upload(files, SPEC)
