"""Text to token ids, without ever blocking the event loop for long."""

from __future__ import annotations

import asyncio
import functools
from typing import cast

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from prefix_store.errors import ModelLoadError
from server.errors import InvalidRequestError

# Shorter texts take less time to tokenize than a thread takes to start on them.
_INLINE_CHARS = 2000


class TextTokenizer:
    """The model's tokenizer with nothing that one request could change for another.

    `backend` is a private copy: transformers' wrapper sets truncation and padding on its own.
    `token_text` gives one token on its own; half a character shows as the replacement character.
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
        self._vocab_size = 1 + max(self.backend.get_vocab().values(), default=-1)
        self._render = tokenizer.apply_chat_template if tokenizer.chat_template else None
        self.token_text = functools.cache(self._token_text)

    async def tokens(self, text: str) -> list[tuple[int, int, int]]:
        """Each token's id, and the characters of the text from and to which it stands for."""
        encodings = await asyncio.to_thread(self.backend.encode_batch, [text])
        [encoding] = encodings
        return [
            (token_id, *span) for token_id, span in zip(encoding.ids, encoding.offsets, strict=True)
        ]

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """The text's token ids, in a thread when the text is long."""
        if len(text) <= _INLINE_CHARS:
            return self._encode(text, add_special_tokens)
        return await asyncio.to_thread(self._encode, text, add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        # `encode` would hold the interpreter's lock all the while; the batch call does not.
        [encoding] = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return tuple(encoding.ids)

    def checked(self, token_ids: tuple[int, ...], where: str = "") -> tuple[int, ...]:
        """Token ids that came from outside.

        Args:
            where: goes in front of the message.

        Raises:
            InvalidRequestError: there is no such token.
        """
        unknown = next((i for i in token_ids if not 0 <= i < self._vocab_size), None)
        if unknown is not None:
            raise InvalidRequestError(
                f"{where}token {unknown} is not one of the model's; expected 0 to "
                f"{self._vocab_size - 1}"
            )
        return token_ids

    async def encode_chat(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        """A conversation as the model's own template writes it, up to where its answer begins.

        Raises:
            InvalidRequestError: the model has no template, or it does not take these messages.
        """
        if self._render is None:
            raise InvalidRequestError(
                "the base model has no chat template, so it takes no messages; send a prompt to "
                "/v1/completions"
            )
        if sum(len(message["content"]) for message in messages) <= _INLINE_CHARS:
            text = self._rendered(messages)
        else:
            text = await asyncio.to_thread(self._rendered, messages)
        return await self.encode(text, add_special_tokens=False)

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        assert self._render is not None  # noqa: S101 - checked by who calls
        try:
            text = self._render(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError) as error:
            raise InvalidRequestError(
                f"the model's chat template does not take these messages: {str(error)[:200]}"
            ) from error
        return cast("str", text)

    def is_special(self, token_id: int) -> bool:
        """True for tokens such as an end of text, which are no part of the generated text."""
        return token_id in self._special

    def _token_text(self, token_id: int) -> str:
        special = self._special.get(token_id)
        return self.backend.decode([token_id]) if special is None else special
