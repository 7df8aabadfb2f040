"""What clients see of a sequence: its tokens as they come, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass

from server.detokenizer import Detokenizer, token_texts
from server.engine.protocol import FinishReason, PromptEvent, TokenEvent, TokenLogprob
from server.tokenization import TextTokenizer


@dataclass(frozen=True, slots=True)
class Token:
    """A token as clients see it; `text` may be empty while a character is incomplete."""

    id: int
    text: str
    logprob: float
    special: bool


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of a prompt; `logprob` is None for the first, before which nothing is computed."""

    id: int
    text: str
    logprob: float | None
    special: bool
    top: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """How a sequence ended."""

    generated_text: str
    reason: FinishReason
    generated_tokens: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """One generated token, numbered from 1; the last one has `finish`."""

    index: int
    token: Token
    top: tuple[Token, ...]
    finish: Finish | None


class TextAssembler:
    """Turns one sequence's token events into chunks of text."""

    def __init__(self, tokenizer: TextTokenizer, stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, stop)
        self._count = 0

    def chunk(self, event: TokenEvent) -> Chunk:
        """The event as clients see it; it has `finish` where a stop string ends the text."""
        self._count += 1
        chosen, reason = event.chosen, event.finish_reason
        added = self._detokenizer.push(chosen.token_id, last=reason is not None)
        if added.stopped:
            reason = FinishReason.STOP_SEQUENCE
        finish = None if reason is None else Finish(self._detokenizer.text, reason, self._count)
        token = Token(chosen.token_id, added.text, chosen.logprob, added.special)
        return Chunk(self._count, token, tuple(map(self._alternative, event.top)), finish)

    def decode(self, token_ids: tuple[int, ...]) -> str:
        """What tokens say, special ones included."""
        return "".join(token_texts(self._tokenizer, token_ids))

    def prompt(self, event: PromptEvent) -> tuple[ScoredToken, ...]:
        """The prompt's tokens as clients see them."""
        texts = token_texts(self._tokenizer, [token.token_id for token in event.tokens])
        return tuple(
            ScoredToken(
                token.token_id,
                text,
                token.logprob,
                self._tokenizer.is_special(token.token_id),
                tuple(map(self._alternative, token.top)),
            )
            for token, text in zip(event.tokens, texts, strict=True)
        )

    def _alternative(self, token: TokenLogprob) -> Token:
        text = self._tokenizer.token_text(token.token_id)
        special = self._tokenizer.is_special(token.token_id)
        return Token(token.token_id, text, token.logprob, special)
