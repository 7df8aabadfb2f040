"""What a call asks for, and the sequences that it gets."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass

from server.accounting.account import SequenceAccount
from server.callers import Caller
from server.chunks import Chunk, ScoredToken, TextAssembler
from server.engine.protocol import Grammar, PromptEvent, SamplingParams, TokenStream
from server.sequence_clock import SequenceClock

DEFAULT_NEW_TOKENS = 100

Prompt = str | tuple[int, ...]
"""A text, which is put into the task's template; or token ids, which are taken as they are."""


@dataclass(frozen=True, slots=True)
class FieldNames:
    """What the caller's API calls the fields that a message may be about.

    Attributes:
        truncate: None where it has no such field.
    """

    inputs: str = "inputs"
    max_new_tokens: str = "max_new_tokens"
    truncate: str | None = "truncate"

    @property
    def shorter(self) -> str:
        """What to do about an input that is too long."""
        truncate = "" if self.truncate is None else f" or set {self.truncate}"
        return f"shorten {self.inputs}{truncate}"


@dataclass(frozen=True, slots=True)
class GenerationJob:
    """What one call asks for: every input generated in the same way.

    Attributes:
        task_id: whose prefix to use, as the caller calls it; None for the bare base model.
        caller: who asks.
        sampling: its `max_new_tokens` and `seed` are replaced by those below.
        user: whoever it is for; gets the same version of a split task each time.
        samples: sequences to generate of each input, with seeds that follow each other.
        max_new_tokens: None for up to `default_new_tokens`, fewer where fewer fit.
        seed: the first sequence's; None for a random one for each input.
        stop: strings that end the text.
        truncate: keep only so many tokens of a prompt, its last.
        grammar: what each text must be; None for any text.
        priority: the engine's; see `GenerationRequest`.
        fields: for messages.
    """

    inputs: tuple[Prompt, ...]
    task_id: str | None
    caller: Caller
    sampling: SamplingParams
    user: str | None = None
    samples: int = 1
    max_new_tokens: int | None = None
    default_new_tokens: int = DEFAULT_NEW_TOKENS
    seed: int | None = None
    stop: tuple[str, ...] = ()
    truncate: int | None = None
    grammar: Grammar | None = None
    priority: int = 0
    fields: FieldNames = FieldNames()

    @property
    def num_sequences(self) -> int:
        """To generate, each of them with as many beams as `sampling` says."""
        return len(self.inputs) * self.samples


@dataclass(frozen=True, slots=True)
class Usage:
    """What a sequence was generated from.

    Attributes:
        task_id, version: the prefix used, the task as the caller calls it; None for the bare base
            model.
        prefix_tokens, prompt_tokens: positions taken before the first generated token.
        seed: what sampling was seeded with; None for greedy decoding.
    """

    task_id: str | None
    version: str | None
    prefix_tokens: int
    prompt_tokens: int
    seed: int | None


class Generation:
    """One sequence on its way. Iterate once.

    Attributes:
        usage: what it is generated from.
        prompt: where `prompt_logprobs` asks for them, the prompt's tokens; empty until the first
            chunk, or the end of a sequence without any.
    """

    def __init__(
        self,
        usage: Usage,
        *,
        prompt_text: str | None,
        prompt_ids: tuple[int, ...],
        stream: TokenStream,
        text: TextAssembler,
        clock: SequenceClock,
        account: SequenceAccount,
    ) -> None:
        self.usage = usage
        self.prompt: tuple[ScoredToken, ...] = ()
        self._prompt_text = prompt_text
        self._prompt_ids = prompt_ids
        self._stream = stream
        self._text = text
        self._clock = clock
        self._account = account

    @property
    def prompt_text(self) -> str:
        """The text that was read: the input in its task's template, or what its tokens say."""
        if self._prompt_text is None:
            return self._text.decode(self._prompt_ids)
        return self._prompt_text

    async def __aiter__(self) -> AsyncGenerator[Chunk]:
        """Its tokens as they come; none where `max_new_tokens` is 0.

        Raises:
            EngineFailedError: there will be no more.
        """
        async for event in self._stream:
            if isinstance(event, PromptEvent):
                self.prompt = self._text.prompt(event)
                self._clock.queued(event.queue_seconds)
                self._account.begun()
                if event.finish_reason is not None:
                    self._clock.finished()
                    await self._account.finished()
                continue
            self._clock.token(event)
            self._account.token()
            chunk = self._text.chunk(event)
            if chunk.finish is not None:
                await self._stream.aclose()  # a stop string ends it before the engine knows
                self._clock.finished()
                await self._account.finished()
            yield chunk
