"""Completions: from OpenAI's request to a job, and from what is generated to OpenAI's answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

from server.api.answering import EventStream, collect, counted, mean_logprob, merged
from server.api.openai import jobs
from server.api.openai.answers import Completion, CompletionChoice
from server.api.openai.completion_text import CompletionWriter, Piece, written
from server.api.openai.errors import openai_answer_to
from server.api.openai.models import task_of
from server.api.openai.requests import CompletionRequest
from server.callers import Caller
from server.chunks import Chunk
from server.errors import InvalidRequestError
from server.generation import FieldNames, Generation, GenerationJob, Prompt
from server.services import Services

DEFAULT_NEW_TOKENS = 16
_FIELDS = FieldNames("prompt", "max_tokens", truncate=None)


async def complete(
    services: Services, caller: Caller, request: CompletionRequest, *, priority: int = 0
) -> Completion:
    """Generate every text; all or nothing."""
    task_id = task_of(services, request.model)
    with counted(services.metrics, caller, task_id, openai_answer_to):
        job = replace(_job_of(caller, request, task_id), priority=priority)
        async with services.generator.run(job) as generations:
            chunks = await collect(generations)
    texts = [written(request, *one) for one in zip(generations, chunks, strict=True)]
    generated = sum(map(len, chunks))
    answer = _answer(services, request, generations)
    return answer.model_copy(
        update={
            "choices": _chosen(request, texts, chunks, job.samples),
            "usage": jobs.usage_of(generations, job.samples, generated),
        }
    )


async def stream(services: Services, caller: Caller, request: CompletionRequest) -> EventStream:
    """Start generating; an error up to here is the answer, a later one is the last event."""
    events = _events(services, caller, request)
    await anext(events)
    return EventStream(events, openai_answer_to)


async def _events(
    services: Services, caller: Caller, request: CompletionRequest
) -> AsyncGenerator[bytes]:
    """An empty item once the job runs, then what each token adds."""
    task_id = task_of(services, request.model)
    with counted(services.metrics, caller, task_id, openai_answer_to):
        job = _job_of(caller, request, task_id)
        async with services.generator.run(job) as generations:
            yield b""
            events = jobs.Events(request, _answer(services, request, generations))
            writers = [CompletionWriter(request, generation) for generation in generations]
            generated = 0
            async for index, chunk in merged(generations):
                generated += 1
                for piece in writers[index].write(chunk):
                    yield events.event([piece.choice(index)])
            for index, writer in enumerate(writers):
                for piece in writer.end():
                    yield events.event([piece.choice(index)])
            if events.tells_usage:
                yield events.event([], jobs.usage_of(generations, job.samples, generated))
            yield jobs.DONE


def _job_of(caller: Caller, request: CompletionRequest, task_id: str | None) -> GenerationJob:
    n = request.n or 1
    best_of = n if request.best_of is None else request.best_of
    if best_of < n:
        raise InvalidRequestError(f"best_of is {best_of} and n is {n}; expected at least that")
    if request.stream and best_of > n:
        raise InvalidRequestError(
            f"best_of is {best_of} and n is {n}, and the best is known at the end only; leave "
            "best_of out, or stream"
        )
    echo = bool(request.echo)
    if request.max_tokens == 0 and not echo:
        raise InvalidRequestError(
            "max_tokens is 0, so there is nothing to answer; set echo to have the prompt scored"
        )
    scores = echo and (request.logprobs is not None or request.max_tokens == 0)
    return jobs.job_of(
        request,
        caller,
        task_id,
        _prompts(request),
        samples=best_of,
        fields=_FIELDS,
        max_new_tokens=request.max_tokens,
        default_new_tokens=DEFAULT_NEW_TOKENS,
        top_logprobs=request.logprobs or 0,
        prompt_logprobs=(request.logprobs or 0) if scores else None,
    )


def _prompts(request: CompletionRequest) -> tuple[Prompt, ...]:
    prompt = request.prompt
    if isinstance(prompt, str):
        return (prompt,)
    if isinstance(prompt[0], int):
        return (tuple(prompt),)
    return tuple(one if isinstance(one, str) else tuple(one) for one in prompt)


def _answer(
    services: Services, request: CompletionRequest, generations: Sequence[Generation]
) -> Completion:
    """An answer without any text yet."""
    described = jobs.described(services, request, generations, "cmpl")
    return Completion(**dict(described), choices=[])


def _chosen(
    request: CompletionRequest,
    texts: Sequence[Piece],
    chunks: Sequence[Sequence[Chunk]],
    samples: int,
) -> list[CompletionChoice]:
    """The `n` best of the texts of each prompt, the best first; all in their order if all are."""
    n = request.n or 1
    choices: list[CompletionChoice] = []
    for start in range(0, len(texts), samples):
        own = list(range(start, start + samples))
        if samples > n:
            own.sort(key=lambda i: mean_logprob(chunks[i]), reverse=True)
        choices += [texts[i].choice(len(choices) + at) for at, i in enumerate(own[:n])]
    return choices
