"""From what every OpenAI request has in common to a generation job."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence

from server.api.answering import event_bytes
from server.api.openai.answers import (
    ChatCompletionChunk,
    ChunkChoice,
    Completion,
    CompletionChoice,
    FinishReason,
    Generated,
    UsageAnswer,
)
from server.api.openai.formats import grammar_of
from server.api.openai.models import fingerprint
from server.api.openai.requests import GenerationOptions
from server.api.schemas import MAX_INPUTS
from server.callers import Caller
from server.chunks import Chunk
from server.engine.protocol import FinishReason as EngineReason
from server.engine.protocol import SamplingParams
from server.errors import InvalidRequestError
from server.generation import FieldNames, Generation, GenerationJob, Prompt
from server.services import Services

DONE = event_bytes(" [DONE]")

# As for /generate: below this the likeliest token is certain but for rounding.
_GREEDY_BELOW = 1e-3
_SEEDS = 2**64


def job_of(
    request: GenerationOptions,
    caller: Caller,
    task_id: str | None,
    inputs: tuple[Prompt, ...],
    *,
    samples: int,
    fields: FieldNames,
    max_new_tokens: int | None,
    default_new_tokens: int,
    top_logprobs: int,
    prompt_logprobs: int | None = None,
) -> GenerationJob:
    """What the generator is asked to do.

    Args:
        samples: sequences of each input.
        fields: what this request calls them.
        max_new_tokens: None for up to `default_new_tokens`, fewer where fewer fit.

    Raises:
        InvalidRequestError: too many sequences, `stream_options` without a stream, or a form of
            the text that cannot be read.
    """
    if len(inputs) * samples > MAX_INPUTS:
        raise InvalidRequestError(
            f"{len(inputs)} prompts and {samples} texts of each are {len(inputs) * samples} texts; "
            f"expected at most {MAX_INPUTS} in one request"
        )
    if request.stream_options is not None and not request.stream:
        raise InvalidRequestError("stream_options is for streams; leave it out or set stream")
    return GenerationJob(
        inputs=inputs,
        task_id=task_id,
        caller=caller,
        sampling=_sampling(request, top_logprobs, prompt_logprobs),
        user=request.user,
        samples=samples,
        max_new_tokens=max_new_tokens,
        default_new_tokens=default_new_tokens,
        seed=None if request.seed is None else request.seed % _SEEDS,
        stop=stops_of(request),
        grammar=grammar_of(request),
        fields=fields,
    )


def stops_of(request: GenerationOptions) -> tuple[str, ...]:
    """The texts that end a text."""
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())


def _sampling(
    request: GenerationOptions, top_logprobs: int, prompt_logprobs: int | None
) -> SamplingParams:
    """The parameters with OpenAI's defaults; `max_new_tokens` and `seed` are the job's."""
    temperature = 1.0 if request.temperature is None else request.temperature
    top_p = 1.0 if request.top_p is None else request.top_p
    samples = temperature >= _GREEDY_BELOW and top_p > 0
    return SamplingParams(
        max_new_tokens=1,
        do_sample=samples,
        temperature=temperature if samples else 1.0,
        top_p=top_p if samples else 1.0,
        top_k=max(0, request.top_k or 0),  # vLLM's -1 is all, too
        min_p=request.min_p or 0.0,
        repetition_penalty=request.repetition_penalty or 1.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        ignore_eos=bool(request.ignore_eos),
        top_logprobs=top_logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def finish_reason_of(chunk: Chunk) -> FinishReason | None:
    """Why a sequence ends with this chunk, in OpenAI's words; None where it goes on."""
    if chunk.finish is None:
        return None
    return "length" if chunk.finish.reason is EngineReason.LENGTH else "stop"


def described(
    services: Services, request: GenerationOptions, generations: Sequence[Generation], kind: str
) -> Generated:
    """What an answer says of itself.

    Args:
        kind: what its id begins with.
    """
    return Generated(
        id=f"{kind}-{secrets.token_hex(16)}",
        created=int(time.time()),
        model=request.model,
        system_fingerprint=fingerprint(services, generations[0].usage),
    )


class Events:
    """Writes the chunks of a stream."""

    def __init__(self, request: GenerationOptions, frame: Completion | ChatCompletionChunk) -> None:
        """
        Args:
            frame: what all of them have.
        """
        options = request.stream_options
        self.tells_usage = bool(options and options.include_usage)
        self._frame = frame

    def event(
        self, choices: Sequence[CompletionChoice | ChunkChoice], usage: UsageAnswer | None = None
    ) -> bytes:
        """A chunk."""
        chunk = self._frame.model_copy(update={"choices": list(choices), "usage": usage})
        unused = None if self.tells_usage else {"usage"}
        return event_bytes(" " + chunk.model_dump_json(exclude=unused))


def usage_of(generations: Iterable[Generation], samples: int, generated_tokens: int) -> UsageAnswer:
    """A request's tokens; each prompt counts once, whatever is generated of it."""
    firsts = list(generations)[::samples]
    prompt_tokens = sum(generation.usage.prompt_tokens for generation in firsts)
    return UsageAnswer(
        prompt_tokens=prompt_tokens,
        completion_tokens=generated_tokens,
        total_tokens=prompt_tokens + generated_tokens,
    )
