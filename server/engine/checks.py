"""What every engine checks of what it is given."""

from __future__ import annotations

import math
from collections.abc import Collection

from prefix_store.base_model import BaseModelSpec
from prefix_store.groups import Group
from prefix_store.prefix import Prefix
from server.engine.protocol import GenerationRequest, RequestTooLongError

SHUTTING_DOWN = "the server is shutting down"
NOT_FINITE = "the model's output holds NaN or infinity with this task's prefix"


def check_length(
    request: GenerationRequest, prefix_length: int, *, room: int, max_length: int
) -> None:
    """Refuse a request that does not fit.

    Args:
        room: what `Engine.room` says of it.

    Raises:
        RequestTooLongError
        ValueError: there is no prompt, or nothing to do.
    """
    prompt, new = len(request.prompt_ids), request.sampling.max_new_tokens
    scores = request.sampling.prompt_logprobs is not None
    if prompt < 1 or new < (0 if scores else 1):
        raise ValueError(f"a request needs a prompt and a token to generate, not {request}")
    if new > room:
        raise RequestTooLongError(
            f"{prefix_length} prefix + {prompt} prompt + {new} new tokens are more than the "
            f"{max_length} that fit; shorten the input or max_new_tokens"
        )


def check_prompt_to_prefix(length: int, max_length: int) -> None:
    """Refuse a prompt that leaves no room for text beside it as a prefix.

    Raises:
        RequestTooLongError
    """
    if not 1 <= length < max_length:
        raise RequestTooLongError(f"the prompt has {length} tokens; expected 1 to {max_length - 1}")


def check_shapes(prefix: Prefix, spec: BaseModelSpec) -> None:
    """See to it that a prefix is of the model's shape; `check_fits` has told users so before.

    Raises:
        ValueError
    """
    for group, keys_values in prefix.groups.items():
        shape, found = spec.shape(group, prefix.prefix_length), keys_values.keys.shape
        if group not in spec.groups or found != shape:
            raise ValueError(f"a prefix for {spec.name}'s {group} is {shape}, not {found}")


def prefix_numbers(spec: BaseModelSpec, prefix_length: int, groups: Collection[Group]) -> int:
    """How many numbers a prefix of so many positions in each group has."""
    return 2 * sum(math.prod(spec.shape(group, prefix_length)) for group in groups)
