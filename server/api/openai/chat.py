"""Chat completions: from OpenAI's request to a job, and from tokens to OpenAI's answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from server.api.answering import EventStream, collect, counted, merged
from server.api.openai import jobs
from server.api.openai.answers import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprob,
    ChatLogprobs,
    ChunkChoice,
    Delta,
    TopLogprob,
)
from server.api.openai.errors import openai_answer_to
from server.api.openai.models import task_of
from server.api.openai.requests import ChatMessage, ChatRequest
from server.api.openai.texts import TextWithoutStop, json_logprob
from server.callers import Caller
from server.chunks import Chunk, Token
from server.errors import InvalidRequestError
from server.generation import FieldNames, GenerationJob
from server.services import Services

_AS_MANY_AS_FIT = 1_000_000
_INCOMPLETE = "\ufffd"


async def complete(
    services: Services, caller: Caller, request: ChatRequest, *, priority: int = 0
) -> ChatCompletion:
    """Generate every answer; all or nothing."""
    task_id = task_of(services, request.model)
    with counted(services.metrics, caller, task_id, openai_answer_to):
        job = replace(await _job_of(services, caller, request, task_id), priority=priority)
        async with services.generator.run(job) as generations:
            chunks = await collect(generations)
    return ChatCompletion(
        **dict(jobs.described(services, request, generations, "chatcmpl")),
        choices=[_choice(request, index, own) for index, own in enumerate(chunks)],
        usage=jobs.usage_of(generations, job.samples, sum(map(len, chunks))),
    )


async def stream(services: Services, caller: Caller, request: ChatRequest) -> EventStream:
    """Start generating; an error up to here is the answer, a later one is the last event."""
    events = _events(services, caller, request)
    await anext(events)
    return EventStream(events, openai_answer_to)


async def _events(
    services: Services, caller: Caller, request: ChatRequest
) -> AsyncGenerator[bytes]:
    """An empty item once the job runs, then who speaks, then what each token adds."""
    task_id = task_of(services, request.model)
    with counted(services.metrics, caller, task_id, openai_answer_to):
        job = await _job_of(services, caller, request, task_id)
        async with services.generator.run(job) as generations:
            yield b""
            described = jobs.described(services, request, generations, "chatcmpl")
            events = jobs.Events(request, ChatCompletionChunk(**dict(described), choices=[]))
            for index in range(len(generations)):
                role = Delta(role="assistant", content="")
                yield events.event(
                    [ChunkChoice(index=index, delta=role, logprobs=None, finish_reason=None)]
                )
            texts = [TextWithoutStop(job.stop) for _ in generations]
            generated = 0
            async for index, chunk in merged(generations):
                generated += 1
                piece = _piece(request, index, chunk, texts[index])
                if piece is not None:
                    yield events.event([piece])
            if events.tells_usage:
                yield events.event([], jobs.usage_of(generations, job.samples, generated))
            yield jobs.DONE


async def _job_of(
    services: Services, caller: Caller, request: ChatRequest, task_id: str | None
) -> GenerationJob:
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequestError("top_logprobs is set and logprobs is not; set logprobs to true")
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise InvalidRequestError(
            f"max_tokens is {request.max_tokens} and max_completion_tokens, its new name, is "
            f"{request.max_completion_tokens}; send one of them"
        )
    limit_name = "max_completion_tokens" if request.max_tokens is None else "max_tokens"
    prompt = await services.tokenizer.encode_chat([_plain(one) for one in request.messages])
    return jobs.job_of(
        request,
        caller,
        task_id,
        (prompt,),
        samples=request.n or 1,
        fields=FieldNames("messages", limit_name, truncate=None),
        max_new_tokens=next(iter(limits), None),
        default_new_tokens=_AS_MANY_AS_FIT,
        top_logprobs=request.top_logprobs or 0,
    )


def _plain(message: ChatMessage) -> dict[str, str]:
    """A message as templates know it."""
    content = message.content
    if not isinstance(content, str):
        content = "".join(part.text for part in content)
    return {"role": "system" if message.role == "developer" else message.role, "content": content}


def _choice(request: ChatRequest, index: int, chunks: Sequence[Chunk]) -> ChatChoice:
    text = TextWithoutStop(jobs.stops_of(request))
    content = "".join(map(text.push, chunks))
    finish = jobs.finish_reason_of(chunks[-1])
    assert finish is not None  # noqa: S101 - the last chunk of a sequence has it
    return ChatChoice(
        index=index,
        message=AnswerMessage(content=content),
        logprobs=_logprobs(request, chunks),
        finish_reason=finish,
    )


def _piece(
    request: ChatRequest, index: int, chunk: Chunk, text: TextWithoutStop
) -> ChunkChoice | None:
    """What a token adds to a stream; None where that is nothing."""
    added = text.push(chunk)
    logprobs = _logprobs(request, [chunk])
    finish = jobs.finish_reason_of(chunk)
    if not (added or logprobs or finish):
        return None
    return ChunkChoice(
        index=index,
        delta=Delta(content=added or None),
        logprobs=logprobs,
        finish_reason=finish,
    )


def _logprobs(request: ChatRequest, chunks: Sequence[Chunk]) -> ChatLogprobs | None:
    if not request.logprobs:
        return None
    return ChatLogprobs(
        content=[
            ChatLogprob(
                **_named(chunk.token), top_logprobs=[TopLogprob(**_named(t)) for t in chunk.top]
            )
            for chunk in chunks
        ]
    )


def _named(token: Token) -> dict[str, Any]:
    """A token as it is told; `bytes` is null where its text is not all there is of it."""
    partial = token.special or _INCOMPLETE in token.text
    return {
        "token": token.text,
        "logprob": json_logprob(token.logprob),
        "bytes": None if partial else list(token.text.encode()),
    }
