"""Every kind of prompt-like adapter, uploaded and compared with what made it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    CartridgeConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import save
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config

from prefix_store.base_model import BaseModelSpec
from prefix_store.model_loading import LoadedModel
from tests.server.adapters import saved_adapter
from tests.server.live import LiveServer, live_server

PROMPT = "Once upon a time"
NEW = 10
LENGTH = 7
COMMON: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": LENGTH}
CONFIGS: dict[str, tuple[str, PeftConfig]] = {
    "prefix": ("prefix-tuning", PrefixTuningConfig(**COMMON)),
    "projected prefix": (
        "prefix-tuning",
        PrefixTuningConfig(**COMMON, prefix_projection=True, encoder_hidden_size=16),
    ),
    "cartridge": ("cartridge", CartridgeConfig(**COMMON, num_frozen_tokens=2)),
    "prompt": ("prompt-tuning", PromptTuningConfig(**COMMON, prompt_tuning_init="RANDOM")),
    "sampled prompt": (
        "prompt-tuning",
        PromptTuningConfig(**COMMON, prompt_tuning_init="SAMPLE_VOCAB"),
    ),
    "p-tuning MLP": ("p-tuning", PromptEncoderConfig(**COMMON, encoder_hidden_size=20)),
    "p-tuning LSTM": (
        "p-tuning",
        PromptEncoderConfig(
            **COMMON, encoder_hidden_size=20, encoder_reparameterization_type="LSTM"
        ),
    ),
}


def tiny_gpt2(smollm2: LoadedModel) -> LoadedModel:
    """A random GPT-2 with the real tokenizer, whose learned positions a soft prompt takes up."""
    torch.manual_seed(13)
    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=smollm2.model.config.vocab_size,
        n_positions=128,
        initializer_range=0.2,
        eos_token_id=None,
        bos_token_id=1,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    spec = BaseModelSpec.from_model(model, "tiny-gpt2")
    return LoadedModel(model, smollm2.tokenizer, spec)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def tiny_served(
    request: pytest.FixtureRequest,
    endless: LoadedModel,
    smollm2: LoadedModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[LiveServer, LoadedModel]]:
    """A server of a tiny random model of each shape, and that model."""
    loaded = endless if request.param == "llama" else tiny_gpt2(smollm2)
    with live_server(loaded, tmp_path_factory.mktemp("adapters")) as server:
        yield server, loaded


def peft_adapter(
    loaded: LoadedModel, config: PeftConfig, folder: Path
) -> tuple[list[tuple[str, tuple[str, bytes]]], list[int]]:
    """An adapter's two files, as PEFT saves them, and the tokens that PEFT generates with it."""
    torch.manual_seed(3)
    adapted = get_peft_model(copy.deepcopy(loaded.model), copy.deepcopy(config))
    prompt = loaded.tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        output = adapted.eval().generate(**prompt, max_new_tokens=NEW, do_sample=False)
    new = output[0, prompt["input_ids"].shape[1] :].tolist()
    return saved_adapter(adapted, loaded, folder), new


def uploaded(server: LiveServer, task_id: str, files: Any) -> dict[str, Any]:
    """The answer of an upload, which must succeed."""
    answer = server.client.put(f"/admin/tasks/{task_id}", files=files)
    assert answer.status_code == 201, answer.text
    task: dict[str, Any] = answer.json()
    return task


def tokens(server: LiveServer, task_id: str | None) -> list[int]:
    found = server.generate(PROMPT, task_id, max_new_tokens=NEW, details=True)
    return [token["id"] for token in found["details"]["tokens"]]


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_peft_adapter_generates_what_peft_does(
    tiny_served: tuple[LiveServer, LoadedModel], kind: str, tmp_path: Path
) -> None:
    server, loaded = tiny_served
    method, config = CONFIGS[kind]
    files, expected = peft_adapter(loaded, config, tmp_path)

    task = uploaded(server, "adapter", files)

    assert (task["method"], task["prefix_length"]) == (method, LENGTH)
    assert task["base_model"] == loaded.spec.name
    assert tokens(server, "adapter") == expected
    assert tokens(server, None) != expected


@pytest.mark.parametrize("kind", ["prompt", "sampled prompt", "p-tuning MLP"])
def test_soft_prompts_of_the_real_model_generate_what_peft_does(
    smollm2: LoadedModel, real_server: LiveServer, kind: str, tmp_path: Path
) -> None:
    files, expected = peft_adapter(smollm2, CONFIGS[kind][1], tmp_path)

    uploaded(real_server, "adapter", files)

    assert tokens(real_server, "adapter") == expected


@pytest.fixture(scope="module")
def real_server(
    smollm2: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """A server of SmolLM2 in float32."""
    with live_server(smollm2, tmp_path_factory.mktemp("real")) as server:
        yield server


class PrefixEncoder(torch.nn.Module):
    """P-tuning v2's, by its names."""

    def __init__(self, columns: int, inner: int | None) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(LENGTH, 12 if inner else columns)
        if inner:
            self.trans = torch.nn.Sequential(
                torch.nn.Linear(12, inner), torch.nn.Tanh(), torch.nn.Linear(inner, columns)
            )

    def forward(self) -> torch.Tensor:
        weight = self.embedding.weight
        return self.trans(weight) if hasattr(self, "trans") else weight


@torch.inference_mode()
def by_hand(loaded: LoadedModel, matrix: torch.Tensor) -> list[int]:
    """Greedy tokens with each layer's columns cut out one head after another."""
    spec, cache, at = loaded.spec, DynamicCache(), 0
    for layer in range(spec.num_layers):
        parts = []
        for _ in ("keys", "values"):
            heads = []
            for _ in range(spec.num_kv_heads):
                heads.append(matrix[:, at : at + spec.head_dim])
                at += spec.head_dim
            parts.append(torch.stack(heads)[None])
        cache.update(*parts, layer)
    ids = torch.tensor([[0] * LENGTH + loaded.tokenizer(PROMPT)["input_ids"]])
    output = loaded.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=NEW,
        do_sample=False,
    )
    new: list[int] = output[0, ids.shape[1] :].tolist()
    return new


@pytest.mark.parametrize("inner", [None, 20], ids=["direct", "projected"])
@pytest.mark.parametrize("holder", ["", "transformer."])
def test_ptuning_v2_generates_what_its_keys_and_values_do(
    tiny_served: tuple[LiveServer, LoadedModel], inner: int | None, holder: str
) -> None:
    server, loaded = tiny_served
    spec = loaded.spec
    torch.manual_seed(5)
    encoder = PrefixEncoder(spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim, inner)
    state = {f"{holder}prefix_encoder.{n}": t for n, t in encoder.state_dict().items()}

    task = uploaded(server, "v2", {"file": ("prefix_encoder.safetensors", save(state))})

    assert (task["method"], task["prefix_length"]) == ("p-tuning-v2", LENGTH)
    with torch.inference_mode():
        matrix = encoder()
    assert tokens(server, "v2") == by_hand(loaded, matrix)
