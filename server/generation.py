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
from server import structured_output
from server.accounting.account import Accounting, SequenceAccount
from server.callers import Caller
from server.chunks import Chunk, TextAssembler
from server.engine.protocol import (
    CompiledGrammar,
    Engine,
    EngineFailedError,
    GenerationRequest,
    Grammar,
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


@dataclass(frozen=True, slots=True)
class GenerationJob:
    """What one call asks for: every input generated in the same way.

    Attributes:
        task_id: whose prefix to use; None for the bare base model.
        caller: who asks.
        sampling: its `max_new_tokens` and `seed` are replaced by the two below.
        user: whoever it is for; gets the same version of a split task each time.
        max_new_tokens: None for up to `default_new_tokens`, fewer where fewer fit.
        seed: None for a random one for each input.
        stop: strings that end the text.
        truncate: keep only so many tokens of a prompt, its last.
        grammar: what each text must be; None for any text.
    """

    inputs: tuple[str, ...]
    task_id: str | None
    caller: Caller
    sampling: SamplingParams
    user: str | None = None
    max_new_tokens: int | None = None
    default_new_tokens: int = DEFAULT_NEW_TOKENS
    seed: int | None = None
    stop: tuple[str, ...] = ()
    truncate: int | None = None
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What a sequence was generated from.

    Attributes:
        task_id, version: the prefix used; None for the bare base model.
        prefix_tokens, prompt_tokens: positions taken before the first generated token.
        seed: what sampling was seeded with; None for greedy decoding.
    """

    task_id: str | None
    version: str | None
    prefix_tokens: int
    prompt_tokens: int
    seed: int | None


class Generation:
    """One sequence on its way. Iterate once."""

    def __init__(
        self,
        usage: Usage,
        stream: TokenStream,
        text: TextAssembler,
        clock: SequenceClock,
        account: SequenceAccount,
    ) -> None:
        self.usage = usage
        self._stream = stream
        self._text = text
        self._clock = clock
        self._account = account

    async def __aiter__(self) -> AsyncGenerator[Chunk]:
        """Its tokens as they come.

        Raises:
            EngineFailedError: there will be no more.
        """
        async for event in self._stream:
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
        self._tell_log(job)
        account = await stack.enter_async_context(
            self._accounting.call(job.caller, len(job.inputs))
        )
        record, split = await self._lease(job, stack)
        job = _bounded(job, account.max_new_tokens)
        grammar = await structured_output.compiled(self._engine, job.grammar, job.sampling)
        requests = [
            await self._request(job, position, record, grammar)
            for position in range(len(job.inputs))
        ]
        await account.reserve(
            [len(request.prompt_ids) + request.sampling.max_new_tokens for request in requests]
        )
        label = self._metrics.tasks.known(job.task_id)
        generations = []
        for position, request in enumerate(requests):
            stream = self._engine.submit(replace(request, weight=account.weight))
            stack.push_async_callback(stream.aclose)
            clock = SequenceClock(self._metrics, label, started, request)
            stack.callback(clock.ended)
            if record is not None and split:
                clock.compare(self._metrics.splits.started(label, record.version))
            text = TextAssembler(self._tokenizer, job.stop)
            usage = _usage(request, record)
            sequence = account.sequence(
                position, usage.task_id, usage.prompt_tokens, usage.prefix_tokens
            )
            generations.append(Generation(usage, stream, text, clock, sequence))
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
            task = await self._tasks.resolve(job.task_id, anew=anew)
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

    async def _request(
        self,
        job: GenerationJob,
        position: int,
        record: TaskRecord | None,
        grammar: CompiledGrammar | None,
    ) -> GenerationRequest:
        where = f"inputs[{position}]: " if len(job.inputs) > 1 else ""
        prompt_ids = await self._prompt_ids(job.inputs[position], record)
        if job.truncate is not None:
            prompt_ids = prompt_ids[-job.truncate :]
        if not prompt_ids:
            raise InvalidRequestError(f"{where}the input has no tokens; expected at least one")
        new_tokens = self._new_tokens(job, record, len(prompt_ids), where)
        seed = secrets.randbits(_SEED_BITS) if job.seed is None else job.seed
        return GenerationRequest(
            request_id=uuid.uuid4().hex,
            prompt_ids=prompt_ids,
            sampling=replace(job.sampling, max_new_tokens=new_tokens, seed=seed),
            prefix_version=None if record is None else record.version,
            tenant=job.caller.tenant,
            grammar=grammar,
        )

    async def _prompt_ids(self, inputs: str, record: TaskRecord | None) -> tuple[int, ...]:
        if record is None:
            return await self._tokenizer.encode(inputs)
        text = record.template.replace(SOURCE, inputs) if record.template else inputs
        # A text's prefix begins with the special tokens already.
        return await self._tokenizer.encode(text, add_special_tokens=record.method != "text")

    def _new_tokens(
        self, job: GenerationJob, record: TaskRecord | None, prompt_tokens: int, where: str
    ) -> int:
        prefix_tokens = 0 if record is None else record.prefix_length
        try:
            left = self._engine.room(prompt_tokens, prefix_tokens)
        except RequestTooLongError as error:
            raise RequestTooLongError(f"{where}{error}") from None
        wanted = job.max_new_tokens or max(1, min(job.default_new_tokens, left))
        if wanted > left:
            limit = self._engine.max_length
            prompt = limit - left - prefix_tokens  # one token where an encoder reads the input
            total = prefix_tokens + prompt + wanted
            raise RequestTooLongError(
                f"{where}{prefix_tokens} prefix tokens + {prompt} prompt tokens + {wanted} "
                f"max_new_tokens = {total} is over this server's limit of {limit}; shorten the "
                "input, set truncate, or lower max_new_tokens"
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
            f"max_new_tokens is {job.max_new_tokens}; expected at most {most}, this caller's limit"
        )
    return job


def _usage(request: GenerationRequest, record: TaskRecord | None) -> Usage:
    return Usage(
        task_id=None if record is None else record.task_id,
        version=None if record is None else record.version,
        prefix_tokens=0 if record is None else record.prefix_length,
        prompt_tokens=len(request.prompt_ids),
        seed=request.sampling.seed if request.sampling.do_sample else None,
    )
