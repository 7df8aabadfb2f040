"""Text to text: tokenize, have the prefix ready, run on the engine, detokenize."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

from prefix_store.errors import CorruptArtefactError, UnknownVersionError
from prefix_store.prefix import SOURCE
from prefix_store.task import TaskRecord
from prefix_store.task_id import name_for
from server import structured_output
from server.accounting.account import Accounting, SequenceAccount
from server.callers import Caller
from server.chunks import Chunk, ScoredToken, TextAssembler
from server.engine.protocol import (
    CompiledGrammar,
    Engine,
    EngineFailedError,
    GenerationRequest,
    Grammar,
    PromptEvent,
    RequestTooLongError,
    SamplingParams,
    TokenStream,
)
from server.errors import DrainingError, InvalidRequestError
from server.metrics import Metrics
from server.request_context import current_request
from server.residency import ResidentPrefixes
from server.sequence_clock import SequenceClock
from server.tasks import TaskService
from server.tokenization import TextTokenizer

DEFAULT_NEW_TOKENS = 100
# Every double holds such a seed, so every JSON client can send back what it was told.
_SEED_BITS = 53

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


class Generator:
    """Runs generation jobs on the engine."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: TextTokenizer,
        tasks: TaskService,
        prefixes: ResidentPrefixes,
        metrics: Metrics,
        *,
        accounting: Accounting,
        max_beams: int,
        log_prompts: bool = False,
    ) -> None:
        """
        Args:
            accounting: counts what callers use, and holds them to their limits.
            log_prompts: write inputs to the log.
        """
        self._engine = engine
        self._accounting = accounting
        self._max_beams = max_beams
        self._log_prompts = log_prompts
        self._tokenizer = tokenizer
        self._tasks = tasks
        self._prefixes = prefixes
        self._metrics = metrics
        self._draining = False

    @property
    def draining(self) -> bool:
        """True once new jobs are refused."""
        return self._draining

    def drain(self) -> None:
        """Refuse new jobs from now on; those that run go on."""
        self._draining = True

    @asynccontextmanager
    async def run(self, job: GenerationJob) -> AsyncIterator[list[Generation]]:
        """Start every input of a job, or none. Leaving the context stops what still runs.

        Raises:
            UnknownTaskError, StoreUnavailableError, InvalidPrefixError: its task's prefix cannot
                be had.
            PrefixTooLargeError, CacheFullError: there is no room for it.
            LimitExceededError: the caller's limits do not allow it now.
            InvalidRequestError, InvalidGrammarError, RequestTooLongError, QueueFullError,
            EngineFailedError, DrainingError
        """
        if self._draining:
            raise DrainingError("the server is shutting down; try again")
        try:
            async with AsyncExitStack() as stack:
                yield await self._start(job, stack)
        except EngineFailedError as error:
            if self._draining:
                raise DrainingError("the server shut down before the end; try again") from error
            raise

    async def _start(self, job: GenerationJob, stack: AsyncExitStack) -> list[Generation]:
        """Submit every input; what must be undone at the end goes on `stack`."""
        started = time.perf_counter()
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
        self._tell_log(job)
        account = await stack.enter_async_context(
            self._accounting.call(job.caller, len(job.inputs) * job.samples)
        )
        record, split = await self._lease(job, stack)
        job = _bounded(job, account.max_new_tokens)
        grammar = await structured_output.compiled(self._engine, job.grammar, job.sampling)
        prompts = [await self._prompt(job, at, record, grammar) for at in range(len(job.inputs))]
        requests = [
            (text, request) for text, first in prompts for request in _samples(first, job.samples)
        ]
        await account.reserve([_most_tokens(request) for _, request in requests])
        label = self._metrics.tasks.known(None if record is None else record.task_id)
        generations = []
        for position, (prompt_text, request) in enumerate(requests):
            stream = self._engine.submit(replace(request, weight=account.weight))
            stack.push_async_callback(stream.aclose)
            usage = _usage(request, job.caller, record)
            # The samples of one prompt count it once, as clients are told.
            counts = (usage.prompt_tokens, usage.prefix_tokens)
            read = counts if position % job.samples == 0 else (0, 0)
            clock = SequenceClock(self._metrics, label, started, request, prompt_tokens=read[0])
            stack.callback(clock.ended)
            if record is not None and split:
                clock.compare(self._metrics.splits.started(label, record.version))
            generations.append(
                Generation(
                    usage,
                    prompt_text=prompt_text,
                    prompt_ids=request.prompt_ids,
                    stream=stream,
                    text=TextAssembler(self._tokenizer, job.stop),
                    clock=clock,
                    account=account.sequence(position, usage.task_id, *read),
                )
            )
        return generations

    def _tell_log(self, job: GenerationJob) -> None:
        facts = current_request().facts
        facts["task"] = job.task_id
        if self._log_prompts:
            facts["inputs"] = list(job.inputs)

    async def _lease(
        self, job: GenerationJob, stack: AsyncExitStack
    ) -> tuple[TaskRecord | None, bool]:
        """The task at the version to use, ready for as long as `stack` is open; is it split?"""
        if job.task_id is None:
            return None, False
        for anew in (False, True):  # its version may have been dropped since it was looked up
            task = await self._tasks.resolve(job.caller.tenant, job.task_id, anew=anew)
            record = task.chosen(job.user)
            started = time.time_ns()
            try:
                await stack.enter_async_context(self._prefixes.lease(record))
            except UnknownVersionError:
                continue
            current_request().timed("prefix load", started, time.time_ns(), version=record.version)
            return record, bool(task.split)
        raise CorruptArtefactError(
            f"task {job.task_id!r} is at version {record.version}, which the store does not have; "
            "upload the prefix again"
        )

    async def _prompt(
        self,
        job: GenerationJob,
        position: int,
        record: TaskRecord | None,
        grammar: CompiledGrammar | None,
    ) -> tuple[str | None, GenerationRequest]:
        """An input's text, None where it came as tokens, and the first sequence of it."""
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
        return text, request

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


def _bounded(job: GenerationJob, most: int | None) -> GenerationJob:
    """The job with no more new tokens than its caller may ask for."""
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


def _samples(first: GenerationRequest, count: int) -> list[GenerationRequest]:
    """The same request so many times, each with the next seed."""
    others = [
        replace(
            first,
            request_id=uuid.uuid4().hex,
            sampling=replace(first.sampling, seed=first.sampling.seed + number),
        )
        for number in range(1, count)
    ]
    return [first, *others]


def _most_tokens(request: GenerationRequest) -> int:
    return len(request.prompt_ids) + request.sampling.max_new_tokens


def _usage(request: GenerationRequest, caller: Caller, record: TaskRecord | None) -> Usage:
    return Usage(
        task_id=None if record is None else name_for(caller.tenant, record.task_id),
        version=None if record is None else record.version,
        prefix_tokens=0 if record is None else record.prefix_length,
        prompt_tokens=len(request.prompt_ids),
        seed=request.sampling.seed if request.sampling.do_sample else None,
    )
