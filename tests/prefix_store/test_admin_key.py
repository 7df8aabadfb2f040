"""The key that a server makes when nobody could administer it."""

from __future__ import annotations

import asyncio
import stat
import time
from dataclasses import replace
from pathlib import Path

import pytest

from prefix_store.admin_key import ensure_admin_key, renew_admin_key
from prefix_store.api_key import ApiKey, Scope, kept_of, new_key_text
from prefix_store.data_dir import admin_key_file
from prefix_store.errors import KeyFileError
from prefix_store.redis_store import RedisPrefixStore

DAY = 86_400


async def add(store: RedisPrefixStore, tenant: str, *scopes: Scope, age: float = 0) -> ApiKey:
    """A key that was made so long ago, and was good for a day."""
    made = time.time() - age
    key = kept_of(new_key_text(), tenant, scopes, label="", now=made, expires_at=made + DAY)
    return await store.keys.change(key.key_id, lambda _: key)


def text_in(data_dir: Path) -> bytes:
    return admin_key_file(data_dir).read_bytes().strip()


def write(path: Path, content: bytes) -> None:
    path.touch(0o600)
    path.write_bytes(content)


async def revoke(store: RedisPrefixStore, key_id: str) -> None:
    def step(key: ApiKey | None) -> ApiKey:
        assert key is not None
        return replace(key, revoked_at=time.time())

    await store.keys.change(key_id, step)


async def test_the_first_start_makes_one(store: RedisPrefixStore, tmp_path: Path) -> None:
    data_dir = tmp_path / "new" / "data"
    await ensure_admin_key(store.keys, data_dir)
    [key] = await store.keys.list()
    assert key.matches(text_in(data_dir))
    assert (key.tenant, key.scopes) == ("default", frozenset(Scope))
    assert stat.S_IMODE(admin_key_file(data_dir).stat().st_mode) == 0o600

    before = text_in(data_dir)
    await ensure_admin_key(store.keys, data_dir)
    assert (await store.keys.list(), text_in(data_dir)) == ([key], before)


async def test_none_is_made_while_the_operator_has_one(
    store: RedisPrefixStore, tmp_path: Path
) -> None:
    await add(store, "default", Scope.ADMIN)
    await ensure_admin_key(store.keys, tmp_path)
    assert not admin_key_file(tmp_path).exists()


async def test_other_keys_do_not_count(store: RedisPrefixStore, tmp_path: Path) -> None:
    await add(store, "acme", *Scope)
    await add(store, "default", Scope.GENERATE)
    await add(store, "default", Scope.ADMIN, age=2 * DAY)  # expired
    await ensure_admin_key(store.keys, tmp_path)
    assert (await store.keys.get("admin")).matches(text_in(tmp_path))


async def test_a_key_that_the_operator_brings_is_taken(
    store: RedisPrefixStore, tmp_path: Path
) -> None:
    """And so is one that a crash left in the file and not in the store."""
    text = new_key_text()
    write(admin_key_file(tmp_path), f"{text}\n".encode())
    await ensure_admin_key(store.keys, tmp_path)
    [key] = await store.keys.list()
    assert key.matches(text.encode())


async def test_a_key_that_was_revoked_does_not_come_back(
    store: RedisPrefixStore, tmp_path: Path
) -> None:
    await ensure_admin_key(store.keys, tmp_path)
    old = text_in(tmp_path)
    await revoke(store, "admin")
    await ensure_admin_key(store.keys, tmp_path)
    [key] = await store.keys.list()
    assert key.matches(text_in(tmp_path))
    assert not key.matches(old)


async def test_servers_that_start_at_once_make_one(store: RedisPrefixStore, tmp_path: Path) -> None:
    data_dirs = [tmp_path / name for name in "abcd"]
    await asyncio.gather(*(ensure_admin_key(store.keys, data_dir) for data_dir in data_dirs))
    [key] = await store.keys.list()
    [written] = [data_dir for data_dir in data_dirs if admin_key_file(data_dir).exists()]
    assert key.matches(text_in(written))


async def test_servers_that_start_at_once_in_one_folder_make_one(
    store: RedisPrefixStore, tmp_path: Path
) -> None:
    await asyncio.gather(*(ensure_admin_key(store.keys, tmp_path) for _ in range(4)))
    [key] = await store.keys.list()
    assert key.matches(text_in(tmp_path))


@pytest.mark.parametrize("content", [b"", b"not a key\n", b"\xff" * 5000])
async def test_a_file_without_a_key_is_refused(
    store: RedisPrefixStore, tmp_path: Path, content: bytes
) -> None:
    write(admin_key_file(tmp_path), content)
    with pytest.raises(KeyFileError, match="holds no API key"):
        await ensure_admin_key(store.keys, tmp_path)
    assert await store.keys.list() == []


async def test_a_folder_that_cannot_be_written(store: RedisPrefixStore, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KeyFileError, match="--data-dir"):
        await ensure_admin_key(store.keys, tmp_path / "file" / "data")
    assert await store.keys.list() == []


async def test_a_lost_key_is_replaced(store: RedisPrefixStore, tmp_path: Path) -> None:
    await ensure_admin_key(store.keys, tmp_path)
    old = text_in(tmp_path)
    path = await renew_admin_key(store.keys, tmp_path)
    key = await store.keys.get("admin")
    assert path == admin_key_file(tmp_path)
    assert key.matches(text_in(tmp_path))
    assert not key.matches(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
