"""API keys in files: those that the operator brings, and those that a server makes for them."""

from __future__ import annotations

import asyncio
import logging
import os
import stat
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from prefix_store.api_key import ApiKey, Scope, kept_of, key_id_of, new_key_text
from prefix_store.errors import KeyFileError
from prefix_store.store import KeyStore
from prefix_store.tenant import DEFAULT_TENANT

logger = logging.getLogger(__name__)

_MAX_FILE_BYTES = 4096
_CLOSED_TO = stat.S_IWGRP | stat.S_IRWXO
_OWNER_ONLY = 0o600
_READABLE_BY_GROUP = 0o640


async def take_key(keys: KeyStore, path: Path, key_id: str, scopes: Collection[Scope]) -> None:
    """Make the key in a file one of the operator's, with these scopes.

    Every server on a store may do so, each time it starts: nothing changes where the key is there.
    Another key in the file takes the place of the one with its id. A revoked key stays revoked.

    Args:
        path: where there is no file, a new key is written; its group may read one that is no
            administrator's.
        key_id: of a new key.

    Raises:
        KeyFileError: the file cannot be read or written, others can read it, it holds no key, or
            its key has the id of somebody else's.
        StoreUnavailableError
    """
    text = await asyncio.to_thread(read_key, path)
    if text is None:
        mode = _OWNER_ONLY if Scope.ADMIN in scopes else _READABLE_BY_GROUP
        text = await asyncio.to_thread(write_key, path, key_id, mode)
    now = time.time()
    key = kept_of(text, DEFAULT_TENANT, scopes, label=f"from {path.name}", now=now)

    def step(found: ApiKey | None) -> ApiKey:
        if found is None:
            return key
        if (found.tenant, found.scopes) != (key.tenant, key.scopes):
            raise KeyFileError(
                f"the key in {path} has the id of another key, {key.key_id}: put one with another "
                "id there"
            )
        return found if found.digest == key.digest else key

    state = (await keys.change(key.key_id, step)).state(now)
    if state == "active":
        logger.info("the key %s is in %s", key.key_id, path)
    else:
        logger.warning("the key in %s is %s: put a new one there", path, state)


def read_key(path: Path) -> str | None:
    """The key in a file; None where there is no file.

    Raises:
        KeyFileError: it cannot be read, others than its owner and group can read it, or it holds no
            key.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read(_MAX_FILE_BYTES).strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise KeyFileError(f"cannot read the key in {path}: {error.strerror}") from error
    if mode & _CLOSED_TO:
        raise KeyFileError(
            f"{path} is open to others, with mode {mode:04o}: make a new key if they may have read "
            f"it, and chmod 600 {path}"
        )
    if key_id_of(text) is None:
        raise KeyFileError(f"{path} holds no API key; remove it, and a new key is made")
    return text.decode()


def write_key(path: Path, key_id: str, mode: int = _OWNER_ONLY) -> str:
    """The key in a file: a new one, if nobody was quicker.

    Raises:
        KeyFileError: it cannot be written.
    """
    text = new_key_text(key_id)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with NamedTemporaryFile("w", prefix=f".{path.name}.", dir=path.parent) as file:
            os.fchmod(file.fileno(), mode)
            file.write(f"{text}\n")
            file.flush()
            os.fsync(file.fileno())
            with suppress(FileExistsError):
                path.hardlink_to(file.name)  # whole at once, and never over another's
    except OSError as error:
        raise KeyFileError(
            f"cannot write a key to {path}: {error.strerror}; choose another place with "
            "--data-dir, --admin-key-file or --metrics-key-file"
        ) from error
    return read_key(path) or text
