"""A soft prompt: trained embeddings that become a prefix once the model has read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prefix_store.groups import check_tensor
from prefix_store.prefix import check_name

PROMPT_EMBEDDINGS = "prompt_embeddings"


@dataclass(frozen=True, slots=True, eq=False)
class SoftPrompt:
    """Embeddings that take the place of tokens in front of every request. Valid, immutable.

    Attributes:
        embeddings: `[prefix_length, embedding_size]`, float16, bfloat16 or float32, finite, as the
            model's own embedding of tokens would give them (Lester et al. 2021; Liu et al. 2021).
        method: how it was made, e.g. `prompt-tuning`.
        base_model: name of the base model it was made for, or empty when unknown.

    Raises:
        InvalidPrefixError: a tensor or a text is not as above, or a text is too long.
    """

    embeddings: torch.Tensor
    method: str
    base_model: str = ""

    def __post_init__(self) -> None:
        check_tensor(PROMPT_EMBEDDINGS, self.embeddings, ndim=2)
        check_name("method", self.method)
        check_name("base_model", self.base_model)

    @property
    def prefix_length(self) -> int:
        """Number of positions it takes."""
        return len(self.embeddings)
