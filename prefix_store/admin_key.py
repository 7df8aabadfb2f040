"""The first administrator's key: made where nobody could administer a store otherwise."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from prefix_store.api_key import ApiKey, Scope, digest_of, kept_of, key_id_of, new_key_text
from prefix_store.data_dir import admin_key_file
from prefix_store.errors import AdminKeyError
from prefix_store.store import KeyStore
from prefix_store.tenant import DEFAULT_TENANT

logger = logging.getLogger(__name__)

_KEY_ID = "admin"
_MAX_FILE_BYTES = 4096


class _TakenError(Exception):
    """Another server made its key first."""


async def ensure_admin_key(keys: KeyStore, data_dir: Path) -> None:
    """See to it that the operator has a key that is good.

    Where there is none, the key in `admin.key` becomes one, which is made first if it is missing.
    So what a crash leaves half done is done at the next start, and an operator may bring a key.

    Raises:
        AdminKeyError: the file cannot be read or written, or holds no key.
        StoreUnavailableError
    """
    path = admin_key_file(data_dir)
    found = {key.key_id: key for key in await keys.list()}
    if any(_is_good(key) for key in found.values()):
        return
    text = await asyncio.to_thread(_read, path)
    if text is not None and _is_among(text, found):  # it was good once
        await asyncio.to_thread(path.unlink, missing_ok=True)
        text = None
    if text is None:
        text = await asyncio.to_thread(_written, path)
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
        AdminKeyError: the file cannot be written.
        StoreUnavailableError
    """
    path = admin_key_file(data_dir)
    await asyncio.to_thread(path.unlink, missing_ok=True)
    text = await asyncio.to_thread(_written, path)
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


def _read(path: Path) -> str | None:
    """The key in the file; None where there is no file."""
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE_BYTES).strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise AdminKeyError(f"cannot read the admin key in {path}: {error.strerror}") from error
    if key_id_of(text) is None:
        raise AdminKeyError(f"{path} holds no API key; remove it, and a new key is made")
    return text.decode()


def _written(path: Path) -> str:
    """The key in the file, which only its owner can read: a new one, if nobody was quicker."""
    text = new_key_text(_KEY_ID)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with NamedTemporaryFile("w", prefix=".admin.key.", dir=path.parent) as file:  # mode 0600
            file.write(f"{text}\n")
            file.flush()
            os.fsync(file.fileno())
            with suppress(FileExistsError):
                path.hardlink_to(file.name)  # whole at once, and never over another's
    except OSError as error:
        raise AdminKeyError(
            f"cannot write the admin key to {path}: {error.strerror}; choose another folder with "
            "--data-dir"
        ) from error
    return _read(path) or text
