"""Parse JSON that somebody uploaded."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from prefix_store.errors import InvalidPrefixError


def parse_object(name: str, data: str | bytes) -> dict[str, Any]:
    """A JSON object in which no object has a key twice; the caller has bounded its size.

    Raises:
        InvalidPrefixError: anything else; calls the text `name`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
            raise InvalidPrefixError(f"{name} has the key {twice[:60]!r} twice; expected it once")
        return result

    try:
        parsed = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InvalidPrefixError(f"{name} is not JSON") from error
    if not isinstance(parsed, dict):
        raise InvalidPrefixError(f"{name} is not a JSON object")
    return parsed
