"""Between what goes over the wire and what the generator works with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from server.api.grammars import grammar_of
from server.api.parameters import Parameters
from server.api.schemas import (
    MAX_INPUTS,
    Details,
    GenerateRequest,
    GenerateResponse,
    PrefillToken,
    SequenceDetails,
    StreamDetails,
    StreamEvent,
    Token,
)
from server.callers import Caller
from server.chunks import Chunk, Finish
from server.chunks import Token as GeneratedToken
from server.engine.protocol import SamplingParams
from server.errors import InvalidRequestError
from server.generation import Generation, GenerationJob, Usage

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
    inputs = texts_of(request)
    if stream and not isinstance(request.inputs, str):
        raise InvalidRequestError(
            f"inputs is a list of {len(inputs)}; a stream takes one text. Send one request for "
            "each, or leave stream out"
        )
    sampling = _sampling(parameters)
    samples = parameters.best_of or 1
    if stream and (samples > 1 or parameters.decoder_input_details):
        raise InvalidRequestError(
            "best_of and decoder_input_details are not for streams; leave them out, or stream"
        )
    if samples > 1 and not sampling.do_sample:
        raise InvalidRequestError(
            f"best_of is {samples}, and greedy decoding would give the same text each time; set "
            "do_sample or temperature, or leave best_of out"
        )
    if samples * len(inputs) > MAX_INPUTS:
        raise InvalidRequestError(
            f"best_of is {samples}, of {len(inputs)} inputs; expected at most {MAX_INPUTS} texts "
            "in one request"
        )
    return GenerationJob(
        inputs=inputs,
        task_id=_task_id(request.task_id, parameters.adapter_id),
        caller=caller,
        sampling=sampling,
        user=request.user,
        samples=samples,
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
        prompt_logprobs=0 if parameters.details and parameters.decoder_input_details else None,
        ignore_eos=bool(parameters.ignore_eos or parameters.ignore_eos_token),
        **given,
    )


def texts_of(request: GenerateRequest) -> tuple[str, ...]:
    """The inputs, one or several."""
    return (request.inputs,) if isinstance(request.inputs, str) else tuple(request.inputs)


def response_of(
    sequences: Sequence[tuple[Sequence[Chunk], Generation]], prompt: str, details: bool
) -> GenerateResponse:
    """An input's answer: what was generated of it, the best first; `prompt` goes in front."""
    (chunks, generation), *others = sequences
    finish, usage = _finish(chunks), generation.usage
    response = GenerateResponse(
        generated_text=prompt + finish.generated_text,
        task_id=usage.task_id,
        version=usage.version,
        prefix_tokens=usage.prefix_tokens,
        prompt_tokens=usage.prompt_tokens,
    )
    if not details:
        return response
    found = _details(chunks, finish, generation)
    if others:
        best_of = [_sequence_details(*other, prompt) for other in others]
        found = found.model_copy(update={"best_of_sequences": best_of})
    return response.model_copy(update={"details": found})


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


def _finish(chunks: Sequence[Chunk]) -> Finish:
    finish = chunks[-1].finish
    assert finish is not None  # noqa: S101 - the last chunk of a sequence has it
    return finish


def _details(chunks: Sequence[Chunk], finish: Finish, generation: Generation) -> Details:
    prefill = [PrefillToken(id=t.id, text=t.text, logprob=t.logprob) for t in generation.prompt]
    return Details(prefill=prefill, **_tokens(chunks), **_summary(finish, generation.usage))


def _sequence_details(
    chunks: Sequence[Chunk], generation: Generation, prompt: str
) -> SequenceDetails:
    finish = _finish(chunks)
    return SequenceDetails(
        generated_text=prompt + finish.generated_text,
        finish_reason=finish.reason.value,
        generated_tokens=finish.generated_tokens,
        seed=generation.usage.seed,
        prefill=[],
        **_tokens(chunks),
    )


def _tokens(chunks: Sequence[Chunk]) -> dict[str, Any]:
    top = [[_token(token) for token in chunk.top] for chunk in chunks]
    fields: dict[str, Any] = {"tokens": [_token(chunk.token) for chunk in chunks]}
    return fields | ({"top_tokens": top} if any(top) else {})


def _summary(finish: Finish, usage: Usage) -> dict[str, Any]:
    return {
        "finish_reason": finish.reason.value,
        "generated_tokens": finish.generated_tokens,
        "input_length": usage.prompt_tokens,
        **asdict(usage),
    }


def _token(token: GeneratedToken) -> Token:
    return Token(id=token.id, text=token.text, logprob=token.logprob, special=token.special)
