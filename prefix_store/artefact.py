"""A prefix with its bytes, ready to be stored under their hash."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from prefix_store.prefix import Prefix, version_of
from prefix_store.tensor_file import Buffer


@dataclass(frozen=True, slots=True, eq=False)
class Artefact:
    """A valid prefix as it will be stored.

    Attributes:
        prefix: what the bytes hold; its tensors may be views of them.
        data: the bytes, in memory or of a file.
        version: `version_of(data)`.
    """

    prefix: Prefix
    data: Buffer
    version: str

    @classmethod
    def of(cls, prefix: Prefix) -> Self:
        """A prefix made here, written out in memory."""
        data = prefix.to_bytes()
        return cls(prefix, data, version_of(data))
