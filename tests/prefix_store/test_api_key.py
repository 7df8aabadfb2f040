"""What an API key looks like, and how one is recognised."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import replace

import pytest

from prefix_store.api_key import Scope, kept_of, key_id_of, new_key_text

NOW = 1_000_000.0


def test_keys_are_random_and_of_one_form() -> None:
    texts = {new_key_text() for _ in range(100)}
    assert len(texts) == len({key_id_of(text.encode()) for text in texts}) == 100
    for text in texts:
        prefix, key_id, secret = text.split("-", 2)
        assert (prefix, len(key_id), len(secret)) == ("ps", 12, 43)  # 43 * 6 bits hold 256
        assert key_id_of(text.encode()) == key_id


def test_only_a_hash_is_kept_and_it_knows_the_key() -> None:
    text = new_key_text()
    key = kept_of(text, "acme", [Scope.GENERATE], label="", now=NOW)
    assert text.split("-", 2)[2] not in repr(key)
    assert key.digest == hashlib.sha256(text.encode()).hexdigest()
    assert key.matches(text.encode())
    for position in (0, 5, len(text) - 1):
        other = text[:position] + chr(ord(text[position]) ^ 1) + text[position + 1 :]
        assert not key.matches(other.encode())


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    key = kept_of(new_key_text(), "acme", [Scope.GENERATE], label="", now=NOW)
    compared = []
    compare = hmac.compare_digest

    def noting(one: str, other: str) -> bool:
        compared.append((one, other))
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", noting)
    assert not key.matches(b"wrong")
    assert compared == [(hashlib.sha256(b"wrong").hexdigest(), key.digest)]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"ps-",
        b"ps-abc-short",
        b"ps-ABC-" + b"x" * 43,
        b"ps-abc-" + b"x" * 44,
        b"ps-abc-" + b"x" * 42 + b"\n",
        b"ps-abc-" + b"x" * 43 + b"\n",
        b"sk-abc-" + b"x" * 43,
        b"ps-" + b"a" * 17 + b"-" + b"x" * 43,
        b"ps-abc-" + "é".encode() * 43,
    ],
)
def test_what_cannot_be_a_key(text: bytes) -> None:
    assert key_id_of(text) is None


def test_states() -> None:
    key = kept_of(new_key_text(), "acme", [Scope.ADMIN], label="", now=NOW, expires_at=NOW + 10)
    assert [key.state(NOW + later) for later in (0, 9.99, 10, 11)] == [
        "active",
        "active",
        "expired",
        "expired",
    ]
    assert replace(key, revoked_at=NOW).state(NOW) == "revoked"
    assert replace(key, expires_at=None).state(NOW + 1e9) == "active"
