"""What must be known of a JSON schema before it is compiled: its size, and that it has an end.

The compiler of grammars takes `{"type": "object", "required": ["next"], "properties": {"next":
{"$ref": "#"}}}`, of which every text goes on for ever, and for `"minItems": 1000000000` all memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Set
from contextlib import suppress
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from server.engine.protocol import InvalidGrammarError

MAX_DEPTH = 64
MAX_REFERENCES = 512
MAX_COUNT = 10_000
MAX_MULTIPLE = 10_000
_COUNTS = ("minItems", "maxItems", "minProperties", "maxProperties")

Json = Any
"""What `json.loads` returns; nothing is known of its shape."""


def check_schema(text: str) -> None:
    """Refuse a schema that only an endless text could satisfy, or that is out of bounds.

    Raises:
        InvalidGrammarError: so it is, or it is not JSON.
    """
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidGrammarError(f"the JSON schema is not JSON: {error}") from None
    found = (
        ("is nested so deep", depth(schema), MAX_DEPTH),
        ("has so many references", len(references(schema)), MAX_REFERENCES),
        (f"has {', '.join(_COUNTS)} that add up to so much", _counts(schema), MAX_COUNT),
        ("has a multipleOf of so much, but for its exponent", _multiple(schema), MAX_MULTIPLE),
    )
    for what, value, most in found:
        if value > most:
            raise InvalidGrammarError(f"the JSON schema {what}: {value}; expected at most {most}")
    if not has_finite_text(schema):
        raise InvalidGrammarError(
            "the JSON schema allows no text that ends: each would hold itself, or there is none; "
            "make one of the properties that refer back optional, or allow null"
        )


def depth(value: Json) -> int:
    """How deeply objects and lists are nested in each other."""
    levels, level = 0, [value]
    while level := [child for parent in level for child in _children(parent)]:
        levels += 1
    return levels


def references(schema: Json) -> dict[str, Json]:
    """Every `$ref` within the schema to a part of itself, and what it refers to."""
    found: dict[str, Json] = {}
    for node in _nodes(schema):
        ref = node.get("$ref") if isinstance(node, dict) else None
        if isinstance(ref, str) and ref not in found and ref.startswith("#"):
            # An anchor, or nothing, is not found: the compiler knows what to say of it.
            with suppress(LookupError, TypeError, ValueError):
                found[ref] = _resolve(schema, ref)
    return found


def has_finite_text(schema: Json) -> bool:
    """False for a schema that only an endless text could satisfy, or none.

    The least fixed point: a reference is finite once what it refers to is, with all those known
    so far to be. What is not understood counts as finite.
    """
    targets = references(schema)
    # The last one found first: what others refer to mostly stands behind them.
    unknown = dict(reversed(targets.items()))
    while ended := [ref for ref, target in unknown.items() if _is_finite(target, unknown.keys())]:
        for ref in ended:
            del unknown[ref]
    return _is_finite(schema, unknown.keys())


def _refuse_constant(name: str) -> Json:
    raise ValueError(f"{name} is no JSON")


def _nodes(schema: Json) -> Iterator[Json]:
    """It and everything in it."""
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(_children(node))


def _counts(schema: Json) -> int:
    nodes = (node for node in _nodes(schema) if isinstance(node, dict))
    return sum(_count(node, key) for node in nodes for key in _COUNTS)


def _multiple(schema: Json) -> int:
    """The largest `multipleOf`, its digits taken as a whole number: as many states it has."""
    values = (node.get("multipleOf") for node in _nodes(schema) if isinstance(node, dict))
    numbers = (value for value in values if isinstance(value, int | float))
    digits = (Decimal(str(number)).normalize().as_tuple().digits for number in numbers)
    return max((int("".join(map(str, each))) for each in digits), default=0)


def _children(value: Json) -> Iterable[Json]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _resolve(schema: Json, ref: str) -> Json:
    """What a JSON pointer (RFC 6901) in a URI's fragment refers to."""
    node = schema
    pointer = unquote(ref[1:])
    if pointer and not pointer.startswith("/"):
        raise LookupError(ref)
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        node = node[int(key)] if isinstance(node, list) else node[key]
    return node


def _is_finite(node: Json, endless: Set[str]) -> bool:
    """False where each text needs one of the references in `endless`."""
    if not isinstance(node, dict):
        return node is not False
    if node.get("$ref") in endless:
        return False
    if not all(_is_finite(one, endless) for one in _list(node, "allOf")):
        return False
    for key in ("anyOf", "oneOf"):
        if key in node and not any(_is_finite(one, endless) for one in _list(node, key)):
            return False
    if "const" in node or "enum" in node:
        return True
    types = node.get("type", "any")
    names = set(types) if isinstance(types, list) else {types}
    return (
        bool(names - {"object", "array"})
        or ("object" in names and _object_is_finite(node, endless))
        or ("array" in names and all(_is_finite(one, endless) for one in _needed_items(node)))
    )


def _object_is_finite(node: dict[str, Json], endless: Set[str]) -> bool:
    properties, required = _dict(node, "properties"), _list(node, "required")
    others = [*_dict(node, "patternProperties").values(), node.get("additionalProperties", True)]
    others_are_finite = any(_is_finite(one, endless) for one in others)
    for name in required:
        if not (_is_finite(properties[name], endless) if name in properties else others_are_finite):
            return False
    if _count(node, "minProperties") <= len(required):
        return True
    return others_are_finite or any(_is_finite(one, endless) for one in properties.values())


def _needed_items(node: dict[str, Json]) -> Iterator[Json]:
    """What the items that an array must have must be, each kind once."""
    needed, items = _count(node, "minItems"), node.get("items", True)
    # Before draft 2020-12 a list of items was what prefixItems are now.
    first = items if isinstance(items, list) else _list(node, "prefixItems")
    yield from first[:needed]
    if needed > len(first):
        yield node.get("additionalItems", True) if isinstance(items, list) else items


def _list(node: dict[str, Json], key: str) -> list[Json]:
    value = node.get(key)
    return value if isinstance(value, list) else []


def _dict(node: dict[str, Json], key: str) -> dict[str, Json]:
    value = node.get(key)
    return value if isinstance(value, dict) else {}


def _count(node: dict[str, Json], key: str) -> int:
    value = node.get(key)
    return int(value) if isinstance(value, int | float) else 0
