"""What a prompt leaves behind in the model's own cache, as a prefix."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from prefix_store.soft_prompt import SoftPrompt


class Prefill:
    """One prompt on its way through the model's own forward pass, whatever its shape.

    Embeddings go in where transformers takes `inputs_embeds`, so that a model that scales or
    projects embeddings treats them as it does there.
    """

    def __init__(self, loaded: LoadedModel, prompt: tuple[int, ...] | SoftPrompt) -> None:
        """
        Args:
            prompt: token ids, or embeddings that are rounded to the model's dtype.
        """
        self._loaded = loaded
        self._cache = DynamicCache()
        model = loaded.model
        if isinstance(prompt, SoftPrompt):
            self._method, self._name = prompt.method, "inputs_embeds"
            self._inputs = prompt.embeddings.to(model.device, model.dtype)
        else:
            self._method, self._name = "text", "input_ids"
            self._inputs = torch.tensor(prompt, dtype=torch.int64, device=model.device)

    @property
    def length(self) -> int:
        """Positions that the prompt takes."""
        return len(self._inputs)

    @torch.inference_mode()
    def advance(self, start: int, end: int) -> None:
        """Compute positions `start` to `end`; call it for every chunk, in order."""
        chunk = {self._name: self._inputs[None, start:end]}
        self._loaded.model(**chunk, past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    def prefix(self) -> Prefix:
        """The keys and values of every position.

        Raises:
            InvalidPrefixError: one is not finite.
        """
        spec = self._loaded.spec
        layers: list[Any] = self._cache.layers  # its type has those without keys too
        return Prefix.of(
            torch.cat([layer.keys for layer in layers]),
            torch.cat([layer.values for layer in layers]),
            method=self._method,
            base_model=spec.name,
            fingerprint=spec.fingerprint,
        )
