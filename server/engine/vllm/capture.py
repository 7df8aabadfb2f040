"""Keys and values of a whole prompt, taken from vLLM while it computes them.

A worker's memory has a layout of its own, which only its attention kernels know. So what is written
to it is noted on the way: the same call that loads a prefix, the other way round.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from vllm.v1.core.sched.output import SchedulerOutput

from prefix_store.base_model import BaseModelSpec
from prefix_store.prefix import Prefix
from server.engine.protocol import EngineFailedError
from server.engine.vllm.loading import slots_of
from server.engine.vllm.transfer import capture_name

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclass(frozen=True, slots=True)
class Capture:
    """Positions of a prompt that one step computes, in order.

    Attributes:
        name: of the files that they go to.
        slots: where the step puts them.
        first, last: whether the prompt begins or ends with them.
    """

    request_id: str
    name: str
    slots: tuple[int, ...]
    first: bool
    last: bool


@dataclass(slots=True)
class _Prompt:
    name: str
    length: int
    block_ids: list[int]
    computed: int = 0


class CapturePlanner:
    """In the scheduler: follows prompts that are captured from step to step."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._prompts: dict[str, _Prompt] = {}

    def begin(self, request: Request, block_ids: Sequence[int]) -> None:
        """Follow a request, if it is one to be captured, that is scheduled from its beginning."""
        name = capture_name(request)
        if name is not None:
            prompt = _Prompt(name, request.num_prompt_tokens, list(block_ids))
            self._prompts[request.request_id] = prompt

    def step(self, output: SchedulerOutput) -> Iterator[Capture]:
        """What is captured in a step."""
        for gone in output.finished_req_ids:
            self._prompts.pop(gone, None)
        cached = output.scheduled_cached_reqs
        for request_id, new in zip(cached.req_ids, cached.new_block_ids, strict=True):
            resumed = request_id in cached.resumed_req_ids  # begun again, with all its blocks
            if request_id in self._prompts and new is not None and not resumed:
                self._prompts[request_id].block_ids += new[0]
        for request_id in [i for i in self._prompts if i in output.num_scheduled_tokens]:
            prompt = self._prompts[request_id]
            start = prompt.computed
            prompt.computed = min(prompt.length, start + output.num_scheduled_tokens[request_id])
            last = prompt.computed == prompt.length
            slots = slots_of(prompt.block_ids, range(start, prompt.computed), self._block_size)
            yield Capture(request_id, prompt.name, tuple(slots), start == 0, last)
            if last:
                del self._prompts[request_id]


@dataclass(slots=True)
class _Taken:
    """By layer: pieces of keys and of values, `[positions, heads, head_dim]` each."""

    keys: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    values: dict[int, list[torch.Tensor]] = field(default_factory=dict)


class Captures:
    """In a worker: takes what its layers write, and puts whole prompts into files."""

    def __init__(self, folder: Path, first_head: int) -> None:
        self._folder = folder
        self._first_head = first_head
        self._taken: dict[str, _Taken] = {}
        self._watched: list[Any] = []

    def watch(self, captures: Sequence[Capture], layers: Mapping[int, Any]) -> None:
        """Take what the step computes that is about to run, until `finish`."""
        for capture in captures:
            if capture.first:
                self._taken[capture.request_id] = _Taken()
        if captures:
            for index, layer in layers.items():
                self._watch(index, layer.impl, captures)

    def finish(self, captures: Sequence[Capture]) -> None:
        """After the step: write the prompts that are complete."""
        for impl in self._watched:
            del impl.do_kv_cache_update
        self._watched.clear()
        for capture in captures:
            if capture.last:
                self._write(capture.name, self._taken.pop(capture.request_id))

    def forget(self, request_ids: Sequence[str] | set[str]) -> None:
        """Drop what was taken of requests that ended before their prompts did."""
        for request_id in request_ids:
            self._taken.pop(request_id, None)

    def _watch(self, index: int, impl: Any, captures: Sequence[Capture]) -> None:
        update = impl.do_kv_cache_update

        def update_and_take(
            layer: Any, key: torch.Tensor, value: torch.Tensor, cache: Any, slots: torch.Tensor
        ) -> None:
            update(layer, key, value, cache, slots)
            for capture in captures:
                wanted = torch.tensor(capture.slots, device=slots.device)
                rows = torch.isin(slots, wanted).nonzero()[:, 0]
                taken = self._taken[capture.request_id]
                taken.keys.setdefault(index, []).append(key[rows].cpu())
                taken.values.setdefault(index, []).append(value[rows].cpu())

        impl.do_kv_cache_update = update_and_take
        self._watched.append(impl)

    def _write(self, name: str, taken: _Taken) -> None:
        tensors = {
            f"{kind}.{index}.{self._first_head}": torch.cat(pieces).transpose(0, 1).contiguous()
            for kind, layers in (("keys", taken.keys), ("values", taken.values))
            for index, pieces in layers.items()
        }
        save_file(tensors, self._folder / f"{name}.{os.getpid()}")


def captured_prefix(folder: Path, name: str, spec: BaseModelSpec, method: str) -> Prefix:
    """The prefix of which every worker has written its part; the files are deleted.

    Raises:
        InvalidPrefixError: a key or value is not finite.
        EngineFailedError: no worker has written anything.
    """
    parts: dict[str, torch.Tensor] = {}
    for path in folder.glob(f"{name}.*"):
        parts |= load_file(path)
        path.unlink()
    if not parts:
        raise EngineFailedError("vLLM computed the text and did not tell its keys and values")
    first = next(iter(parts.values()))
    shape = (2, spec.num_layers, spec.num_kv_heads, *first.shape[1:])
    whole = torch.full(shape, torch.nan, dtype=first.dtype)
    for key, part in parts.items():
        kind, layer, head = key.split(".")
        start = int(head)
        whole[int(kind == "values"), int(layer), start : start + len(part)] = part
    return Prefix.of(
        whole[0],
        whole[1],
        method=method,
        base_model=spec.name,
        fingerprint=spec.fingerprint,
    )
