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

from prefix_store.artefact import Artefact
from prefix_store.base_model import BaseModelSpec
from prefix_store.errors import IncompatiblePrefixError, InvalidPrefixError
from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix, version_of
from prefix_store.soft_prompt import SoftPrompt
from prefix_store.upload import read_upload
from tests.prefix_store.examples import (
    EMBEDDING,
    HEAD_DIM,
    HEADS,
    LAYERS,
    LENGTH,
    SPEC,
    a_prefix,
    artefact,
)

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


def prefix_of(files: list[tuple[str, bytes]], spec: BaseModelSpec) -> Prefix:
    """An upload that needs no model."""
    upload = read_upload(files, spec)
    assert isinstance(upload, Artefact)
    assert upload.version == version_of(upload.data)
    assert Prefix.from_bytes(upload.data).prefix_length == upload.prefix.prefix_length
    return upload.prefix


@pytest.mark.parametrize("kind", CONFIGS)
def test_imports_the_keys_and_values_that_peft_feeds_the_model(
    tiny: LoadedModel, kind: str, tmp_path: Path
) -> None:
    fed = saved(tiny, CONFIGS[kind], tmp_path).get_prompt(batch_size=1)

    for files in (pair(tmp_path), pair(tmp_path)[::-1]):
        prefix = prefix_of(files, tiny.spec)

        assert prefix.method == ("cartridge" if kind == "cartridge" else "prefix-tuning")
        for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            assert torch.equal(keys, fed.layers[layer].keys[0])
            assert torch.equal(values, fed.layers[layer].values[0])
        assert Prefix.from_bytes(prefix.to_bytes()).prefix_length == 7


def test_refuses_another_kind_of_adapter(tiny_llama: LoadedModel, tmp_path: Path) -> None:
    saved(tiny_llama, LoraConfig(task_type="CAUSAL_LM"), tmp_path)

    with pytest.raises(
        InvalidPrefixError, match="peft_type 'LORA'; expected one of PREFIX_TUNING, CARTRIDGE"
    ):
        read_upload(pair(tmp_path), tiny_llama.spec)


def test_reads_an_artefact_of_ours() -> None:
    prefix = a_prefix(template="{source}\n")

    assert prefix_of([("x", prefix.to_bytes())], SPEC).to_bytes() == prefix.to_bytes()


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
    prefix = prefix_of(adapter(), SPEC)

    assert prefix.prefix_length == LENGTH
    assert prefix.base_model == "org/Base-Model"


SOFT = {"peft_type": "PROMPT_TUNING", "token_dim": EMBEDDING, "num_attention_heads": 9}
EMBEDDED = torch.ones(LENGTH, EMBEDDING)


def test_embeddings_are_left_for_the_model_to_read() -> None:
    prompt = read_upload(adapter(EMBEDDED, **SOFT), SPEC)

    assert isinstance(prompt, SoftPrompt)
    assert torch.equal(prompt.embeddings, EMBEDDED)
    assert (prompt.method, prompt.base_model) == ("prompt-tuning", "org/Base-Model")


ENCODER = "prefix_encoder.embedding.weight"
TRANS = {
    ENCODER: torch.ones(LENGTH, 6),
    "prefix_encoder.trans.0.weight": torch.ones(8, 6),
    "prefix_encoder.trans.0.bias": torch.ones(8),
    "prefix_encoder.trans.2.weight": torch.ones(COLUMNS, 8),
    "prefix_encoder.trans.2.bias": torch.ones(COLUMNS),
}


def encoder(tensor: torch.Tensor | None, layer: str) -> list[tuple[str, bytes]]:
    """A projected prefix encoder of P-tuning v2 with one tensor changed or left out."""
    changed = TRANS | {f"prefix_encoder.trans.{layer}": tensor}
    return [("x", save({name: t for name, t in changed.items() if t is not None}))]


def test_the_hand_written_encoder_is_good() -> None:
    prefix = prefix_of([("x", save(TRANS))], SPEC)

    assert (prefix.method, prefix.keys.shape) == ("p-tuning-v2", (LAYERS, HEADS, LENGTH, HEAD_DIM))


@pytest.mark.parametrize(
    ("files", "says"),
    [
        pytest.param(adapter(EMBEDDED[0], **SOFT), "shape .24.; .* 2 dim", id="soft, flat"),
        pytest.param(adapter(EMBEDDED.long(), **SOFT), "dtype int64", id="soft, whole numbers"),
        pytest.param(adapter(EMBEDDED / 0, **SOFT), "holds Inf", id="soft, Inf"),
        pytest.param(
            adapter(EMBEDDED[:0], **SOFT, num_virtual_tokens=0),
            "none of them 0",
            id="soft, no positions",
        ),
        pytest.param(
            adapter(EMBEDDED, **SOFT, base_model_name_or_path="x" * 300),
            "base_model is 'xxx.*256",
            id="soft, long name",
        ),
        pytest.param(
            [("c", b'{"peft_type": 1, "peft_type": "P_TUNING"}'), adapter()[1]],
            "has the key 'peft_type' twice",
            id="a key twice",
        ),
        pytest.param(encoder(None, "0.bias"), "holds 4 tensors; expected", id="v2, no bias"),
        pytest.param(
            [("x", save({ENCODER: GOOD, "bert.weight": GOOD + 0}))],
            "2 tensors; .* without the model around it",
            id="v2, with its model",
        ),
        pytest.param(
            encoder(torch.ones(8), "0.weight"), "trans.0.weight .* 2 dimens", id="v2, no matrix"
        ),
        pytest.param(encoder(torch.ones(COLUMNS) / 0, "2.bias"), "bias holds Inf", id="v2, Inf"),
        pytest.param(
            [("x", save({ENCODER: GOOD.double()}))], "weight has dtype float64", id="v2, float64"
        ),
        pytest.param([], "found no file; expected one prefix artefact, both", id="nothing"),
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
        pytest.param(
            adapter(peft_type=["x"]), "peft_type .* expected one of PREFIX", id="type a list"
        ),
        pytest.param(adapter(peft_type=None), "peft_type 'None'", id="no type"),
        pytest.param(
            adapter(num_transformer_submodules=2, task_type="SEQ_2_SEQ_LM"),
            "task_type 'SEQ_2_SEQ_LM'; expected CAUSAL_LM, as the base model",
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
        pytest.param(adapter(EMBEDDED, **SOFT | {"token_dim": 9}), "token_dim 9; .* 24", id="soft"),
        pytest.param(
            [("x", save({ENCODER: GOOD[:, :7].contiguous()}))],
            r"embedding.weight has shape \[5, 7\]; expected \[5, 48\]",
            id="v2, columns",
        ),
        pytest.param(
            encoder(torch.ones(8, 7), "0.weight"),
            r"shapes \[\(8, 7\).* expected \[\(8, 6\)",
            id="v2, inner",
        ),
        pytest.param(
            encoder(torch.ones(9), "2.bias"), r"\(9,\)\]; expected .*\(48,\)", id="v2, outer"
        ),
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
