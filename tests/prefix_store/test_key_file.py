"""Keys that the operator brings in files, the same for every server."""

from __future__ import annotations

import asyncio
import logging
import stat
import time
from dataclasses import replace
from pathlib import Path

import pytest

from prefix_store.api_key import ApiKey, Scope, kept_of, new_key_text
from prefix_store.errors import KeyFileError
from prefix_store.key_file import take_key
from prefix_store.redis_store import RedisPrefixStore

METRICS = (Scope.METRICS,)


def write(path: Path, text: str, mode: int = 0o600) -> None:
    path.touch(mode)
    path.write_text(f"{text}\n")
    path.chmod(mode)


def read(path: Path) -> bytes:
    return path.read_bytes().strip()


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def add(store: RedisPrefixStore, key: ApiKey) -> None:
    await store.keys.change(key.key_id, lambda _: key)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys" / "some.key"


async def test_servers_that_start_at_once_and_again_take_one_key(
    store: RedisPrefixStore, path: Path
) -> None:
    await asyncio.gather(*(take_key(store.keys, path, "metrics", METRICS) for _ in range(4)))
    [key] = await store.keys.list()
    assert key.matches(read(path))
    assert (key.key_id, key.tenant, key.scopes) == ("metrics", "default", frozenset(METRICS))
    await take_key(store.keys, path, "metrics", METRICS)
    assert await store.keys.list() == [key]


@pytest.mark.parametrize(("scopes", "mode"), [(METRICS, 0o640), (tuple(Scope), 0o600)])
async def test_only_a_key_without_power_is_written_for_its_group(
    store: RedisPrefixStore, path: Path, scopes: tuple[Scope, ...], mode: int
) -> None:
    await take_key(store.keys, path, "some", scopes)
    assert mode_of(path) == mode


async def test_it_is_taken_beside_other_keys(store: RedisPrefixStore, tmp_path: Path) -> None:
    """A secret that is mounted counts, whatever keys were made before."""
    other = kept_of(new_key_text(), "default", Scope, label="", now=time.time())
    await add(store, other)
    text = new_key_text("admin")
    write(tmp_path / "admin.key", text, 0o440)
    await take_key(store.keys, tmp_path / "admin.key", "admin", tuple(Scope))
    assert (await store.keys.get("admin")).matches(text.encode())
    assert await store.keys.get(other.key_id) == other


async def test_another_key_in_the_file_ends_the_one_before(
    store: RedisPrefixStore, tmp_path: Path
) -> None:
    old, new = new_key_text("admin"), new_key_text("admin")
    for text in (old, new):
        write(tmp_path / "admin.key", text)
        await take_key(store.keys, tmp_path / "admin.key", "admin", tuple(Scope))
    [key] = await store.keys.list()
    assert (key.matches(old.encode()), key.matches(new.encode())) == (False, True)


async def test_a_revoked_key_stays_revoked_and_servers_start(
    store: RedisPrefixStore, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await take_key(store.keys, path, "admin", tuple(Scope))
    revoked = replace(await store.keys.get("admin"), revoked_at=time.time())
    await add(store, revoked)
    with caplog.at_level(logging.WARNING):
        await take_key(store.keys, path, "admin", tuple(Scope))
    assert await store.keys.list() == [revoked]
    assert f"the key in {path} is revoked: put a new one there" in caplog.text


@pytest.mark.parametrize("tenant", ["acme", "default"])
async def test_a_key_of_another_kind_is_not_replaced(
    store: RedisPrefixStore, tmp_path: Path, tenant: str
) -> None:
    other = kept_of(new_key_text("0"), tenant, {Scope.GENERATE}, label="", now=time.time())
    await add(store, other)
    write(tmp_path / "key", new_key_text("0"))
    with pytest.raises(KeyFileError, match="has the id of another key, 0"):
        await take_key(store.keys, tmp_path / "key", "admin", tuple(Scope))
    assert await store.keys.list() == [other]


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o660, 0o602])
async def test_a_file_that_others_can_read_or_change_is_refused(
    store: RedisPrefixStore, tmp_path: Path, mode: int
) -> None:
    text = new_key_text()
    write(tmp_path / "key", text, mode)
    with pytest.raises(KeyFileError, match=f"mode {mode:04o}.*chmod 600") as refused:
        await take_key(store.keys, tmp_path / "key", "admin", tuple(Scope))
    assert text not in str(refused.value)
    assert await store.keys.list() == []
