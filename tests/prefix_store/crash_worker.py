"""An uploader with its own embedded Valkey, to be killed at any moment."""

from __future__ import annotations

import asyncio
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from redis.asyncio import Redis

from prefix_store.artefact import Artefact
from prefix_store.embedded import EmbeddedValkey
from prefix_store.errors import StoreUnavailableError
from prefix_store.redis_store import RedisPrefixStore
from prefix_store.upload import read_upload
from prefix_store.validate import check_fits
from tests.prefix_store.examples import SPEC, an_artefact

CHUNK_BYTES = 300
"""So small that every artefact has several chunks, and a kill may come between them."""
DIFFERENT = 40
"""As many artefacts take turns, so that most uploads replace the blob of equal bytes."""


def bytes_of(number: int) -> bytes:
    """What upload `number` sends."""
    return bytes(an_artefact(number % DIFFERENT).data)


def upload_until_killed(data_dir: Path, first: int, told: Connection) -> None:
    """Upload tasks `t<first>`, `t<first + 1>`, ...; return when the store goes away.

    Args:
        told: gets the process id of Valkey, then each number when its upload is acknowledged.
    """
    torch.set_num_threads(1)
    asyncio.run(_upload(data_dir, first, told))


async def _upload(data_dir: Path, first: int, told: Connection) -> None:
    valkey = EmbeddedValkey(data_dir)
    await valkey.start()
    async with Redis.from_url(valkey.url) as client:
        told.send_bytes(str((await client.info("server"))["process_id"]).encode())
    store = RedisPrefixStore.from_url(valkey.url, timeout=1, chunk_bytes=CHUNK_BYTES)
    number = first
    try:
        while True:
            artefact = read_upload([("prefix.safetensors", bytes_of(number))], SPEC)
            assert isinstance(artefact, Artefact)
            check_fits(artefact.prefix, SPEC, SPEC.max_positions)
            await store.put(f"t{number}", artefact)
            told.send_bytes(str(number).encode())
            number += 1
    except StoreUnavailableError:
        pass
    finally:
        await store.close()
        await valkey.stop()
