"""Text to token ids, without ever blocking the event loop for long."""

from __future__ import annotations

import asyncio

from tokenizers import Tokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from prefix_store.errors import ModelLoadError

# Shorter texts take less time to tokenize than a thread takes to start on them.
_INLINE_CHARS = 2000


class TextTokenizer:
    """The model's tokenizer with nothing that one request could change for another.

    `backend` is a private copy: transformers' wrapper sets truncation and padding on its own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Copy the tokenizer.

        Raises:
            ModelLoadError: the model has no fast tokenizer.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ModelLoadError(
                f"the model's tokenizer is a {type(tokenizer).__name__}; expected one with a "
                "tokenizer.json. Save it once with AutoTokenizer(..., use_fast=True)."
            )
        self.backend = Tokenizer.from_str(backend.to_str())
        self.backend.no_truncation()
        self.backend.no_padding()
        added = self.backend.get_added_tokens_decoder()
        self._special = {
            token_id: token.content for token_id, token in added.items() if token.special
        }

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """The text's token ids, in a thread when the text is long."""
        if len(text) <= _INLINE_CHARS:
            return self._encode(text, add_special_tokens)
        return await asyncio.to_thread(self._encode, text, add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        # `encode` would hold the interpreter's lock all the while; the batch call does not.
        [encoding] = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return tuple(encoding.ids)

    def is_special(self, token_id: int) -> bool:
        """True for tokens such as an end of text, which are no part of the generated text."""
        return token_id in self._special

    def token_text(self, token_id: int) -> str:
        """One token on its own; half a character shows as the replacement character."""
        special = self._special.get(token_id)
        return self.backend.decode([token_id]) if special is None else special
