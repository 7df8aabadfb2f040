"""Names of keys, and what is in them.

Everything that changes together has the hash tag `{prefixserve}`, so that a cluster keeps it on
one node; the chunks of a blob share a tag of their own, so that blobs spread over the nodes.

    {prefixserve}:tasks      hash    task_id -> the task as JSON
    {prefixserve}:shared   hash    task_id -> the tenants that it is shared with, as JSON
    {prefixserve}:keys     hash    key id of an API key -> what is kept of it, as JSON
    {prefixserve}:blobs      hash    version -> name of the blob with its bytes
    {prefixserve}:users      hash    version -> how many tasks keep it
    {prefixserve}:pending    zset    name of a blob that is being written -> unix time it expires
    {prefixserve}:garbage    set     names of blobs to delete
    {prefixserve}:stored:<tenant>  hash  task_id -> bytes of all versions that the task keeps
    {prefixserve}:revision   string  number of the last change
    {prefixserve}:changes    stream  the last changes; an id is `<revision>-<random>`
    {prefixserve}:changed    channel a message at each change
    {prefixserve}:barrier    string  written before WAIT and WAITAOF; expires
    prefixserve:{<blob>}:<i> string  the blob's chunk number i
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Self

from prefix_store.api_key import ApiKey, Scope
from prefix_store.groups import DECODER
from prefix_store.task import Share, Task, TaskRecord

_TAG = "{prefixserve}"
TASKS = f"{_TAG}:tasks"
SHARED = f"{_TAG}:shared"
KEYS = f"{_TAG}:keys"
BLOBS = f"{_TAG}:blobs"
USERS = f"{_TAG}:users"
PENDING = f"{_TAG}:pending"
GARBAGE = f"{_TAG}:garbage"
REVISION = f"{_TAG}:revision"
CHANGES = f"{_TAG}:changes"
CHANGED = f"{_TAG}:changed"
BARRIER = f"{_TAG}:barrier"

STORED = f"{_TAG}:stored"
"""There once the hashes of this name have every task: stores of before do not have them."""

CHUNK_BYTES = 4 * 1024 * 1024


def stored(tenant: str) -> str:
    """The hash with the sizes of a tenant's tasks."""
    return f"{STORED}:{tenant}"


@dataclass(frozen=True, slots=True)
class Blob:
    """Where one upload wrote an artefact's bytes. No two uploads write the same blob.

    Attributes:
        name: `<version>:<upload>:<nbytes>:<chunk_bytes>`, which says all there is to know.
    """

    version: str
    upload: str
    nbytes: int
    chunk_bytes: int

    @classmethod
    def new(cls, version: str, nbytes: int, chunk_bytes: int) -> Self:
        """A blob that nothing is written to yet."""
        return cls(version, uuid.uuid4().hex, nbytes, chunk_bytes)

    @classmethod
    def named(cls, name: bytes) -> Self:
        """The blob of this name."""
        version, upload, nbytes, chunk_bytes = name.decode().rsplit(":", 3)
        return cls(version, upload, int(nbytes), int(chunk_bytes))

    @property
    def name(self) -> str:
        return f"{self.version}:{self.upload}:{self.nbytes}:{self.chunk_bytes}"

    @property
    def keys(self) -> list[str]:
        """Of its chunks, in order."""
        return [self.key(index) for index in range(-(-self.nbytes // self.chunk_bytes))]

    def key(self, index: int) -> str:
        """Of one chunk."""
        return f"prefixserve:{{{self.name}}}:{index}"

    def pieces(self, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """The parts of chunks that hold the bytes `start` to before `stop`.

        Each a chunk's key and the first and last byte in it, both included.
        """
        while start < stop:
            index, first = divmod(start, self.chunk_bytes)
            count = min(self.chunk_bytes - first, stop - start)
            yield self.key(index), first, first + count - 1
            start += count


def task_to_json(task: Task) -> str:
    """A task as it is stored. No two calls give the same text, so a text names one change."""
    versions = []
    for record in task.versions:
        fields = asdict(record)
        del fields["task_id"]
        versions.append(fields)
    stored = {
        "version": task.version,
        "versions": versions,
        "history": task.history,
        "split": [[share.version, share.percent] for share in task.split],
        "pinned": task.pinned,
        "shared_with": task.shared_with,
        "change": uuid.uuid4().hex,
    }
    return json.dumps(stored)


def task_from_json(task_id: str, text: bytes) -> Task:
    """Read `task_to_json` back."""
    stored = json.loads(text)
    return Task(
        task_id=task_id,
        version=stored["version"],
        versions=tuple(_record(task_id, fields) for fields in stored["versions"]),
        history=tuple(stored["history"]),
        split=tuple(Share(*share) for share in stored["split"]),
        pinned=stored["pinned"],
        shared_with=tuple(stored.get("shared_with", ())),
    )


def sharing_to_json(task: Task | None) -> str:
    """With whom the task is shared, as it is listed; empty for a task that is not."""
    return json.dumps(task.shared_with) if task is not None and task.shared_with else ""


def sharing_from_json(text: bytes) -> frozenset[str]:
    """Read `sharing_to_json` back."""
    return frozenset(json.loads(text))


def key_to_json(key: ApiKey) -> str:
    """A key as it is stored. No two calls give the same text, so a text names one change."""
    fields = asdict(key) | {"scopes": sorted(key.scopes), "change": uuid.uuid4().hex}
    del fields["key_id"]
    return json.dumps(fields)


def key_from_json(key_id: str, text: bytes) -> ApiKey:
    """Read `key_to_json` back."""
    stored = json.loads(text)
    del stored["change"]
    scopes = frozenset(map(Scope, stored.pop("scopes")))
    return ApiKey(key_id=key_id, scopes=scopes, **stored)


def _record(task_id: str, fields: dict[str, Any]) -> TaskRecord:
    groups = tuple(fields.pop("groups", (DECODER,)))
    return TaskRecord(task_id=task_id, groups=groups, **fields)
