"""Text to text: have the prefix ready, run every input on the engine, detokenize."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

from prefix_store.errors import CorruptArtefactError, UnknownVersionError
from prefix_store.task import TaskRecord
from prefix_store.task_id import name_for
from server import structured_output
from server.accounting.account import Accounting
from server.callers import Caller
from server.chunks import TextAssembler
from server.engine.protocol import Engine, EngineFailedError, GenerationRequest
from server.engine_requests import RequestBuilder, bounded
from server.errors import DrainingError
from server.generation import Generation, GenerationJob, Usage
from server.metrics import Metrics
from server.request_context import current_request
from server.residency import ResidentPrefixes
from server.sequence_clock import SequenceClock
from server.tasks import TaskService
from server.tokenization import TextTokenizer


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
        self._requests = RequestBuilder(engine, tokenizer, max_beams=max_beams)
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
        self._requests.check(job)
        self._tell_log(job)
        # Of a flood most is refused: before it costs anything, the time of others above all.
        self._engine.check_places(job.caller.tenant, job.num_sequences * job.sampling.num_beams)
        account = await stack.enter_async_context(
            self._accounting.call(job.caller, job.num_sequences)
        )
        record, split = await self._lease(job, stack)
        job = bounded(job, account.max_new_tokens)
        grammar = await structured_output.compiled(self._engine, job.grammar, job.sampling)
        requests = await self._requests.build(job, record, grammar)
        await account.reserve([one.most_tokens for one in requests])
        label = self._metrics.tasks.known(None if record is None else record.task_id)
        generations = []
        for position, one in enumerate(requests):
            request = one.request
            stream = self._engine.submit(replace(request, weight=account.weight))
            stack.push_async_callback(stream.aclose)
            usage = _usage(request, job.caller, record)
            # The samples of one prompt count it once, as clients are told.
            counts = (usage.prompt_tokens, usage.prefix_tokens)
            read = (0, 0) if one.repeats_prompt else counts
            clock = SequenceClock(self._metrics, label, started, request, prompt_tokens=read[0])
            stack.callback(clock.ended)
            if record is not None and split:
                clock.compare(self._metrics.splits.started(label, record.version))
            generations.append(
                Generation(
                    usage,
                    prompt_text=one.text,
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


def _usage(request: GenerationRequest, caller: Caller, record: TaskRecord | None) -> Usage:
    return Usage(
        task_id=None if record is None else name_for(caller.tenant, record.task_id),
        version=None if record is None else record.version,
        prefix_tokens=0 if record is None else record.prefix_length,
        prompt_tokens=len(request.prompt_ids),
        seed=request.sampling.seed if request.sampling.do_sample else None,
    )
