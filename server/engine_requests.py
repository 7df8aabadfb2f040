"""From a job's inputs to requests that the engine takes."""

from __future__ import annotations

import secrets
import uuid
from dataclasses import dataclass, replace

from prefix_store.prefix import SOURCE
from prefix_store.task import TaskRecord
from server.engine.protocol import (
    CompiledGrammar,
    Engine,
    GenerationRequest,
    RequestTooLongError,
)
from server.errors import InvalidRequestError
from server.generation import GenerationJob
from server.tokenization import TextTokenizer

# Every double holds such a seed, so every JSON client can send back what it was told.
_SEED_BITS = 53


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A sequence to generate.

    Attributes:
        text: what is read; None where it came as tokens.
        repeats_prompt: true for all samples of an input but the first.
    """

    text: str | None
    request: GenerationRequest
    repeats_prompt: bool = False

    @property
    def most_tokens(self) -> int:
        """Prompt and output, if it ends at its limit."""
        return len(self.request.prompt_ids) + self.request.sampling.max_new_tokens


class RequestBuilder:
    """Tokenizes inputs, and checks that they fit."""

    def __init__(self, engine: Engine, tokenizer: TextTokenizer, *, max_beams: int) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._max_beams = max_beams

    def check(self, job: GenerationJob) -> None:
        """Refuse what can be told before anything is looked up.

        Raises:
            InvalidRequestError
        """
        if job.sampling.num_beams > self._max_beams:
            raise InvalidRequestError(
                f"num_beams is {job.sampling.num_beams}; expected at most {self._max_beams}, this "
                "server's limit, which --max-beams and --max-slots set"
            )
        if job.sampling.prompt_logprobs is not None and self._engine.spec.encoder is not None:
            raise InvalidRequestError(
                "the base model has an encoder, which reads the prompt and gives its tokens no "
                "log-probabilities; ask for those of the generated tokens only"
            )

    async def build(
        self, job: GenerationJob, record: TaskRecord | None, grammar: CompiledGrammar | None
    ) -> list[EngineRequest]:
        """Every input's samples, in the order of inputs.

        Args:
            record: the task at the version to use; None for the bare base model.

        Raises:
            InvalidRequestError, RequestTooLongError
        """
        found = []
        for position in range(len(job.inputs)):
            first = await self._first(job, position, record, grammar)
            found += [first, *_further_samples(first, job.samples)]
        return found

    async def _first(
        self,
        job: GenerationJob,
        position: int,
        record: TaskRecord | None,
        grammar: CompiledGrammar | None,
    ) -> EngineRequest:
        """The first sequence of an input."""
        where = f"{job.fields.inputs}[{position}]: " if len(job.inputs) > 1 else ""
        prompt = job.inputs[position]
        if isinstance(prompt, str):
            text = prompt
            if record is not None and record.template:
                text = record.template.replace(SOURCE, prompt)
            # A text's prefix begins with the special tokens already.
            special = record is None or record.method != "text"
            prompt_ids = await self._tokenizer.encode(text, add_special_tokens=special)
        else:
            text, prompt_ids = None, self._tokenizer.checked(prompt, where)
        if job.truncate is not None:
            prompt_ids = prompt_ids[-job.truncate :]
        if not prompt_ids:
            raise InvalidRequestError(f"{where}the input has no tokens; expected at least one")
        new_tokens = self._new_tokens(job, record, len(prompt_ids), where)
        seed = secrets.randbits(_SEED_BITS) if job.seed is None else job.seed
        request = GenerationRequest(
            request_id=uuid.uuid4().hex,
            prompt_ids=prompt_ids,
            sampling=replace(job.sampling, max_new_tokens=new_tokens, seed=seed),
            prefix_version=None if record is None else record.version,
            tenant=job.caller.tenant,
            grammar=grammar,
            priority=job.priority,
        )
        return EngineRequest(text, request)

    def _new_tokens(
        self, job: GenerationJob, record: TaskRecord | None, prompt_tokens: int, where: str
    ) -> int:
        prefix_tokens = 0 if record is None else record.prefix_length
        try:
            left = self._engine.room(prompt_tokens, prefix_tokens)
        except RequestTooLongError as error:
            raise RequestTooLongError(f"{where}{error}; {job.fields.shorter}") from None
        wanted = job.max_new_tokens
        if wanted is None:
            wanted = max(1, min(job.default_new_tokens, left))
        if wanted > left:
            limit = self._engine.max_length
            prompt = limit - left - prefix_tokens  # one token where an encoder reads the input
            total = prefix_tokens + prompt + wanted
            raise RequestTooLongError(
                f"{where}{prefix_tokens} prefix tokens + {prompt} prompt tokens + {wanted} "
                f"{job.fields.max_new_tokens} = {total} is over this server's limit of {limit}; "
                f"{job.fields.shorter}, or lower {job.fields.max_new_tokens}"
            )
        if job.sampling.min_new_tokens > wanted:
            raise InvalidRequestError(
                f"{where}min_new_tokens is {job.sampling.min_new_tokens}, and max_new_tokens is "
                f"{wanted}; expected at most that"
            )
        return wanted


def bounded(job: GenerationJob, most: int | None) -> GenerationJob:
    """The job with no more new tokens than its caller may ask for.

    Raises:
        InvalidRequestError: it asks for more.
    """
    if most is None:
        return job
    if job.max_new_tokens is None:
        return replace(job, default_new_tokens=min(job.default_new_tokens, most))
    if job.max_new_tokens > most:
        raise InvalidRequestError(
            f"{job.fields.max_new_tokens} is {job.max_new_tokens}; expected at most {most}, this "
            "caller's limit"
        )
    return job


def _further_samples(first: EngineRequest, count: int) -> list[EngineRequest]:
    """The same request for the samples after the first, each with the next seed."""
    request = first.request
    return [
        replace(
            first,
            request=replace(
                request,
                request_id=uuid.uuid4().hex,
                sampling=replace(request.sampling, seed=request.sampling.seed + number),
            ),
            repeats_prompt=True,
        )
        for number in range(1, count)
    ]
