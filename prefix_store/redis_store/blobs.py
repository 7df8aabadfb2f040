"""Artefacts' bytes in chunks: written under a name of their own, read back, and collected.

A blob is pending while its upload writes it, then stored or garbage, and never becomes anything
else once it is garbage. Chunks expire by themselves until `seal`, so that not even a writer that
stalls past its time leaves any behind.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from typing import cast

from redis.asyncio import Redis

from prefix_store.errors import CorruptArtefactError, UnknownVersionError
from prefix_store.redis_store import layout
from prefix_store.redis_store.layout import Blob
from prefix_store.tensor_file import Buffer

_MOST_AT_ONCE = 100

_RESERVE = """
local expires = redis.call('TIME')[1] + ARGV[2]
return redis.call('ZADD', KEYS[1], expires, ARGV[1])
"""
# Condemns the blobs of interrupted uploads, and tells some of everything condemned.
_CONDEMN = """
local now = redis.call('TIME')[1]
for _, blob in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[1])) do
  redis.call('ZREM', KEYS[1], blob)
  redis.call('SADD', KEYS[2], blob)
end
return redis.call('SRANDMEMBER', KEYS[2], ARGV[1])
"""


class CondemnedError(Exception):
    """The upload took longer than its blob is kept; write it again."""


class Blobs:
    """The blobs of a store. Errors of the client pass through."""

    def __init__(self, client: Redis, upload_seconds: int, chunk_bytes: int) -> None:
        """
        Args:
            upload_seconds: how long a blob may be pending.
        """
        self._client = client
        self._upload_seconds = upload_seconds
        self._chunk_bytes = chunk_bytes
        self._reserve = client.register_script(_RESERVE)
        self._condemn = client.register_script(_CONDEMN)

    async def reserve(self, version: str, nbytes: int) -> Blob:
        """A new pending blob, without chunks yet."""
        blob = Blob.new(version, nbytes, self._chunk_bytes)
        await self._reserve(keys=[layout.PENDING], args=[blob.name, self._upload_seconds])
        return blob

    async def write(self, blob: Blob, index: int, data: Buffer) -> None:
        """Write chunk `index` of a pending blob from the whole artefact's bytes."""
        with memoryview(data) as view:
            start = index * blob.chunk_bytes
            with view[start : start + blob.chunk_bytes] as chunk:
                # Never over one that is there: a command sent again must not undo `seal`.
                await self._client.set(blob.key(index), chunk, ex=self._upload_seconds, nx=True)

    async def seal(self, blob: Blob) -> None:
        """Keep the chunks of a pending blob for good: after all are written, before it is stored.

        Nothing is written any more, so that whoever condemns the blob from now on deletes them all.

        Raises:
            CondemnedError: the blob is no longer pending.
        """
        if await self._client.zscore(layout.PENDING, blob.name) is None:
            raise CondemnedError
        for key in blob.keys:
            if not await self._client.persist(key) and not await self._client.exists(key):
                raise CondemnedError

    async def stored(self, version: str) -> Blob:
        """Where a version's bytes are.

        Raises:
            UnknownVersionError
        """
        name = await cast("asyncio.Future[bytes | None]", self._client.hget(layout.BLOBS, version))
        if name is None:
            raise UnknownVersionError(f"no task keeps version {version[:80]!r} any more")
        return Blob.named(name)

    async def stream(self, version: str, start: int, stop: int) -> AsyncGenerator[bytes]:
        """See `PrefixStore.stream`."""
        blob = await self.stored(version)
        digest = hashlib.sha256() if (start, stop) == (0, blob.nbytes) else None
        while start < stop:
            piece = await self._piece(blob, start, stop)
            if piece is None:
                # Stored anew while it was read, perhaps: the same bytes in another blob.
                blob = await self._newer(blob)
                continue
            start += len(piece)
            if digest is not None:
                await asyncio.to_thread(digest.update, piece)
                if start == stop:
                    _check(version, digest.hexdigest())
            yield piece

    async def read(self, version: str) -> bytearray:
        """See `PrefixStore.read`."""
        nbytes = (await self.stored(version)).nbytes
        data = bytearray(nbytes)
        filled = 0
        async for piece in self.stream(version, 0, nbytes):
            data[filled : filled + len(piece)] = piece
            filled += len(piece)
        return data

    async def abandon(self, blob: Blob) -> None:
        """Let a pending blob's time be over now."""
        await self._client.zadd(layout.PENDING, {blob.name: 0}, xx=True)

    async def delete(self, blob: Blob) -> None:
        """Delete a condemned blob and its chunks."""
        for key in blob.keys:
            await self._client.unlink(key)
        await cast("asyncio.Future[int]", self._client.srem(layout.GARBAGE, blob.name))

    async def collect(self) -> int:
        """Condemn what interrupted uploads left, and delete everything condemned; how many."""
        count = 0
        while condemned := await self.condemn():
            for blob in condemned:
                await self.delete(blob)
            count += len(condemned)
        return count

    async def condemn(self) -> list[Blob]:
        """Condemn blobs that were pending too long; some of those that are condemned."""
        found: list[bytes] = await self._condemn(
            keys=[layout.PENDING, layout.GARBAGE], args=[_MOST_AT_ONCE]
        )
        return [Blob.named(name) for name in found]

    async def _piece(self, blob: Blob, start: int, stop: int) -> bytes | None:
        """The first bytes of `start` to `stop` that lie in one chunk; None if it is not there."""
        key, first, last = next(blob.pieces(start, stop))
        piece = cast("bytes", await self._client.getrange(key, first, last))
        return piece if len(piece) == last - first + 1 else None

    async def _newer(self, blob: Blob) -> Blob:
        newer = await self.stored(blob.version)
        if newer == blob:
            raise CorruptArtefactError(
                f"bytes of the stored artefact {blob.version} are missing; upload the prefix again"
            )
        return newer


def _check(version: str, hexdigest: str) -> None:
    if version != f"sha256:{hexdigest}":
        raise CorruptArtefactError(
            f"the stored artefact of {version} hashes to sha256:{hexdigest}; upload the prefix "
            "again"
        )
