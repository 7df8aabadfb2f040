"""vLLM's `AsyncLLM` behind the `Engine` protocol."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Collection
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import vllm
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from prefix_store.base_model import BaseModelSpec
from prefix_store.errors import ModelLoadError
from prefix_store.groups import Group
from prefix_store.model_files import ModelFiles
from prefix_store.prefix import Prefix
from prefix_store.soft_prompt import SoftPrompt
from server.engine.checks import (
    SHUTTING_DOWN,
    check_length,
    check_prompt_to_prefix,
    check_shapes,
    prefix_numbers,
)
from server.engine.event_stream import EventStream
from server.engine.places import Places
from server.engine.protocol import (
    CompiledGrammar,
    EngineConfig,
    EngineFailedError,
    EngineStats,
    GenerationRequest,
    Grammar,
    InvalidGrammarError,
    PrefixNotLoadedError,
    StepObserver,
)
from server.engine.vllm.arguments import VllmOptions, engine_arguments
from server.engine.vllm.capture import captured_prefix
from server.engine.vllm.environment import deaf_to_interrupts
from server.engine.vllm.events import Events, StepFigures
from server.engine.vllm.prefix_folder import PrefixFolder
from server.engine.vllm.sampling import to_vllm
from server.engine.vllm.transfer import PrefixUse, capture_params

logger = logging.getLogger(__name__)

_STOPPED = "the engine stopped; restart the server"


@dataclass(slots=True, eq=False)
class _Live:
    """A request that has not ended; `begun` once it has a token."""

    stream: EventStream
    work: asyncio.Task[None] | None = None
    begun: bool = False


class VllmEngine:
    """A request's prompt gets tokens in its prefix's place, which are never read.

    Make, use and close it on one event loop. vLLM computes in processes of its own, which read
    prefixes from files in memory (`PrefixFolder`) through `PrefixConnector`.
    """

    def __init__(
        self,
        files: ModelFiles,
        config: EngineConfig,
        options: VllmOptions,
        on_step: StepObserver = lambda _: None,
    ) -> None:
        """Start vLLM and wait for it, which takes from seconds to minutes.

        Raises:
            ModelLoadError: vLLM cannot run this model, or not here.
        """
        self._files = files
        max_length = min(config.max_length, files.spec.max_positions)
        self._config = replace(config, max_length=max_length)
        self._figures = StepFigures(self.stats, on_step)
        self._folder = PrefixFolder()
        self._places = Places(config.max_slots, config.max_waiting)
        self._live: dict[str, _Live] = {}
        self._computing: set[asyncio.Task[Any]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False
        try:
            with deaf_to_interrupts():
                self._llm = AsyncLLM.from_engine_args(
                    engine_arguments(files, self._config, options, self._folder.path),
                    stat_loggers=[lambda *_: self._figures],
                )
        except Exception as error:
            self._folder.close()
            raise ModelLoadError(f"vLLM cannot run {files.spec.name!r}: {error}") from error

    @property
    def spec(self) -> BaseModelSpec:
        """The base model it runs."""
        return self._files.spec

    @property
    def max_length(self) -> int:
        """Most positions one sequence may take: prefix + prompt + generated."""
        return self._config.max_length

    @property
    def reads_host_memory(self) -> bool:
        """See `Engine.reads_host_memory`: the prefixes' files are there, whatever vLLM runs on."""
        return True

    @property
    def is_alive(self) -> bool:
        """See `Engine.is_alive`."""
        return not self._llm.errored

    def check_places(self, tenant: str, sequences: int) -> None:
        """See `Engine.check_places`."""
        self._places.check(tenant, sequences)

    def submit(self, request: GenerationRequest) -> EventStream:
        """See `Engine.submit`."""
        self._check_open()
        use = self._use_of(request)
        length = 0 if use is None else use.length
        room = self.room(len(request.prompt_ids), length)
        check_length(request, length, room=room, max_length=self.max_length)
        sampling = to_vllm(request.sampling, {} if use is None else use.params())
        self._places.take(request)
        if use is not None:
            self._folder.acquire(use.version)
        live = _Live(EventStream(partial(self.cancel, request.request_id)))
        live.work = asyncio.create_task(self._generate(request, use, sampling, live))
        # Not at the end of the coroutine: one that is cancelled at once never begins.
        live.work.add_done_callback(lambda _: self._ended(request.request_id, use, live))
        self._live[request.request_id] = live
        self._idle.clear()
        return live.stream

    def cancel(self, request_id: str) -> None:
        """See `Engine.cancel`."""
        live = self._live.get(request_id)
        if live is not None and live.work is not None:
            self._forget(request_id, live)
            live.work.cancel()

    def room(self, prompt_tokens: int, prefix_length: int) -> int:
        """See `Engine.room`."""
        return self.max_length - prefix_length - prompt_tokens

    def prefix_bytes(self, prefix_length: int, groups: Collection[Group]) -> int:
        """See `Engine.prefix_bytes`."""
        return prefix_numbers(self.spec, prefix_length, groups) * self._files.dtype.itemsize

    def prepare_prefix(self, prefix: Prefix) -> Prefix:
        """See `Engine.prepare_prefix`."""
        return prefix.to("cpu", self._files.dtype)

    async def load_prefix(self, version: str, prefix: Prefix) -> None:
        """See `Engine.load_prefix`."""
        check_shapes(prefix, self.spec)
        await asyncio.to_thread(self._folder.write, version, prefix)
        self._folder.add(version, prefix.prefix_length)

    def drop_prefix(self, version: str) -> None:
        """See `Engine.drop_prefix`."""
        self._folder.drop(version)

    async def compute_prefix(self, prompt: tuple[int, ...] | SoftPrompt) -> Prefix:
        """See `Engine.compute_prefix`: a request of one token, whose keys and values are kept."""
        length = prompt.prefix_length if isinstance(prompt, SoftPrompt) else len(prompt)
        check_prompt_to_prefix(length, self.max_length)
        self._check_open()
        work = asyncio.create_task(self._capture(prompt))
        self._computing.add(work)
        self._idle.clear()
        try:
            return await work
        except asyncio.CancelledError:
            if work.cancelled() and self._closing:
                raise EngineFailedError(SHUTTING_DOWN) from None
            work.cancel()
            raise
        finally:
            self._computing.discard(work)
            self._settle()

    async def compile_grammar(self, grammar: Grammar) -> CompiledGrammar:
        """See `Engine.compile_grammar`: there are none here."""
        raise InvalidGrammarError(
            f"a grammar ({grammar.kind}) needs a server that generates with --engine native; this "
            "one generates with vLLM; leave it out"
        )

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        begun = sum(live.begun for live in self._live.values())
        running = min(len(self._live), max(begun, self._figures.running))
        return EngineStats(running, len(self._live) - running, self._config.max_slots)

    async def close(self, drain_seconds: float = 0.0) -> None:
        """See `Engine.close`."""
        self._closing = True
        try:
            async with asyncio.timeout(drain_seconds):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("%d requests were still running at the deadline", len(self._live))
        for live in self._live.values():
            live.stream.push(EngineFailedError(SHUTTING_DOWN))
        works = [*(live.work for live in self._live.values() if live.work), *self._computing]
        self._live.clear()
        for work in works:
            work.cancel()
        await asyncio.gather(*works, return_exceptions=True)
        await asyncio.to_thread(self._llm.shutdown)
        self._folder.close()

    def _check_open(self) -> None:
        if self._closing:
            raise EngineFailedError(SHUTTING_DOWN)
        if self._llm.errored:
            raise EngineFailedError(_STOPPED)

    def _use_of(self, request: GenerationRequest) -> PrefixUse | None:
        version = request.prefix_version
        if version is None:
            return None
        length = self._folder.prefix_length(version)
        if length is None:
            raise PrefixNotLoadedError(f"prefix {version} is not loaded")
        return PrefixUse(version, length)

    async def _generate(
        self,
        request: GenerationRequest,
        use: PrefixUse | None,
        sampling: vllm.SamplingParams,
        live: _Live,
    ) -> None:
        """Hand on what vLLM answers, until the request ends or is cancelled."""
        events = Events(request.sampling.top_logprobs)
        outputs = self._llm.generate(
            _prompt(request, use), sampling, request.request_id, priority=-request.priority
        )
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    for event in events.of(output):
                        live.begun = True
                        if event.finish_reason is not None:
                            self._forget(request.request_id, live)
                        live.stream.push(event)
        except EngineFailedError as error:
            self._fail(request.request_id, live, error)
        except Exception as error:
            if not self._llm.errored:
                logger.exception("vLLM failed on a request")
            reason = _STOPPED if self._llm.errored else f"vLLM refused the request: {error}"
            self._fail(request.request_id, live, EngineFailedError(reason))

    def _fail(self, request_id: str, live: _Live, error: EngineFailedError) -> None:
        self._forget(request_id, live)
        live.stream.push(error)

    def _ended(self, request_id: str, use: PrefixUse | None, live: _Live) -> None:
        if use is not None:
            self._folder.release(use.version)
        self._forget(request_id, live)

    def _forget(self, request_id: str, live: _Live) -> None:
        """Free a request's place, before anybody is told that it ended."""
        if self._live.get(request_id) is live:
            del self._live[request_id]
            self._places.give_back(request_id)
            self._settle()

    async def _capture(self, prompt: tuple[int, ...] | SoftPrompt) -> Prefix:
        name = uuid.uuid4().hex
        sampling = vllm.SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            extra_args={"kv_transfer_params": capture_params(name)},
        )
        # A salt of its own: what vLLM has in its memory already would not be computed.
        if isinstance(prompt, SoftPrompt):
            method, embeddings = prompt.method, prompt.embeddings.to(self._files.dtype)
            inputs: Any = {"prompt_embeds": embeddings, "cache_salt": name}
        else:
            method, inputs = "text", {"prompt_token_ids": list(prompt), "cache_salt": name}
        try:
            async with aclosing(self._llm.generate(inputs, sampling, name)) as outputs:
                async for output in outputs:
                    failed = output.finished and output.outputs[0].finish_reason == "error"
            if failed:
                raise EngineFailedError("the step this text was in failed; try again")
        except EngineDeadError as error:
            raise EngineFailedError(_STOPPED) from error
        return await asyncio.to_thread(captured_prefix, self._folder.path, name, self.spec, method)

    def _settle(self) -> None:
        if not self._live and not self._computing:
            self._idle.set()


def _prompt(request: GenerationRequest, use: PrefixUse | None) -> Any:
    if use is None:
        return {"prompt_token_ids": list(request.prompt_ids)}
    # Penalties count what is in the prefix's place, so it is a token that the prompt has anyway.
    # Else it is the same for every request, which lets those of one version share its memory.
    penalised = request.sampling.repetition_penalty != 1.0
    place = request.prompt_ids[0] if penalised else 0
    return {
        "prompt_token_ids": [place] * use.length + list(request.prompt_ids),
        "cache_salt": use.version,
    }
