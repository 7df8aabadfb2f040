"""What the connector is told of a request, in its `kv_transfer_params`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from vllm.v1.request import Request

_VERSION, _LENGTH, _CAPTURE = "prefix_version", "prefix_length", "prefix_capture"


@dataclass(frozen=True, slots=True)
class PrefixUse:
    """The prefix that takes the place of a prompt's first tokens.

    Attributes:
        version: names the prefix; also the request's `cache_salt`, for vLLM shares the memory of
            requests whose salt and first tokens are equal.
        length: how many tokens; whatever they are.
        problem: why there cannot be such a prefix, to be told when it is loaded.
    """

    version: str
    length: int
    problem: str = ""

    @classmethod
    def of(cls, request: Request) -> Self | None:
        """What a request says; None where it is without a prefix."""
        params = request.kv_transfer_params or {}
        if _VERSION not in params or request.num_prompt_tokens < 2:
            return None
        version, length = str(params[_VERSION]), params.get(_LENGTH)
        most = request.num_prompt_tokens - 1
        if not isinstance(length, int) or not 1 <= length <= most:
            return cls(version, 1, f"{_LENGTH} is {length!r}; expected 1 to {most}")
        if request.cache_salt != version:
            return cls(version, length, f"cache_salt is not the {_VERSION}; expected the same")
        return cls(version, length)

    def params(self) -> dict[str, Any]:
        """As `kv_transfer_params`."""
        return {_VERSION: self.version, _LENGTH: self.length}


def capture_params(name: str) -> dict[str, Any]:
    """`kv_transfer_params` of a prompt whose keys and values are wanted, under a name."""
    return {_CAPTURE: name}


def capture_name(request: Request) -> str | None:
    """The name that `capture_params` gave it, if any."""
    return (request.kv_transfer_params or {}).get(_CAPTURE)
