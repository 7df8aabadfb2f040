"""Where a worker of vLLM reads prefixes."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from prefix_store.archive import artefact_path
from prefix_store.groups import DECODER, group_tensors


class PrefixUnavailableError(Exception):
    """There is no such prefix, or not one for this model."""


class PrefixSource(Protocol):
    """Prefixes by version."""

    def read(self, version: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, `[num_layers, num_kv_heads, prefix_length, head_dim]` each.

        Raises:
            PrefixUnavailableError
        """


class FolderSource:
    """A folder with a file for each version, as `prefixserve export` writes it; they are mapped."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, version: str) -> tuple[torch.Tensor, torch.Tensor]:
        """See `PrefixSource.read`."""
        path = artefact_path(self._folder, version)
        if path.parent != self._folder:
            raise PrefixUnavailableError(f"{version!r} does not name a file in {self._folder}")
        try:
            with safe_open(path, "pt") as file:
                keys, values = (file.get_tensor(name) for name in group_tensors(DECODER))
        except (OSError, SafetensorError) as error:
            raise PrefixUnavailableError(f"cannot read the prefix {version}: {error}") from error
        return keys, values
