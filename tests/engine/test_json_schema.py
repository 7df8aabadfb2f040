"""Which JSON schemas have a finite text, and how deep they are."""

from __future__ import annotations

from typing import Any

import pytest

from server.engine.json_schema import depth, has_finite_text, references

SELF = {"$ref": "#"}


def with_defs(first: str, **defs: Any) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{first}", "$defs": defs}


def ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/$defs/{name}"}


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        {"type": "object", "properties": {"next": SELF}},
        {"type": "array", "items": SELF},
        {"anyOf": [SELF, {"type": "integer"}]},
        {"properties": {"next": SELF}, "required": ["next"]},  # may be a number
        {"type": ["null", "object"], "properties": {"next": SELF}, "required": ["next"]},
        {"type": "array", "minItems": 2, "prefixItems": [True, {}], "items": SELF},
        {"type": "array", "minItems": 1, "items": [True], "additionalItems": SELF},
        {
            "type": "object",
            "minProperties": 1,
            "properties": {"a": {}},
            "additionalProperties": SELF,
        },
        with_defs("a", a={"anyOf": [ref("b"), ref("a")]}, b={"enum": [1]}),
        with_defs("a~1b%25", **{"a/b%": {"const": None}}),
        {"$ref": "#/nowhere"},
        {"$ref": "#anchor"},
        {"type": 3, "properties": 3, "required": 3, "minItems": "x"},
    ],
    ids=str,
)
def test_has_a_finite_text_as_far_as_is_known(schema: Any) -> None:
    assert has_finite_text(schema)


@pytest.mark.parametrize(
    "schema",
    [
        False,
        SELF,
        {"allOf": [SELF]},
        {"anyOf": [SELF, SELF]},
        {"oneOf": []},
        {"type": "object", "properties": {"next": SELF}, "required": ["next"]},
        {"type": "object", "required": ["any"], "additionalProperties": SELF},
        {"type": "object", "minProperties": 1, "additionalProperties": SELF},
        {
            "type": ["array", "object"],
            "minItems": 1,
            "items": SELF,
            "required": ["x"],
            "properties": {"x": SELF},
        },
        {"type": "array", "minItems": 3, "prefixItems": [True, {}], "items": SELF},
        {"type": "array", "minItems": 2, "items": [True], "additionalItems": SELF},
        with_defs("a", a=ref("b"), b=ref("c"), c={"allOf": [{}, ref("a")]}),
    ],
    ids=str,
)
def test_only_an_endless_text_would_do(schema: Any) -> None:
    assert not has_finite_text(schema)


@pytest.mark.parametrize("backwards", [False, True])
def test_a_long_chain_of_references_is_followed_to_its_end(backwards: bool) -> None:
    defs: dict[str, Any] = {f"d{n}": ref(f"d{n + 1}") for n in range(200)}
    defs["d200"] = {"type": "string"}
    ordered = dict(reversed(defs.items())) if backwards else defs
    assert len(references(with_defs("d0", **ordered))) == 201
    assert has_finite_text(with_defs("d0", **ordered))
    assert not has_finite_text(with_defs("d0", **{**ordered, "d200": ref("d7")}))


def test_depth_counts_objects_and_lists() -> None:
    assert [depth(value) for value in (3, {}, {"a": 1}, {"a": [1]}, [{"a": {}}])] == [0, 0, 1, 2, 2]
