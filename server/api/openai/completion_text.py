"""The text of one completion: with the prompt in front, with log-probabilities, in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.api.openai import jobs
from server.api.openai.answers import CompletionChoice, CompletionLogprobs, FinishReason
from server.api.openai.requests import CompletionRequest
from server.api.openai.texts import TextWithoutStop, json_logprob
from server.chunks import Chunk, ScoredToken, Token
from server.generation import Generation


@dataclass(frozen=True, slots=True)
class _LoggedToken:
    """A token as logprobs have it."""

    text: str
    logprob: float | None
    top: dict[str, float] | None
    offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a text; `tokens` where logprobs are wanted."""

    text: str
    tokens: list[_LoggedToken] | None
    finish_reason: FinishReason | None

    def choice(self, index: int) -> CompletionChoice:
        """As it is sent."""
        logprobs = None
        if self.tokens is not None:
            logprobs = CompletionLogprobs(
                tokens=[token.text for token in self.tokens],
                token_logprobs=[token.logprob for token in self.tokens],
                top_logprobs=[token.top for token in self.tokens],
                text_offset=[token.offset for token in self.tokens],
            )
        return CompletionChoice(
            index=index, text=self.text, logprobs=logprobs, finish_reason=self.finish_reason
        )


class CompletionWriter:
    """Writes one sequence in pieces: the prompt if it is wanted, then what each token adds."""

    def __init__(self, request: CompletionRequest, generation: Generation) -> None:
        self._echo = bool(request.echo)
        self._logs = request.logprobs is not None
        self._generation = generation
        self._text = TextWithoutStop(jobs.stops_of(request))
        self._offset = 0
        self._begun = False

    def write(self, chunk: Chunk) -> list[Piece]:
        """The pieces that are ready now."""
        pieces = self._begin(None)
        text = self._text.push(chunk)
        tokens = [self._logged(chunk)] if self._logs else None
        finish = jobs.finish_reason_of(chunk)
        if text or tokens or finish:
            pieces.append(Piece(text, tokens, finish))
        return pieces

    def end(self) -> list[Piece]:
        """What is left at the end: everything, where no token was to be generated."""
        return self._begin("length")

    def _begin(self, finish: FinishReason | None) -> list[Piece]:
        if self._begun:
            return []
        self._begun = True
        if not self._echo:
            return []
        text = self._generation.prompt_text
        tokens = None
        if self._logs:
            tokens = [self._scored(token, text) for token in self._generation.prompt]
        self._offset = len(text)
        return [Piece(text, tokens, finish)]

    def _scored(self, token: ScoredToken, text: str) -> _LoggedToken:
        offset = self._offset
        # A special token that the tokenizer put there is not in the text.
        if not token.special or text.startswith(token.text, offset):
            self._offset += len(token.text)
        if token.logprob is None:
            return _LoggedToken(token.text, None, None, offset)
        own = Token(token.id, token.text, token.logprob, token.special)
        return _LoggedToken(token.text, json_logprob(own.logprob), _top(own, token.top), offset)

    def _logged(self, chunk: Chunk) -> _LoggedToken:
        offset, token = self._offset, chunk.token
        self._offset += 0 if token.special else len(token.text)
        return _LoggedToken(token.text, json_logprob(token.logprob), _top(token, chunk.top), offset)


def written(request: CompletionRequest, generation: Generation, chunks: Sequence[Chunk]) -> Piece:
    """A sequence's text as one piece."""
    writer = CompletionWriter(request, generation)
    pieces = [piece for chunk in chunks for piece in writer.write(chunk)]
    pieces += writer.end()
    return Piece(
        text="".join(piece.text for piece in pieces),
        tokens=[token for piece in pieces for token in piece.tokens or ()]
        if request.logprobs is not None
        else None,
        finish_reason=pieces[-1].finish_reason,
    )


def _top(own: Token, top: Sequence[Token]) -> dict[str, float]:
    """The likeliest tokens and the token itself; of those with one text, the likeliest."""
    found: dict[str, float] = {}
    for token in (*top, own):
        text = own.text if token.id == own.id else token.text
        found.setdefault(text, json_logprob(token.logprob))
    return found
