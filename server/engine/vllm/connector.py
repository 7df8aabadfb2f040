"""A vLLM KV connector: a task's prefix is keys and values that somebody else has computed.

A request's prompt begins with as many tokens as its prefix has positions, whatever they are. vLLM
is told that their keys and values come from outside, gives them blocks of its memory, and has this
connector fill these before the step that needs them; once more where a request lost its memory to
others. See `docs/vllm.md` for its use with `vllm serve`.

vLLM makes one connector in its scheduler, which plans, and one in each worker, which has the
model's layers, or a part of them, and of each layer its own part of the heads.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)

from server.engine.vllm.capture import Capture, CapturePlanner, Captures
from server.engine.vllm.loading import Loader, attention_layers, slots_of
from server.engine.vllm.source import FolderSource, PrefixSource, PrefixUnavailableError
from server.engine.vllm.transfer import PrefixUse

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Load:
    """Positions of a prefix for one step to load.

    Attributes:
        start: those before are in vLLM's memory already.
        block_ids: where the request's positions are, in order.
    """

    use: PrefixUse
    start: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepPlan(KVConnectorMetadata):
    """What the workers do in one step."""

    loads: tuple[Load, ...] = ()
    captures: tuple[Capture, ...] = ()


class PrefixConnector(KVConnectorBase_V1):
    """Loads prefixes by version, and where it is told so, captures those of texts.

    `kv_connector_extra_config` has `prefix_folder`, where each version is a file as
    `prefixserve export` writes it, and may have `capture_folder`.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self._extra: dict[str, Any] = transfer.kv_connector_extra_config if transfer else {}
        self._config = vllm_config
        self._block_size = vllm_config.cache_config.block_size
        self._loads: list[Load] = []
        self._planner = CapturePlanner(self._block_size)
        self._failed_blocks: set[int] = set()
        if role is KVConnectorRole.WORKER:
            self._loader = Loader.of(self.open_source(self._extra), vllm_config)
            folder = self._extra.get("capture_folder")
            first_head = self._loader.heads.start
            self._captures = Captures(Path(folder), first_head) if folder else None

    @classmethod
    def open_source(cls, extra_config: dict[str, Any]) -> PrefixSource:
        """Where prefixes come from; called in each worker."""
        return FolderSource(Path(extra_config["prefix_folder"]))

    # In the scheduler.

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """How many of the prompt's tokens come from outside, beyond those in vLLM's memory."""
        use = PrefixUse.of(request)
        return 0 if use is None else max(0, use.length - num_computed_tokens), False

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Plan the load of positions that now have memory."""
        block_ids = tuple(blocks.get_block_ids()[0])
        use = PrefixUse.of(request)
        if use is not None and num_external_tokens > 0:
            self._loads.append(Load(use, use.length - num_external_tokens, block_ids))
        if "capture_folder" in self._extra:
            self._planner.begin(request, block_ids)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepPlan:
        """The plan of one step; the next one starts empty."""
        plan = StepPlan(tuple(self._loads), tuple(self._planner.step(scheduler_output)))
        self._loads.clear()
        return plan

    # In each worker.

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Before a step: take its plan, and watch what it computes of prompts to capture."""
        super().bind_connector_metadata(connector_metadata)
        if self._captures is not None:
            self._captures.watch(self._plan().captures, self._layers)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Write every planned prefix where the step that begins will read it."""
        for load in self._plan().loads:
            try:
                self._load(load)
            except PrefixUnavailableError as error:
                # Raising would end vLLM; its request alone is to fail.
                logger.error("%s", error)
                self._failed_blocks.update(load.block_ids)

    def _load(self, load: Load) -> None:
        if load.use.problem:
            raise PrefixUnavailableError(f"prefix {load.use.version}: {load.use.problem}")
        positions = range(load.start, load.use.length)
        device = next(iter(self._layers.values())).kv_cache.device
        slots = torch.tensor(slots_of(load.block_ids, positions, self._block_size), device=device)
        self._loader.load(self._layers, load.use.version, positions, slots)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of requests whose prefix could not be had, told once."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def wait_for_save(self) -> None:
        """After the step: write what was captured."""
        if self._captures is not None:
            self._captures.finish(self._plan().captures)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Nothing is transferred between steps."""
        if self._captures is not None:
            self._captures.forget(finished_req_ids)
        return None, None

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Every layer was loaded before the step."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Nothing is saved layer by layer."""

    @cached_property
    def _layers(self) -> dict[int, Any]:
        return attention_layers(self._config.compilation_config.static_forward_context)

    def _plan(self) -> StepPlan:
        plan = self._get_connector_metadata()
        assert isinstance(plan, StepPlan)  # noqa: S101 - `build_connector_meta` made it
        return plan
