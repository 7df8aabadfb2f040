"""Prefixes on their way from host memory to the device."""

from __future__ import annotations

import asyncio

import torch

from prefix_store.prefix import Prefix


class DeviceCopier:
    """Copies prefixes to the model's device beside its work, never in its way.

    On CUDA a prefix is page-locked in host memory, copied on a stream of its own, and given out
    once the copy has ended, so that no kernel waits for it. On a CPU the prefix stays where it is.
    The CUDA part follows torch's documented rules for streams; it has not been run on a GPU.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        self._stream = _stream(device) if device.type == "cuda" else None

    def prepare(self, prefix: Prefix) -> Prefix:
        """The prefix in host memory, in the model's dtype; page-locked for CUDA.

        Raises:
            InvalidPrefixError: a number is too large for the model's dtype.
        """
        prefix = prefix.to("cpu", self._dtype)
        if self._stream is None:
            return prefix
        return prefix.mapped(torch.Tensor.pin_memory)

    async def copy(self, prefix: Prefix) -> Prefix:
        """The prefix on the device, ready to be read by any stream.

        Raises:
            InvalidPrefixError: a number is too large for the model's dtype.
        """
        if prefix.device == self._device and prefix.dtype == self._dtype:
            return prefix.to(self._device, self._dtype)  # made contiguous at most
        return await asyncio.to_thread(self._copy, prefix)

    def _copy(self, prefix: Prefix) -> Prefix:
        if self._stream is None:
            return prefix.to(self._device, self._dtype)
        reader = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            moved = prefix.mapped(
                lambda tensor: tensor.to(self._device, self._dtype, non_blocking=True)
            )
            copied = self._stream.record_event()
        copied.synchronize()
        for group in moved.groups.values():
            for tensor in (group.keys, group.values):
                # Memory that is freed while a step still reads it must not go to the next copy.
                tensor.record_stream(reader)
        return moved


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
