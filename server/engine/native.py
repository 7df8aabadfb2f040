"""The native engine: `EngineCore` on a thread of its own, behind the `Engine` protocol."""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

from prefix_store.base_model import BaseModelSpec
from prefix_store.errors import IncompatiblePrefixError
from prefix_store.groups import Group
from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from prefix_store.soft_prompt import SoftPrompt
from server.engine.checks import (
    SHUTTING_DOWN,
    check_length,
    check_prompt_to_prefix,
    check_shapes,
    prefix_numbers,
)
from server.engine.choose_runner import choose_runner
from server.engine.core import EngineCore, Event
from server.engine.device_copy import DeviceCopier
from server.engine.event_stream import EventStream
from server.engine.grammar import GrammarCompiler
from server.engine.places import Places
from server.engine.prefill import Prefill
from server.engine.protocol import (
    CompiledGrammar,
    EngineConfig,
    EngineFailedError,
    EngineStats,
    GenerationRequest,
    Grammar,
    PrefixNotLoadedError,
    RequestTooLongError,
    StepObserver,
)
from server.engine.sequence import Sequence
from server.engine.special_tokens import SpecialTokens

logger = logging.getLogger(__name__)

Command = Callable[[EngineCore], None] | None
"""Something for the engine thread to do between steps; None stops the thread."""


class NativeEngine:
    """Continuous batching of a transformers model. Make, use and close it on one event loop.

    One thread owns the model. The event loop hands it commands through a queue; it hands back each
    step's events with one call into the loop.
    """

    def __init__(
        self, loaded: LoadedModel, config: EngineConfig, on_step: StepObserver | None = None
    ) -> None:
        """Take over `loaded.model` and start the thread.

        Raises:
            ModelLoadError: the model's attention cannot be batched exactly.
        """
        self._loaded = loaded
        max_length = min(config.max_length, loaded.spec.max_positions)
        self._config = replace(config, max_length=max_length)
        self._on_step = on_step
        runner = choose_runner(
            loaded,
            config.max_slots,
            max_length,
            int8=config.quantize == "int8",
            cuda_graphs=config.cuda_graphs,
        )
        special = SpecialTokens.of(loaded)
        self._core = EngineCore(runner, self._config, special)
        self._stats = self._core.stats
        self._loop = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._streams: dict[str, EventStream] = {}
        self._places = Places(config.max_slots, config.max_waiting)
        self._prefixes: dict[str, Prefix] = {}
        self._decoder_ids = () if special.decoder_start is None else (special.decoder_start,)
        self._grammars = GrammarCompiler(loaded, special.eos)
        self._copier = DeviceCopier(loaded.model.device, loaded.model.dtype)
        self._idle = asyncio.Event()
        self._idle.set()
        self._prefills = 0  # running or waiting for their turn
        self._prefilling = asyncio.Lock()
        self._chunk: Future[None] | None = None
        self._closing = False
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def spec(self) -> BaseModelSpec:
        """The base model it runs."""
        return self._loaded.spec

    @property
    def max_length(self) -> int:
        """Most positions one sequence may take: prefix + prompt + generated."""
        return self._config.max_length

    @property
    def reads_host_memory(self) -> bool:
        """See `Engine.reads_host_memory`."""
        return self._loaded.device.type == "cpu"

    @property
    def is_alive(self) -> bool:
        """See `Engine.is_alive`."""
        return self._thread.is_alive()

    def check_places(self, tenant: str, sequences: int) -> None:
        """See `Engine.check_places`."""
        self._places.check(tenant, sequences)

    def submit(self, request: GenerationRequest) -> EventStream:
        """See `Engine.submit`."""
        if self._closing:
            raise EngineFailedError(SHUTTING_DOWN)
        prefix = self._prefix_of(request)
        self._check_length(request, prefix)
        self._places.take(request)
        stream = EventStream(partial(self.cancel, request.request_id))
        self._streams[request.request_id] = stream
        self._idle.clear()
        sequence = Sequence(request, prefix, self._decoder_ids)
        self._commands.put(lambda core: core.add(sequence))
        return stream

    def cancel(self, request_id: str) -> None:
        """See `Engine.cancel`."""
        if self._forget(request_id):
            self._commands.put(lambda core: core.cancel(request_id))
            self._settle()

    def room(self, prompt_tokens: int, prefix_length: int) -> int:
        """See `Engine.room`."""
        if self.spec.encoder is None:
            return self.max_length - prefix_length - prompt_tokens
        longest = self.max_length - prefix_length
        if prompt_tokens > longest:
            raise RequestTooLongError(
                f"the input has {prompt_tokens} tokens; the encoder of {self.spec.name!r} reads at "
                f"most {longest} here"
            )
        return self.max_length - prefix_length - len(self._decoder_ids)

    def prefix_bytes(self, prefix_length: int, groups: Collection[Group]) -> int:
        """See `Engine.prefix_bytes`."""
        return prefix_numbers(self.spec, prefix_length, groups) * self._loaded.dtype.itemsize

    def prepare_prefix(self, prefix: Prefix) -> Prefix:
        """See `Engine.prepare_prefix`."""
        return self._copier.prepare(prefix)

    async def load_prefix(self, version: str, prefix: Prefix) -> None:
        """See `Engine.load_prefix`."""
        check_shapes(prefix, self.spec)
        self._prefixes[version] = await self._copier.copy(prefix)

    def drop_prefix(self, version: str) -> None:
        """See `Engine.drop_prefix`."""
        self._prefixes.pop(version, None)

    async def compute_prefix(self, prompt: tuple[int, ...] | SoftPrompt) -> Prefix:
        """See `Engine.compute_prefix`: a chunk between two steps, so that no request waits long."""
        if self.spec.encoder is not None:
            raise IncompatiblePrefixError(
                f"{self.spec.name!r} has an encoder, and what it makes of a text is no prefix: a "
                "text or a soft prompt can be a task of decoder-only models. Train a prefix."
            )
        prefill = Prefill(self._loaded, prompt)
        check_prompt_to_prefix(prefill.length, self.max_length)
        if self._closing:
            raise EngineFailedError(SHUTTING_DOWN)
        self._prefills += 1
        self._idle.clear()
        try:
            async with self._prefilling:
                for start in range(0, prefill.length, self._config.prefill_tokens):
                    end = start + self._config.prefill_tokens
                    await self._between_steps(partial(prefill.advance, start, end))
        finally:
            self._prefills -= 1
            self._settle()
        return await asyncio.to_thread(prefill.prefix)

    async def compile_grammar(self, grammar: Grammar) -> CompiledGrammar:
        """See `Engine.compile_grammar`."""
        return await self._grammars.compile(grammar)

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        return self._stats

    async def close(self, drain_seconds: float = 0.0) -> None:
        """See `Engine.close`."""
        self._closing = True
        try:
            async with asyncio.timeout(drain_seconds):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("%d requests were still running at the deadline", len(self._streams))
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)
        self._grammars.close()
        self._prefixes.clear()

    async def _between_steps(self, work: Callable[[], None]) -> None:
        """Have the engine thread do one thing more; what it raises is raised here."""
        if self._ended:
            raise EngineFailedError(SHUTTING_DOWN)
        self._chunk = done = Future[None]()
        self._commands.put(lambda _: _carry_out(work, done))
        await asyncio.wrap_future(done)

    def _prefix_of(self, request: GenerationRequest) -> Prefix | None:
        if request.prefix_version is None:
            return None
        prefix = self._prefixes.get(request.prefix_version)
        if prefix is None:
            raise PrefixNotLoadedError(f"prefix {request.prefix_version} is not loaded")
        return prefix

    def _check_length(self, request: GenerationRequest, prefix: Prefix | None) -> None:
        prefix_length = 0 if prefix is None else prefix.prefix_length
        room = self.room(len(request.prompt_ids), prefix_length)
        check_length(request, prefix_length, room=room, max_length=self.max_length)
        if request.sampling.prompt_logprobs is not None and self.spec.encoder is not None:
            raise ValueError("an encoder reads the prompt, which has no log-probabilities then")
        if not 1 <= request.sampling.num_beams <= self._config.max_slots:
            raise ValueError(f"{request.sampling.num_beams} beams, {self._config.max_slots} slots")
        if not 0 < request.weight < math.inf:
            raise ValueError(f"a weight is a number above 0, not {request.weight}")
        if request.sampling.num_beams > 1 and request.grammar is not None:
            raise ValueError("beam search follows no grammar")

    def _deliver(self, events: list[Event], stats: EngineStats) -> None:
        """On the event loop: hand each event to the request it belongs to."""
        self._stats = stats
        for request_id, event in events:
            stream = self._streams.get(request_id)
            if stream is None:  # cancelled while the step ran
                continue
            stream.push(event)
            if isinstance(event, EngineFailedError) or event.finish_reason is not None:
                self._forget(request_id)
        self._settle()

    def _forget(self, request_id: str) -> bool:
        """A request's stream gets nothing more, and its place is free; was it there?"""
        if self._streams.pop(request_id, None) is None:
            return False
        self._places.give_back(request_id)
        return True

    def _settle(self) -> None:
        if not self._streams and not self._prefills:
            self._idle.set()

    def _run(self) -> None:
        """The engine thread: commands between steps, steps while there is work."""
        reason = SHUTTING_DOWN
        try:
            while self._obey():
                result = self._core.step()
                if self._on_step is not None:
                    self._on_step(result.stats)
                self._post(result.events)
        except Exception:
            logger.exception("the engine stopped")
            reason = "the engine stopped; restart the server"
        self._call(partial(self._end, reason))

    def _end(self, reason: str) -> None:
        """On the event loop, after the thread's last step: fail whoever still waits for it."""
        self._closing = self._ended = True
        self._stats = EngineStats(0, 0, self._config.max_slots)
        for stream in self._streams.values():
            stream.push(EngineFailedError(reason))
        self._streams.clear()
        if self._chunk is not None and not self._chunk.done():
            self._chunk.set_exception(EngineFailedError(reason))
        self._settle()

    def _obey(self) -> bool:
        """Carry out the waiting commands, or wait for work; False once told to stop.

        What arrives meanwhile waits for the next step, so that a long row of commands, each sent
        when the one before is done, holds up nobody.
        """
        waiting = self._commands.qsize()
        while not self._core.has_work or waiting > 0:
            command = self._commands.get()
            waiting -= 1
            if command is None:
                return False
            command(self._core)
            self._post([])
        return True

    def _post(self, events: list[Event]) -> None:
        self._call(partial(self._deliver, events, self._core.stats))

    def _call(self, function: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop was closed without closing the engine first
            logger.warning("the event loop is gone, and what the engine gave it is lost")


def _carry_out(work: Callable[[], None], done: Future[None]) -> None:
    if not done.set_running_or_notify_cancel():
        return
    try:
        work()
    except Exception as error:
        done.set_exception(error)
    else:
        done.set_result(None)
