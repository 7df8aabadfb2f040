"""What is trained, where it starts, and its loss, against transformers' own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GraniteConfig, PreTrainedModel

from clients import TrainingError
from clients.training.examples import Example, collate
from clients.training.prefixes import (
    DirectPrefix,
    ReparametrisedPrefix,
    TrainedPrefix,
    random_keys_values,
    spread,
    text_keys_values,
)
from clients.training.target_losses import linear_head, target_losses
from clients.training.task_model import PrefixModel
from prefix_store.base_model import BaseModelSpec
from prefix_store.groups import DECODER
from prefix_store.model_loading import LoadedModel
from tests.conftest import tiny_model

TEXT = (3, 1, 4, 1, 6)
BATCH = [Example((9, 8, 7, 6, 5), (11, 12, 2)), Example((13,), (14, 2))]
METHODS = ["direct", "prefix"]


def started(loaded: LoadedModel, method: str) -> TrainedPrefix:
    """A prefix that starts as a text."""
    initial = text_keys_values(loaded.model, TEXT)[DECODER]
    if method == "direct":
        return DirectPrefix(initial, spread(initial))
    embeddings = torch.randn(len(TEXT), loaded.spec.embedding_size)
    return ReparametrisedPrefix(initial, embeddings, loaded.spec.shape(DECODER, len(embeddings)))


def expected_loss(model: PreTrainedModel, example: Example) -> Tensor:
    """transformers' loss of an example after the text, with nothing of ours."""
    ids = torch.tensor([TEXT + example.prompt_ids + example.target_ids])
    labels = ids.clone()
    labels[:, : -len(example.target_ids)] = -100
    loss: Tensor = model(input_ids=ids, labels=labels).loss
    return loss


@pytest.mark.parametrize("method", METHODS)
def test_loss_behind_a_texts_prefix_is_transformers_loss_after_the_text(
    tiny: LoadedModel, method: str
) -> None:
    model = PrefixModel(tiny.model, started(tiny, method))
    found = model(**collate(BATCH))
    losses = [expected_loss(tiny.model, example) for example in BATCH]
    torch.testing.assert_close(found["row_loss"], torch.stack([3 * losses[0], 2 * losses[1]]))
    torch.testing.assert_close(found["loss"], (3 * losses[0] + 2 * losses[1]) / 5)
    assert found["row_targets"].tolist() == [3, 2]


def test_a_model_that_scales_its_logits_has_its_own_loss() -> None:
    config = GraniteConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        logits_scaling=3.0,
    )
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert linear_head(model) is None
    loaded = LoadedModel(model, tokenizer=None, spec=BaseModelSpec.from_model(model, "granite"))
    found = PrefixModel(model, started(loaded, "direct"))(**collate(BATCH[:1]))
    torch.testing.assert_close(found["loss"], expected_loss(model, BATCH[0]))


def test_frozen_head_gives_the_same_losses_and_gradients(tiny_llama: LoadedModel) -> None:
    head = linear_head(tiny_llama.model)
    assert head is not None
    targets = torch.randint(97, (300,))
    frozen, plain = (torch.randn(300, 48, requires_grad=True) for _ in range(2))
    with torch.no_grad():
        plain.copy_(frozen)
    weights = torch.rand(300)
    (target_losses(frozen, head, targets) * weights).sum().backward()
    trained = copy.deepcopy(head).requires_grad_(True)
    (target_losses(plain, trained, targets) * weights).sum().backward()
    torch.testing.assert_close(frozen.grad, plain.grad)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", ["llama", "qwen2", "gpt_neox", "opt"])
def test_checkpointed_activations_give_the_same_gradients(method: str, shape: str) -> None:
    tiny, gradients = tiny_model(shape), []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = PrefixModel(copy.deepcopy(tiny.model), started(tiny, method)).train()
        if checkpointing:
            model.checkpoint_activations()
        torch.manual_seed(2)  # for dropout
        model(**collate(BATCH))["loss"].backward()
        gradients.append([p.grad for p in model.prefix.parameters()])
    assert gradients[0]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_model_that_cannot_checkpoint_behind_a_prefix_is_refused() -> None:
    tiny = tiny_model("gpt2")
    model = PrefixModel(tiny.model, started(tiny, "direct"))
    with pytest.raises(TrainingError, match="GPT2LMHeadModel drops a prefix"):
        model.checkpoint_activations()


@pytest.mark.parametrize("method", METHODS)
def test_starts_exactly_at_the_text(tiny_llama: LoadedModel, method: str) -> None:
    prefix = started(tiny_llama, method)
    assert torch.equal(prefix(), text_keys_values(tiny_llama.model, TEXT)[DECODER])
    assert prefix.prefix_length == len(TEXT)


def test_random_reparametrised_prefix_is_not_zero(tiny_llama: LoadedModel) -> None:
    spec = tiny_llama.spec
    prefix = ReparametrisedPrefix(None, torch.randn(6, 9), spec.shape(DECODER, 6))()
    assert prefix.shape == (2, spec.num_layers, spec.num_kv_heads, 6, spec.head_dim)
    assert prefix.std() > 0.01


def test_first_vector_stays_where_it_is_frozen(tiny_llama: LoadedModel) -> None:
    initial = random_keys_values(tiny_llama.spec.shape(DECODER, 4))
    model = PrefixModel(tiny_llama.model, DirectPrefix(initial, spread(initial), freeze_first=True))
    optimizer = torch.optim.SGD(model.prefix.parameters(), lr=100.0)
    model(**collate(BATCH))["loss"].backward()
    optimizer.step()
    assert torch.equal(model.prefix()[..., 0, :], initial[..., 0, :])
    assert not torch.equal(model.prefix()[..., 1, :], initial[..., 1, :])
    assert model.prefix.prefix_length == 4


def test_state_is_what_is_trained_and_fits_nothing_else(tiny_llama: LoadedModel) -> None:
    initial = random_keys_values(tiny_llama.spec.shape(DECODER, 5))
    model, longer = (
        PrefixModel(tiny_llama.model, DirectPrefix(start, spread(start)))
        for start in (initial[..., :4, :], initial)
    )
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert set(state) == {"prefix.moved"}
    with torch.no_grad():
        model.prefix.moved.add_(1)
    model.load_state_dict(state)
    assert torch.equal(model.prefix.moved, state["prefix.moved"])
    with pytest.raises(TrainingError, match="another size"):
        longer.load_state_dict(state)
