"""A base model with something to train, as the Trainer wants it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from clients._errors import TrainingError
from clients.training.examples import IGNORED
from clients.training.prefix_cache import prefix_cache
from clients.training.prefixes import TrainedPrefix
from clients.training.target_losses import linear_head, target_losses
from prefix_store.groups import DECODER, Group


class TaskModel(nn.Module):
    """The base model and what is trained of it or beside it; here, parts of the model itself.

    Its `state_dict` holds what is trained and nothing of the frozen rest, and so do checkpoints.
    """

    accepts_loss_kwargs = True
    """Tells the Trainer to count target tokens, so that accumulated steps weigh them equally."""

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        self.base = base
        self._head = None if base.config.is_encoder_decoder else linear_head(base)

    def forward(
        self, input_ids: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> dict[str, Tensor]:
        """The mean loss of the batch's targets, and what each row adds to it.

        Args:
            input_ids, labels: see `examples.collate`.
            num_items_in_batch: targets of all batches of a step, to divide by.

        Returns:
            `loss`, a float32 scalar in nats; `row_loss`, the sum over each row's targets;
            `row_targets`, their number.
        """
        expected = labels[:, 1:]
        is_target = expected != IGNORED
        losses = self._losses(input_ids, is_target, expected[is_target])
        return summed(losses, is_target, num_items_in_batch)

    def _losses(self, input_ids: Tensor, is_target: Tensor, targets: Tensor) -> Tensor:
        inputs = self.inputs(input_ids)
        if self._head is None:
            logits = self.base(**inputs).logits[:, -input_ids.shape[1] :]
            return nn.functional.cross_entropy(
                logits[:, :-1][is_target].float(), targets, reduction="none"
            )
        hidden = self.base.base_model(**inputs).last_hidden_state[:, -input_ids.shape[1] :]
        return target_losses(hidden[:, :-1][is_target], self._head, targets)

    def inputs(self, input_ids: Tensor) -> dict[str, Any]:
        """What the base model runs on; hidden states of a soft prompt in front are cut off."""
        return {"input_ids": input_ids, "use_cache": False}

    def checkpoint_activations(self) -> None:
        """Compute activations again in the backward pass, to save memory.

        Raises:
            TrainingError: the model cannot.
        """
        if not self.base.supports_gradient_checkpointing:
            raise TrainingError(f"{type(self.base).__name__} has no gradient checkpointing")
        self.base.gradient_checkpointing_enable({"use_reentrant": False})

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """What is trained, under names of its own."""
        return {
            name: parameter.detach()
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], *_: Any, **__: Any) -> Any:
        """Put back what `state_dict` gave.

        Raises:
            TrainingError: it is of something else.
        """
        own = self.state_dict()
        found, expected = (
            {name: tuple(tensor.shape) for name, tensor in state.items()}
            for state in (state_dict, own)
        )
        if found != expected:
            raise TrainingError("the checkpoint is of another method or of another size")
        for name, tensor in own.items():
            tensor.copy_(state_dict[name])
        return nn.modules.module._IncompatibleKeys([], [])


def summed(
    losses: Tensor, is_target: Tensor, num_items_in_batch: Tensor | int | None
) -> dict[str, Tensor]:
    """What `TaskModel.forward` returns, from the loss of each target.

    Args:
        losses: float32 `[targets]`.
        is_target: bool `[rows, tokens]`, true at each.
    """
    rows = is_target.nonzero()[:, 0]
    sums = torch.zeros(len(is_target), device=losses.device).index_add(0, rows, losses.detach())
    loss = losses.sum() / (num_items_in_batch or len(losses))
    return {"loss": loss, "row_loss": sums, "row_targets": is_target.sum(-1)}


class PrefixModel(TaskModel):
    """A frozen model behind a prefix that is trained."""

    def __init__(self, base: PreTrainedModel, prefix: TrainedPrefix) -> None:
        super().__init__(base.requires_grad_(False))
        self.prefix = prefix

    def keys_values(self) -> dict[Group, Tensor]:
        """The prefix now, `[2, num_layers, num_kv_heads, prefix_length, head_dim]`."""
        return {DECODER: self.prefix()}

    def inputs(self, input_ids: Tensor) -> dict[str, Any]:
        cache = prefix_cache(self.prefix(), len(input_ids), self.base.dtype)
        return {"input_ids": input_ids, "past_key_values": cache, "use_cache": True}

    def checkpoint_activations(self) -> None:
        super().checkpoint_activations()
        for layer in self.base.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer._can_checkpoint_with_cache = True  # our cache keeps nothing
        if not self._reaches_prefix():
            raise TrainingError(
                f"{type(self.base).__name__} drops a prefix where it checkpoints activations; "
                "train without checkpointing"
            )

    def _reaches_prefix(self) -> bool:
        """False for models, and older versions of transformers, that ignore the cache then."""
        ids = torch.arange(4, device=self.base.device)[None]
        was_training = self.base.training
        try:
            loss = self.train()(ids, ids)["loss"]
        except RuntimeError:  # their mask has room for the prefix, and their keys have not
            return False
        finally:
            self.train(was_training)
        gradients = torch.autograd.grad(loss, list(self.prefix.parameters()), allow_unused=True)
        return any(gradient is not None for gradient in gradients)
