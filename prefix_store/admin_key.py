"""The first administrator's key: made where nobody could administer a store otherwise."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from prefix_store.api_key import ApiKey, Scope, digest_of, kept_of, key_id_of
from prefix_store.data_dir import admin_key_file
from prefix_store.key_file import read_key, write_key
from prefix_store.store import KeyStore
from prefix_store.tenant import DEFAULT_TENANT

logger = logging.getLogger(__name__)

ADMIN_KEY_ID = "admin"


class _TakenError(Exception):
    """Another server made its key first."""


async def ensure_admin_key(keys: KeyStore, data_dir: Path) -> None:
    """See to it that the operator has a key that is good.

    Where there is none, the key in `admin.key` becomes one, which is made first if it is missing.
    So what a crash leaves half done is done at the next start, and an operator may bring a key.

    Raises:
        KeyFileError: the file cannot be read or written, or holds no key.
        StoreUnavailableError
    """
    path = admin_key_file(data_dir)
    found = {key.key_id: key for key in await keys.list()}
    if any(_is_good(key) for key in found.values()):
        return
    text = await asyncio.to_thread(read_key, path)
    if text is not None and _is_among(text, found):  # it was good once
        await asyncio.to_thread(path.unlink, missing_ok=True)
        text = None
    if text is None:
        text = await asyncio.to_thread(write_key, path, ADMIN_KEY_ID)
    key = _admin_key(text)
    before = found.get(key.key_id)

    def step(current: ApiKey | None) -> ApiKey:
        if current != before and (current is None or current.digest != key.digest):
            raise _TakenError
        return key

    try:
        await keys.change(key.key_id, step)
    except _TakenError:
        logger.warning("another server on this store has made the admin key; it is not in %s", path)
        await asyncio.to_thread(path.unlink, missing_ok=True)
    else:
        logger.info("the admin key is in %s", path)


async def renew_admin_key(keys: KeyStore, data_dir: Path) -> Path:
    """Put a new key in place of the one that the server made; the file with it.

    Raises:
        KeyFileError: the file cannot be written.
        StoreUnavailableError
    """
    path = admin_key_file(data_dir)
    await asyncio.to_thread(path.unlink, missing_ok=True)
    text = await asyncio.to_thread(write_key, path, ADMIN_KEY_ID)
    key = _admin_key(text)
    await keys.change(key.key_id, lambda _: key)
    return path


def _admin_key(text: str) -> ApiKey:
    return kept_of(text, DEFAULT_TENANT, Scope, label="made by the server", now=time.time())


def _is_good(key: ApiKey) -> bool:
    is_operators = key.tenant == DEFAULT_TENANT and Scope.ADMIN in key.scopes
    return is_operators and key.state(time.time()) == "active"


def _is_among(text: str, keys: dict[str, ApiKey]) -> bool:
    known = keys.get(key_id_of(text.encode()) or "")
    return known is not None and known.digest == digest_of(text.encode())
