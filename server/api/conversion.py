"""Between what goes over the wire and what the generator works with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from server.api.grammars import grammar_of
from server.api.parameters import Parameters
from server.api.schemas import (
    Details,
    GenerateRequest,
    GenerateResponse,
    StreamDetails,
    StreamEvent,
    Token,
)
from server.callers import Caller
from server.chunks import Chunk, Finish
from server.chunks import Token as GeneratedToken
from server.engine.protocol import SamplingParams
from server.errors import InvalidRequestError
from server.generation import GenerationJob, Usage

# Below this the likeliest token is certain but for rounding, and 1 / temperature overflows.
_GREEDY_BELOW = 1e-3

_TAKEN_AS_GIVEN = {
    "repetition_penalty",
    "frequency_penalty",
    "num_beams",
    "length_penalty",
    "early_stopping",
    "no_repeat_ngram_size",
    "min_new_tokens",
}
# What has no effect, and what makes a request sample when it has one.
_NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}


def job_of(request: GenerateRequest, caller: Caller, *, stream: bool) -> GenerationJob:
    """What the generator is asked to do.

    Raises:
        InvalidRequestError: two different task names, a stream of several inputs, sampling with
            beams, or a grammar that cannot be read.
    """
    parameters = request.parameters or Parameters()
    inputs = (request.inputs,) if isinstance(request.inputs, str) else tuple(request.inputs)
    if stream and not isinstance(request.inputs, str):
        raise InvalidRequestError(
            f"inputs is a list of {len(inputs)}; a stream takes one text. Send one request for "
            "each, or leave stream out"
        )
    return GenerationJob(
        inputs=inputs,
        task_id=_task_id(request.task_id, parameters.adapter_id),
        caller=caller,
        sampling=_sampling(parameters),
        user=request.user,
        max_new_tokens=parameters.max_new_tokens,
        seed=parameters.seed,
        stop=tuple(parameters.stop or ()),
        truncate=parameters.truncate,
        grammar=grammar_of(parameters.grammar),
    )


def _task_id(task_id: str | None, adapter_id: str | None) -> str | None:
    if task_id is not None and adapter_id is not None and task_id != adapter_id:
        raise InvalidRequestError(
            f"task_id is {task_id[:80]!r} and parameters.adapter_id, another name for it, is "
            f"{adapter_id[:80]!r}; send one of them"
        )
    return adapter_id if task_id is None else task_id


def _sampling(parameters: Parameters) -> SamplingParams:
    """The parameters with defaults filled in; `max_new_tokens` and `seed` are the job's."""
    given: dict[str, Any] = parameters.model_dump(
        include={*_NEUTRAL, *_TAKEN_AS_GIVEN}, exclude_none=True
    )
    samples = bool(parameters.do_sample)
    samples |= any(given.get(name, neutral) != neutral for name, neutral in _NEUTRAL.items())
    if given.get("temperature", 1.0) < _GREEDY_BELOW:
        del given["temperature"]
        samples = False
    if samples and given.get("num_beams", 1) > 1:
        raise InvalidRequestError(
            f"num_beams is {given['num_beams']}, and beam search draws no tokens; leave out "
            "do_sample, temperature, top_k, top_p, min_p and typical_p, or num_beams"
        )
    return SamplingParams(
        max_new_tokens=1,
        do_sample=samples,
        top_logprobs=parameters.top_n_tokens or 0,
        ignore_eos=bool(parameters.ignore_eos),
        **given,
    )


def response_of(
    chunks: Sequence[Chunk], usage: Usage, prompt: str, details: bool
) -> GenerateResponse:
    """A whole sequence's answer; `prompt` goes in front of the text."""
    finish = chunks[-1].finish
    assert finish is not None  # noqa: S101 - the last chunk of a sequence has it
    response = GenerateResponse(
        generated_text=prompt + finish.generated_text,
        task_id=usage.task_id,
        version=usage.version,
        prefix_tokens=usage.prefix_tokens,
        prompt_tokens=usage.prompt_tokens,
    )
    if not details:
        return response
    return response.model_copy(update={"details": _details(chunks, finish, usage)})


def event_of(chunk: Chunk, usage: Usage, prompt: str) -> StreamEvent:
    """One token's event; `prompt` goes in front of the whole text."""
    finish = chunk.finish
    top = {"top_tokens": [_token(token) for token in chunk.top]} if chunk.top else {}
    return StreamEvent(
        index=chunk.index,
        token=_token(chunk.token),
        generated_text=None if finish is None else prompt + finish.generated_text,
        details=None if finish is None else StreamDetails(**_summary(finish, usage)),
        **top,
    )


def _details(chunks: Sequence[Chunk], finish: Finish, usage: Usage) -> Details:
    top = [[_token(token) for token in chunk.top] for chunk in chunks]
    fields: dict[str, Any] = {"top_tokens": top} if any(top) else {}
    return Details(
        prefill=[],
        tokens=[_token(chunk.token) for chunk in chunks],
        **fields,
        **_summary(finish, usage),
    )


def _summary(finish: Finish, usage: Usage) -> dict[str, Any]:
    return {
        "finish_reason": finish.reason.value,
        "generated_tokens": finish.generated_tokens,
        "input_length": usage.prompt_tokens,
        **asdict(usage),
    }


def _token(token: GeneratedToken) -> Token:
    return Token(id=token.id, text=token.text, logprob=token.logprob, special=token.special)
