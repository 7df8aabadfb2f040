"""A task, and every change that can be made to one: from an immutable value to the next."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from prefix_store.errors import (
    InvalidSplitError,
    UnknownVersionError,
    VersionConflictError,
)
from prefix_store.groups import DECODER, Group
from prefix_store.task_id import owner_and_name
from prefix_store.tenant import PUBLIC, check_tenant

WHOLE = 100  # percent


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """A task at one of its versions.

    Attributes:
        task_id: what the store calls it.
        version: `sha256:` and the hex digest of the artefact's bytes.
        prefix_length: positions the prefix takes.
        nbytes: size of the artefact in bytes.
        method, base_model, template: as in `Prefix`.
        created_at: when the task was given this version, in unix seconds.
        groups: where the prefix has keys and values.
    """

    task_id: str
    version: str
    prefix_length: int
    nbytes: int
    method: str
    base_model: str
    template: str
    created_at: float
    groups: tuple[Group, ...] = (DECODER,)

    @property
    def name(self) -> str:
        """What its tenant calls it."""
        return owner_and_name(self.task_id)[1]


@dataclass(frozen=True, slots=True)
class Share:
    """So many percent of a task's requests go to this version."""

    version: str
    percent: int


@dataclass(frozen=True, slots=True)
class Task:
    """A task with its versions.

    Attributes:
        task_id: what the store calls it.
        version: the active one.
        versions: those kept, the last uploaded first.
        history: kept versions that were active before, the latest first: where `rolled_back` goes.
        split: shares of the requests, adding to 100; empty when all go to `version`.
        pinned: keep what its requests use loaded on every server.
        shared_with: the other tenants that may use it, by name; only `public` for all.
    """

    task_id: str
    version: str
    versions: tuple[TaskRecord, ...]
    history: tuple[str, ...] = ()
    split: tuple[Share, ...] = ()
    pinned: bool = False
    shared_with: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What its tenant calls it."""
        return owner_and_name(self.task_id)[1]

    @property
    def nbytes(self) -> int:
        """Size of all versions that it keeps, in bytes."""
        return sum(record.nbytes for record in self.versions)

    @property
    def served(self) -> tuple[TaskRecord, ...]:
        """The task at every version that a request may get."""
        if not self.split:
            return (self.record,)
        return tuple(self.at(share.version) for share in self.split)

    @property
    def record(self) -> TaskRecord:
        """The task at its active version."""
        return self.at(self.version)

    def at(self, version: str) -> TaskRecord:
        """The task at a kept version.

        Raises:
            UnknownVersionError: it is not kept.
        """
        for record in self.versions:
            if record.version == version:
                return record
        raise UnknownVersionError(
            f"task {self.name!r} keeps no version {version[:80]!r}; see those it keeps under "
            f"/admin/tasks/{self.name}/versions"
        )

    def chosen(self, user: str | None) -> TaskRecord:
        """The version for one request: by share, always the same for the same user."""
        if not self.split:
            return self.record
        point = random.randrange(WHOLE) if user is None else _point(self.task_id, user)  # noqa: S311
        for share in self.split:
            if point < share.percent:
                return self.at(share.version)
            point -= share.percent
        raise AssertionError("shares add to 100")


def created(record: TaskRecord) -> Task:
    """A new task."""
    return Task(record.task_id, record.version, (record,))


def uploaded(task: Task, record: TaskRecord, *, activate: bool, keep: int) -> Task:
    """With another version, and only `keep` in all if no more are in use.

    Those that a roll-back would go to stay longest, then the last uploaded.
    """
    others = tuple(kept for kept in task.versions if kept.version != record.version)
    grown = replace(task, versions=(record, *others))
    if activate:
        grown = activated(grown, record.version)
    in_use = {record.version, grown.version, *(share.version for share in grown.split)}
    by_worth = dict.fromkeys((*in_use, *grown.history, *(kept.version for kept in others)))
    kept = set(list(by_worth)[: max(keep, len(in_use))])
    return _keeping(grown, kept)


def activated(task: Task, version: str) -> Task:
    """With this version active and no split.

    Raises:
        UnknownVersionError: the task does not keep it.
    """
    task.at(version)
    if version == task.version:
        return replace(task, split=())
    before = (old for old in (task.version, *task.history) if old != version)
    return replace(task, version=version, history=tuple(dict.fromkeys(before)), split=())


def rolled_back(task: Task) -> Task:
    """With what was active before, so that doing it again goes back further; no split.

    Raises:
        VersionConflictError: nothing was, or it is not kept any more.
    """
    if not task.history:
        raise VersionConflictError(
            f"task {task.name!r} keeps no version that was active before {task.version}; "
            "activate one by its name"
        )
    version, *history = task.history
    return replace(task, version=version, history=tuple(history), split=())


def divided(task: Task, shares: Mapping[str, int]) -> Task:
    """With the requests split; without shares they all go to the active version again.

    Raises:
        UnknownVersionError: the task does not keep a version.
        InvalidSplitError: the shares are not from 1 to 100, or do not add to 100.
    """
    for version, percent in shares.items():
        task.at(version)
        if not 1 <= percent <= WHOLE:
            raise InvalidSplitError(
                f"the share of {version} is {percent}; expected 1 to {WHOLE} percent"
            )
    if shares and sum(shares.values()) != WHOLE:
        raise InvalidSplitError(
            f"the shares add to {sum(shares.values())} percent; expected {WHOLE}"
        )
    return replace(task, split=tuple(Share(*share) for share in shares.items()))


def shared(task: Task, tenants: Iterable[str]) -> Task:
    """With these tenants allowed to use it, and no others; `public` is all of them.

    Raises:
        InvalidTenantError
    """
    wanted = set(tenants)
    for tenant in wanted - {PUBLIC}:
        check_tenant(tenant)
    if PUBLIC in wanted:
        wanted = {PUBLIC}
    wanted.discard(owner_and_name(task.task_id)[0])
    return replace(task, shared_with=tuple(sorted(wanted)))


def without(task: Task, version: str) -> Task:
    """Without one version.

    Raises:
        UnknownVersionError: the task does not keep it.
        VersionConflictError: it is active, or has a share of the requests.
    """
    task.at(version)
    if version == task.version:
        raise VersionConflictError(
            f"version {version} is the active one of task {task.name!r}; activate another "
            "first, or delete the task"
        )
    if any(share.version == version for share in task.split):
        raise VersionConflictError(
            f"version {version} has a share of task {task.name!r}'s requests; end the split first"
        )
    return _keeping(task, {kept.version for kept in task.versions} - {version})


def _keeping(task: Task, kept: set[str]) -> Task:
    versions = tuple(record for record in task.versions if record.version in kept)
    history = tuple(version for version in task.history if version in kept)
    return replace(task, versions=versions, history=history)


def _point(task_id: str, user: str) -> int:
    """0 to 99, the same for the same task and user on every server."""
    digest = hashlib.sha256(f"{task_id}\0{user}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8]) % WHOLE
