"""An encoder-decoder base model with something to train, as the Trainer wants it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from clients._errors import TrainingError
from clients.training.examples import IGNORED
from clients.training.prefix_cache import prefix_cache
from clients.training.prefixes import TrainedPrefix
from clients.training.task_model import TaskModel, summed
from prefix_store.groups import CROSS, DECODER, ENCODER, GROUPS, Group
from prefix_store.prefix_attention import AttentionPrefixes, RowPrefixes


class EncoderDecoderModel(TaskModel):
    """The model itself is trained."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """See `TaskModel.forward`.

        Args:
            input_ids, attention_mask, labels: see `examples.collate_pairs`.
        """
        base: Any = self.base
        is_target = labels != IGNORED
        logits = base(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=base.prepare_decoder_input_ids_from_labels(labels),
            **self.inputs(input_ids),
        ).logits
        losses = nn.functional.cross_entropy(
            logits[is_target].float(), labels[is_target], reduction="none"
        )
        return summed(losses, is_target, num_items_in_batch)

    def inputs(self, input_ids: Tensor) -> dict[str, Any]:
        """What the base model gets beside the texts."""
        return {"use_cache": False}


class EncoderDecoderPrefixModel(EncoderDecoderModel):
    """A frozen model whose attention gets prefixes that are trained."""

    def __init__(self, base: PreTrainedModel, prefixes: Mapping[Group, TrainedPrefix]) -> None:
        super().__init__(base.requires_grad_(False))
        self.prefixes = nn.ModuleDict({group: prefix for group, prefix in prefixes.items()})  # noqa: C416

    def keys_values(self) -> dict[Group, Tensor]:
        """The prefixes now, `[2, num_layers, num_heads, prefix_length, head_dim]` each."""
        return {name: self.prefixes[name]() for name in GROUPS if name in self.prefixes}

    def inputs(self, input_ids: Tensor) -> dict[str, Any]:
        batch, prefixes = len(input_ids), self.keys_values()
        in_front = {
            group: RowPrefixes(*_of_every_row(prefix.to(self.base.dtype), batch))
            for group, prefix in prefixes.items()
            if group in (ENCODER, CROSS)
        }
        inputs: dict[str, Any] = {"prefixes": AttentionPrefixes(in_front), "use_cache": False}
        if DECODER in prefixes:
            cache = prefix_cache(prefixes[DECODER], batch, self.base.dtype)
            inputs["past_key_values"] = EncoderDecoderCache(cache, DynamicCache())
            inputs["use_cache"] = True
        return inputs

    def checkpoint_activations(self) -> None:
        raise TrainingError(
            f"{type(self.base).__name__} has an encoder, whose prefix is dropped where activations "
            "are checkpointed; train without checkpointing"
        )


def _of_every_row(prefix: Tensor, batch: int) -> Tensor:
    return prefix[:, :, None].expand(-1, -1, batch, -1, -1, -1)
