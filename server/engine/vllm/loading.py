"""Writing prefixes into a worker's part of vLLM's memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.utils import extract_layer_index

from server.engine.vllm.shards import own_heads
from server.engine.vllm.source import PrefixSource, PrefixUnavailableError


def attention_layers(named: Mapping[str, Any]) -> dict[int, Any]:
    """A worker's attention layers by their number in the whole model."""
    return {
        extract_layer_index(name): layer
        for name, layer in named.items()
        if hasattr(getattr(layer, "impl", None), "do_kv_cache_update")
    }


def slots_of(block_ids: Sequence[int], positions: range, block_size: int) -> list[int]:
    """Where positions of a request are in vLLM's memory."""
    return [block_ids[p // block_size] * block_size + p % block_size for p in positions]


@dataclass(frozen=True, slots=True)
class Loader:
    """Loads prefixes into one worker.

    Attributes:
        shape: number of layers, key-value heads, and numbers of each head of the whole model.
        heads: this worker's part of the heads.
    """

    source: PrefixSource
    shape: tuple[int, int, int]
    heads: slice

    @classmethod
    def of(cls, source: PrefixSource, vllm_config: VllmConfig) -> Loader:
        """For the worker in whose process this is called."""
        model = vllm_config.model_config
        heads = model.get_total_num_kv_heads()
        rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        shape = (model.get_total_num_hidden_layers(), heads, model.get_head_size())
        return cls(source, shape, own_heads(heads, rank, size))

    def load(self, layers: Mapping[int, Any], version: str, positions: range, slots: Any) -> None:
        """Write a prefix's positions, up to its last, into slots of every layer.

        Args:
            layers: `attention_layers` of this worker.
            slots: int64 `[len(positions)]`.

        Raises:
            PrefixUnavailableError: there is no such prefix of this length for this model.
        """
        keys, values = self.source.read(version)
        num_layers, num_heads, head_dim = self.shape
        expected = (num_layers, num_heads, positions.stop, head_dim)
        if keys.shape != expected or values.shape != expected:
            raise PrefixUnavailableError(
                f"the prefix {version} has shape {list(keys.shape)}; expected {list(expected)}"
            )
        for index, layer in layers.items():
            own = (
                tensor[index, self.heads, positions.start :].transpose(0, 1)
                for tensor in (keys, values)
            )
            cache = layer.kv_cache
            key, value = (tensor.to(cache.device, cache.dtype).contiguous() for tensor in own)
            layer.impl.do_kv_cache_update(layer, key, value, cache, slots)
