"""HTTP's conditional requests and ranges (RFC 9110, 13 and 14). An ETag is a quoted version."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header
from pydantic import WithJsonSchema

from prefix_store.condition import ANY, Condition
from server.errors import InvalidRequestError

_MAX_CHARS = 8192
_ETAG = r'(?:W/)?"[^"]*"'
_ETAGS = re.compile(rf"\s*{_ETAG}(?:\s*,\s*{_ETAG})*\s*")
# Several lines of a header are one with commas; that is what is told.
_HEADER = WithJsonSchema(
    {
        "type": "string",
        "maxLength": _MAX_CHARS,
        "pattern": r'^(\*|(W/)?"[!#-~]*"(, ?(W/)?"[!#-~]*")*)$',
    }
)
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class RangeError(Exception):
    """No byte of the asked range exists."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `start` to before `stop`."""

    start: int
    stop: int


def etag(version: str) -> str:
    """The version as a strong ETag."""
    return f'"{version}"'


def _condition(
    if_match: Annotated[
        list[str] | None,
        _HEADER,
        Header(description="Change only a task that is at this version: its ETag, or `*`."),
    ] = None,
    if_none_match: Annotated[
        list[str] | None,
        _HEADER,
        Header(description="`*`: change only where there is no such task yet."),
    ] = None,
) -> Condition:
    return Condition(
        match=_versions("If-Match", if_match, weak=False),
        none_match=_versions("If-None-Match", if_none_match, weak=True),
    )


ConditionDep = Annotated[Condition, Depends(_condition)]


def names_version(if_none_match: Sequence[str] | None, version: str) -> bool:
    """Whether the client has this version already, by its If-None-Match.

    Raises:
        InvalidRequestError: the header is neither `*` nor ETags.
    """
    found = _versions("If-None-Match", if_none_match, weak=True)
    return found is not None and (ANY in found or version in found)


def asked_span(value: str | None, nbytes: int) -> Span | None:
    """The bytes of a Range header; None for all: no header, several ranges, or not understood.

    Raises:
        RangeError: none of them exists.
    """
    match = _RANGE.fullmatch((value or "").strip())
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:  # the last so many
        span = Span(max(0, nbytes - int(last)), nbytes)
    else:
        span = Span(int(first), nbytes if not last else min(nbytes, int(last) + 1))
        if last and int(last) < int(first):
            return None
    if span.start >= span.stop:
        raise RangeError
    return span


def _versions(name: str, lines: Sequence[str] | None, *, weak: bool) -> frozenset[str] | None:
    """The versions in a header; weak ETags count where they are compared weakly."""
    if lines is None:
        return None
    value = ",".join(lines).strip()
    if value == ANY:
        return frozenset({ANY})
    if len(value) > _MAX_CHARS or not _ETAGS.fullmatch(value):
        raise InvalidRequestError(
            f'{name} is {value[:80]!r}; expected * or versions in quotes, such as "sha256:..."'
        )
    tags = re.findall(_ETAG, value)
    return frozenset(
        tag.removeprefix("W/").strip('"') for tag in tags if weak or not tag.startswith("W/")
    )
