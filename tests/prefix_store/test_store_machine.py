"""Uploads, changes, crashes and collection in any order: no byte in use lost, no other kept."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from redis.asyncio import Redis

from prefix_store.embedded import EmbeddedValkey
from prefix_store.errors import PrefixStoreError
from prefix_store.redis_store import layout
from prefix_store.redis_store.blobs import Blobs, CondemnedError
from prefix_store.redis_store.commits import Commits
from prefix_store.redis_store.layout import Blob
from prefix_store.redis_store.tasks import Snapshot, Tasks
from prefix_store.task import (
    Task,
    TaskRecord,
    activated,
    created,
    divided,
    rolled_back,
    uploaded,
    without,
)
from tests.prefix_store.examples import an_artefact

T = TypeVar("T")

KEEP = 2
CHUNK_BYTES = 400
ARTEFACTS = [an_artefact(seed) for seed in range(4)]
NAMES = st.sampled_from(["one", "two"])
WHICH = st.integers(0, len(ARTEFACTS) - 1)


@dataclass
class Upload:
    """One uploader, stopped between any two of its commands."""

    task_id: str
    which: int
    blob: Blob
    written: int = 0
    sealed: bool = False
    seen: Snapshot | None = None
    changed: bool = field(default=False)
    """The task is no longer as `seen`."""


class StoreMachine(RuleBasedStateMachine):
    """The model: tasks as values, the names of pending, expired and condemned blobs."""

    uploads = Bundle("uploads")
    condemned = Bundle("condemned")
    run: Callable[[Coroutine[Any, Any, Any]], Any]
    redis: Redis

    def __init__(self) -> None:
        super().__init__()
        self.run(self.redis.flushall())
        self.blobs = Blobs(self.redis, upload_seconds=10_000, chunk_bytes=CHUNK_BYTES)
        self.tasks = Tasks(self.redis, Commits(self.redis))
        self.model: dict[str, Task] = {}
        self.pending: set[str] = set()
        self.expired: set[str] = set()
        self.running: list[Upload] = []

    @rule(target=uploads, task_id=NAMES, which=WHICH)
    def begin(self, task_id: str, which: int) -> Upload:
        artefact = ARTEFACTS[which]
        blob = self.run(self.blobs.reserve(artefact.version, len(artefact.data)))
        self.pending.add(blob.name)
        upload = Upload(task_id, which, blob)
        self.running.append(upload)
        return upload

    @rule(upload=uploads)
    def write(self, upload: Upload) -> None:
        if upload.written < len(upload.blob.keys):
            data = ARTEFACTS[upload.which].data
            self.run(self.blobs.write(upload.blob, upload.written, data))
            upload.written += 1

    @rule(upload=uploads)
    def write_the_rest_and_seal(self, upload: Upload) -> None:
        while upload.written < len(upload.blob.keys):
            self.write(upload)
        try:
            self.run(self.blobs.seal(upload.blob))
        except CondemnedError:
            assert upload.blob.name not in self.pending
        else:
            upload.sealed = True

    @rule(upload=uploads)
    def look(self, upload: Upload) -> None:
        upload.seen, upload.changed = self.run(self.tasks.snapshot(upload.task_id)), False

    @rule(upload=uploads, activate=st.booleans())
    def publish(self, upload: Upload, activate: bool) -> None:
        if not upload.sealed or upload.seen is None:
            return
        artefact = ARTEFACTS[upload.which]
        record = TaskRecord(
            upload.task_id, artefact.version, 5, len(artefact.data), "test", "", "", 0.0
        )
        task = upload.seen.task
        after = (
            created(record)
            if task is None
            else uploaded(task, record, activate=activate, keep=KEEP)
        )
        try:
            done = self.run(self.tasks.commit(upload.seen, after, [upload.blob]))
        except CondemnedError:
            assert upload.blob.name not in self.pending
            return
        assert done is not upload.changed
        if done:
            assert upload.blob.name in self.pending
            self.pending.remove(upload.blob.name)
            self.expired.discard(upload.blob.name)
            self._now(upload.task_id, after)
            upload.sealed = False

    @rule(target=uploads, task_id=NAMES, which=WHICH, activate=st.booleans())
    def put(self, task_id: str, which: int, activate: bool) -> Upload:
        """All of it at once; what is left is an uploader that repeats itself."""
        upload = self.begin(task_id, which)
        self.write_the_rest_and_seal(upload)
        self.look(upload)
        self.publish(upload, activate)
        return upload

    @rule(upload=uploads)
    def time_is_up(self, upload: Upload) -> None:
        """The uploader has crashed or stalled; it may still go on."""
        self.run(self.blobs.abandon(upload.blob))
        if upload.blob.name in self.pending:
            self.expired.add(upload.blob.name)

    @rule(upload=consumes(uploads))
    def crash(self, upload: Upload) -> None:
        self.time_is_up(upload)

    @rule(target=condemned)
    def condemn(self) -> Any:
        found = self.run(self.blobs.condemn())
        self.pending -= self.expired
        self.expired.clear()
        assert not self.pending & {blob.name for blob in found}
        return multiple(*found)

    @rule(blob=condemned)
    def sweep(self, blob: Blob) -> None:
        """Also late, or again by another collector."""
        self.run(self.blobs.delete(blob))

    @rule()
    def collect(self) -> None:
        self.condemn()
        self.run(self.blobs.collect())

    @rule(task_id=NAMES, which=WHICH)
    def activate(self, task_id: str, which: int) -> None:
        self._change(task_id, partial(activated, version=ARTEFACTS[which].version))

    @rule(task_id=NAMES)
    def roll_back(self, task_id: str) -> None:
        self._change(task_id, rolled_back)

    @rule(task_id=NAMES, which=WHICH)
    def delete_version(self, task_id: str, which: int) -> None:
        self._change(task_id, partial(without, version=ARTEFACTS[which].version))

    @rule(task_id=NAMES)
    def split(self, task_id: str) -> None:
        def halved(task: Task) -> Task:
            versions = [record.version for record in task.versions[:2]]
            return divided(task, dict.fromkeys(versions, 100 // len(versions)))

        self._change(task_id, halved)

    @rule(task_id=NAMES)
    def delete(self, task_id: str) -> None:
        self._change(task_id, lambda _: None)

    @invariant()
    def every_kept_version_is_whole(self) -> None:
        assert self.run(self.tasks.list()) == [self.model[name] for name in sorted(self.model)]
        for version in self._users():
            data = next(one.data for one in ARTEFACTS if one.version == version)
            assert self.run(self.blobs.read(version)) == data

    def teardown(self) -> None:
        for upload in self.running:
            self.time_is_up(upload)
        self.collect()
        users = self._users()
        assert self._hash(layout.USERS) == {name: str(count) for name, count in users.items()}
        sizes = {
            task.task_id: str(sum(record.nbytes for record in task.versions))
            for task in self.model.values()
        }
        assert self._hash(layout.stored("default")) == sizes
        names = self._hash(layout.BLOBS)
        assert set(names) == set(users)
        used = {key for name in names.values() for key in Blob.named(name.encode()).keys}
        assert self._lasting_chunks() == used
        assert not self.run(self.redis.exists(layout.PENDING, layout.GARBAGE))

    def _change(self, task_id: str, change: Callable[[Task], Task | None]) -> None:
        task = self.model.get(task_id)
        if task is None:
            return
        try:
            after = change(task)
        except PrefixStoreError:
            return
        before = self.run(self.tasks.snapshot(task_id))
        assert self.run(self.tasks.commit(before, after, []))
        self._now(task_id, after)

    def _now(self, task_id: str, task: Task | None) -> None:
        if task is None:
            del self.model[task_id]
        else:
            self.model[task_id] = task
        for upload in self.running:
            upload.changed |= upload.task_id == task_id

    def _users(self) -> Counter[str]:
        return Counter(record.version for task in self.model.values() for record in task.versions)

    def _hash(self, key: str) -> dict[str, str]:
        found = self.run(self.redis.hgetall(key))
        return {name.decode(): value.decode() for name, value in found.items()}

    def _lasting_chunks(self) -> set[str]:
        """Chunks that do not go by themselves."""
        keys = self.run(self.redis.keys("prefixserve:*"))
        return {key.decode() for key in keys if self.run(self.redis.ttl(key)) == -1}


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[type[StoreMachine]]:
    with asyncio.Runner() as runner:
        valkey = EmbeddedValkey(tmp_path)
        runner.run(valkey.start())
        client = Redis.from_url(valkey.url)
        runner.run(client.config_set("appendfsync", "no"))
        try:
            yield type(
                "Machine", (StoreMachine,), {"run": staticmethod(runner.run), "redis": client}
            )
        finally:
            runner.run(client.aclose())
            runner.run(valkey.stop())


def test_nothing_in_use_is_lost_and_nothing_else_is_kept(machine: type[StoreMachine]) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=150,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
