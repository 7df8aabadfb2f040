"""A server of an encoder-decoder model: its tasks, and what it refuses."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from httpx_sse import connect_sse
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from peft import PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save
from transformers import AutoModelForSeq2SeqLM

from prefix_store.groups import CROSS, DECODER, ENCODER, GROUPS
from prefix_store.model_loading import LoadedModel, load_base_model
from prefix_store.prefix import METADATA_KEY, Prefix
from server.engine.grammar import llguidance_grammar
from server.engine.protocol import Grammar
from tests.conftest import TINY_ENCODER_DECODERS
from tests.engine.seq2seq_reference import greedy, random_groups
from tests.server.adapters import saved_adapter
from tests.server.live import LiveServer, live_server

NEW = 12
SOURCE = "Once upon a time there was a fox"
# PEFT wants as many layers and heads in the decoder as in the encoder.
EQUAL = {
    "bart": {"decoder_layers": 3, "decoder_attention_heads": 4},
    "t5": {"d_kv": 8, "num_heads": 4},
}


@pytest.fixture(scope="module", params=sorted(EQUAL))
def loaded(
    request: pytest.FixtureRequest, smollm2: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> LoadedModel:
    """A tiny random model of each shape, never ending a text, with the real tokenizer."""
    folder = tmp_path_factory.mktemp("models") / f"tiny-{request.param}"
    torch.manual_seed(17)
    config = copy.deepcopy(TINY_ENCODER_DECODERS[request.param])
    sizes = {"vocab_size": smollm2.model.config.vocab_size, "eos_token_id": None}
    for name, value in (sizes | EQUAL[request.param]).items():
        setattr(config, name, value)
    model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    with torch.no_grad():  # so that no text says the same all the time
        for weight in (parameter for parameter in model.parameters() if parameter.ndim > 1):
            weight.normal_(0, 0.3)
    model.save_pretrained(folder)
    smollm2.tokenizer.save_pretrained(folder)
    return load_base_model(
        str(folder), device=torch.device("cpu"), dtype=torch.float32, cache_dir=folder
    )


@pytest.fixture(scope="module")
def served(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that runs it."""
    with live_server(loaded, tmp_path_factory.mktemp("data")) as server:
        yield server


def ids_of(answer: Any) -> list[int]:
    return [token["id"] for token in answer["details"]["tokens"]]


def alone(loaded: LoadedModel, prefix: Prefix | None, source: str) -> list[int]:
    ids = tuple(loaded.tokenizer(source)["input_ids"])
    return greedy(loaded, prefix, ids, NEW)[0]


def test_tasks_with_any_groups_and_a_stream(served: LiveServer, loaded: LoadedModel) -> None:
    chosen = {"all": GROUPS, "encoder": (ENCODER,), "cross": (CROSS,), "both": (ENCODER, DECODER)}
    prefixes = {
        name: random_groups(loaded, groups, 4 + at, seed=at)
        for at, (name, groups) in enumerate(chosen.items())
    }
    sources = [SOURCE, "A", "The quick brown fox jumps over the lazy dog again and again"]
    for name, prefix in prefixes.items():
        assert served.upload(name, prefix)["prefix_length"] == prefix.prefix_length
        answers = served.generate(sources, name, max_new_tokens=NEW, details=True)
        wanted = [alone(loaded, prefix, source) for source in sources]
        assert [ids_of(answer) for answer in answers] == wanted
    plain = alone(loaded, None, SOURCE)
    events = served.stream(SOURCE, max_new_tokens=NEW)
    assert [event["token"]["id"] for event in events] == plain
    assert plain != alone(loaded, prefixes["encoder"], SOURCE)


def test_a_downloaded_prefix_is_the_uploaded_one(served: LiveServer, loaded: LoadedModel) -> None:
    prefix = random_groups(loaded, (ENCODER, CROSS), 3, seed=5)
    served.upload("kept", prefix)
    assert served.client.get("/admin/tasks/kept/prefix").content == prefix.to_bytes()


def test_a_peft_adapter_generates_what_peft_does(
    served: LiveServer, loaded: LoadedModel, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    config = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5)
    adapted = get_peft_model(copy.deepcopy(loaded.model), config)
    with torch.no_grad():  # far enough from zero to change the text
        next(iter(adapted.prompt_encoder["default"].parameters())).mul_(4)
    source = loaded.tokenizer(SOURCE, return_tensors="pt")
    with torch.inference_mode():
        output = adapted.eval().generate(**source, max_new_tokens=NEW, do_sample=False)
    files = saved_adapter(adapted, loaded, tmp_path)
    answer = served.client.put("/admin/tasks/peft", files=files)
    assert answer.status_code == 201, answer.text
    told = ids_of(served.generate(SOURCE, "peft", max_new_tokens=NEW, details=True))
    assert told == output[0, 1:].tolist()
    assert told != alone(loaded, None, SOURCE)


def refused(server: LiveServer, data: bytes) -> str:
    """What is said of an upload that must be refused and leave nothing."""
    answer = server.client.put("/admin/tasks/refused", files={"file": ("p.safetensors", data)})
    assert answer.status_code == 422, answer.text
    assert server.client.get("/admin/tasks/refused").status_code == 404
    return str(answer.json()["error"])


def test_the_other_kind_of_model(served: LiveServer, loaded: LoadedModel) -> None:
    own = random_groups(loaded, (DECODER,), 4, seed=1)
    decoder_only = Prefix.of(own.keys, own.values, "of another kind")
    said = refused(served, decoder_only.to_bytes())
    assert "a decoder-only model; this server runs an encoder-decoder one" in said
    text = served.client.put("/admin/tasks/refused/text", json={"text": "Be brief."})
    assert 400 <= text.status_code < 500
    assert served.client.get("/admin/tasks/refused").status_code == 404


def test_demo_tasks_that_do_not_fit_are_left_out(loaded: LoadedModel, tmp_path: Path) -> None:
    flags = ["--demo-tasks", "--max-length", "40"]
    with live_server(loaded, tmp_path, *flags) as server:
        assert server.client.get("/admin/tasks").json() == []
        assert server.generate(SOURCE, max_new_tokens=2)["generated_text"]


def test_the_other_way_round(server: LiveServer, loaded: LoadedModel) -> None:
    said = refused(server, random_groups(loaded, GROUPS, 4, seed=1).to_bytes())
    assert "an encoder-decoder model; this server runs a decoder-only one" in said


def test_a_group_missing_that_the_metadata_names(
    served: LiveServer, loaded: LoadedModel, tmp_path: Path
) -> None:
    whole = tmp_path / "whole.safetensors"
    whole.write_bytes(random_groups(loaded, (ENCODER, DECODER), 4, seed=1).to_bytes())
    tensors = {name: tensor for name, tensor in load_file(whole).items() if "decoder" in name}
    said = refused(served, save(tensors, {METADATA_KEY: _metadata(whole.read_bytes())}))
    assert "names the groups ['decoder', 'encoder'], and the file holds" in said


def test_groups_of_different_lengths(served: LiveServer, loaded: LoadedModel) -> None:
    long, short = (random_groups(loaded, (ENCODER, DECODER), n, seed=1) for n in (5, 4))
    tensors = {
        **long.groups[ENCODER].named(),
        **short.groups[DECODER].named(),
    }
    metadata = {METADATA_KEY: _metadata(short.to_bytes())}
    assert "prefix length" in refused(served, save(tensors, metadata))


def _metadata(data: bytes) -> str:
    end = 8 + int.from_bytes(data[:8], "little")
    text: str = json.loads(data[8:end])["__metadata__"][METADATA_KEY]
    return text


def test_a_grammar_guides_its_own_text_alone(served: LiveServer, loaded: LoadedModel) -> None:
    prefix, new = random_groups(loaded, GROUPS, 4, seed=8), 60
    served.upload("guided", prefix)
    ids = tuple(loaded.tokenizer(SOURCE)["input_ids"])
    grammar = Grammar("regex", r"[0-9]{3}-(?:[A-F]|é){2,4}")
    matcher = LLMatcher(from_tokenizer(loaded.tokenizer), llguidance_grammar(grammar))
    expected, _ = greedy(loaded, prefix, ids, NEW, matcher)
    body = {"inputs": SOURCE, "task_id": "guided", "parameters": {"max_new_tokens": new}}
    with connect_sse(served.client, "POST", "/generate_stream", json=body) as source:
        events = source.iter_sse()
        told = [json.loads(next(events).data)["token"]["id"]]
        asked = {"type": "regex", "value": grammar.text}
        answer = served.generate(SOURCE, "guided", max_new_tokens=NEW, details=True, grammar=asked)
        told += [json.loads(event.data)["token"]["id"] for event in events]
    assert ids_of(answer) == expected
    assert re.fullmatch(grammar.text, answer["generated_text"])
    assert answer["details"]["finish_reason"] == "eos_token"
    assert told == greedy(loaded, prefix, ids, new)[0]


def test_wrong_sizes_name_the_group(served: LiveServer, loaded: LoadedModel) -> None:
    prefix = random_groups(loaded, (ENCODER,), 4, seed=1)
    halved = prefix.groups[ENCODER].mapped(lambda tensor: tensor[:1])
    said = refused(served, replace(prefix, groups={ENCODER: halved}).to_bytes())
    assert "encoder.keys has 1 layers and the base model" in said


def test_a_source_over_the_encoders_length(served: LiveServer, loaded: LoadedModel) -> None:
    limit = min(loaded.spec.max_positions, 2048)
    body = {"inputs": ["short", "a " * (limit + 1)], "parameters": {"max_new_tokens": 2}}
    answer = served.client.post("/generate", json=body)
    assert answer.status_code in (400, 413, 422)
    assert "inputs[1]: the input has" in answer.json()["error"]
    assert f"at most {limit}" in answer.json()["error"]
    body["parameters"] = {"max_new_tokens": 2, "truncate": limit}
    assert served.client.post("/generate", json=body).status_code == 200


def test_bad_input_disturbs_nothing_that_runs(served: LiveServer, loaded: LoadedModel) -> None:
    prefix, new = random_groups(loaded, GROUPS, 4, seed=8), 60
    served.upload("running", prefix)
    body = {"inputs": SOURCE, "task_id": "running", "parameters": {"max_new_tokens": new}}
    with connect_sse(served.client, "POST", "/generate_stream", json=body) as source:
        events = source.iter_sse()
        told = [json.loads(next(events).data)["token"]["id"]]
        own = random_groups(loaded, (DECODER,), 4, seed=1)
        refused(served, Prefix.of(own.keys, own.values, "of another kind").to_bytes())
        for inputs, more in (("a " * 3000, {}), (SOURCE, {"num_beams": 9})):
            bad = {"inputs": inputs, "parameters": more}
            assert served.client.post("/generate", json=bad).status_code == 422
        told += [json.loads(event.data)["token"]["id"] for event in events]
    ids = tuple(loaded.tokenizer(SOURCE)["input_ids"])
    assert told == greedy(loaded, prefix, ids, new)[0]
