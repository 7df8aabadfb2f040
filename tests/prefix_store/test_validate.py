"""Which prefixes a base model takes."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from prefix_store.base_model import fingerprint, same_model_name
from prefix_store.errors import IncompatiblePrefixError
from prefix_store.model_loading import LoadedModel
from prefix_store.soft_prompt import SoftPrompt
from prefix_store.validate import check_fits
from tests.prefix_store.examples import EMBEDDING, SPEC, a_prefix

LIMIT = 20


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="unknown model"),
        pytest.param({"fingerprint": SPEC.fingerprint}, id="same fingerprint"),
        pytest.param(
            {"fingerprint": SPEC.fingerprint, "base_model": "/other/path"},
            id="same fingerprint by another name",
        ),
        pytest.param({"base_model": "base-model"}, id="same name"),
        pytest.param({"base_model": "/models/Base-Model/"}, id="same name in a path"),
        pytest.param({"shape": (2, 3, LIMIT, 4)}, id="longest"),
    ],
)
def test_takes(fields: dict[str, object]) -> None:
    check_fits(a_prefix(**fields), SPEC, LIMIT)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        pytest.param(
            {"shape": (9, 3, 5, 4)},
            r"decoder.keys has 9 layers and the base model 'org/Base-Model' has 2: "
            r"found shape \[9, 3, 5, 4\], expected \[2, 3, 5, 4\]",
            id="layers",
        ),
        pytest.param({"shape": (2, 6, 5, 4)}, "has 6 key-value heads", id="heads"),
        pytest.param({"shape": (2, 3, 5, 8)}, "has 8 numbers per head", id="head size"),
        pytest.param(
            {"shape": (9, 3, 5, 4), "base_model": "org/Other"}, "names 'org/Other'", id="named"
        ),
        pytest.param(
            {"shape": (2, 3, LIMIT + 1, 4)}, "prefix length 21 .* at most 20", id="too long"
        ),
        pytest.param(
            {"base_model": "org/Other"},
            "names the base model 'org/Other'; this server runs 'org/Base-Model'",
            id="other name",
        ),
        pytest.param(
            {"fingerprint": "cd" * 32, "base_model": "org/Base-Model"},
            "fingerprint cdcdcdcdcdcd; this server runs 'org/Base-Model', abababababab",
            id="other fingerprint",
        ),
    ],
)
def test_refuses(fields: dict[str, object], says: str) -> None:
    with pytest.raises(IncompatiblePrefixError, match=says):
        check_fits(a_prefix(**fields), SPEC, LIMIT)


def test_takes_a_soft_prompt() -> None:
    check_fits(SoftPrompt(torch.ones(LIMIT, EMBEDDING), "x", "base-model"), SPEC, LIMIT)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (SoftPrompt(torch.ones(3, 9), "x"), r"has shape \[3, 9\]; expected \[3, 24\]"),
        (SoftPrompt(torch.ones(LIMIT + 1, EMBEDDING), "x"), "prefix length 21 .* at most 20"),
        (SoftPrompt(torch.ones(3, EMBEDDING), "x", "gpt2"), "names the base model 'gpt2'"),
    ],
)
def test_refuses_a_soft_prompt(prompt: SoftPrompt, says: str) -> None:
    with pytest.raises(IncompatiblePrefixError, match=says):
        check_fits(prompt, SPEC, LIMIT)


def test_the_model_itself_bounds_the_length() -> None:
    with pytest.raises(IncompatiblePrefixError, match="at most 4"):
        check_fits(a_prefix(), replace(SPEC, max_positions=5), LIMIT)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("SmolLM2-135M", "smollm2-135m-instruct", True),
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M", False),  # the base model, not its chat one
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-360M-Instruct", False),
        ("./gpt2", "openai-community/gpt2", True),
        ("gpt2", "gpt2-medium", False),
    ],
)
def test_same_model_name(one: str, other: str, *, same: bool) -> None:
    assert same_model_name(one, other) is same
    assert same_model_name(other, one) is same


def test_a_fingerprint_is_of_the_weights_not_of_their_dtype(tiny: LoadedModel) -> None:
    half = copy.deepcopy(tiny.model).to(torch.bfloat16)
    other = copy.deepcopy(tiny.model)
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1

    assert fingerprint(half) == tiny.spec.fingerprint
    assert fingerprint(other) != tiny.spec.fingerprint


def test_a_spec_has_the_sizes_of_the_models_own_cache(tiny: LoadedModel) -> None:
    cache = tiny.model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    spec = tiny.spec

    assert len(cache.layers) == spec.num_layers
    assert list(cache.layers[0].keys.shape) == [1, spec.num_kv_heads, 3, spec.head_dim]
