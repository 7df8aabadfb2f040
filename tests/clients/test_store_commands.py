"""`export`, `import` and `doctor` on real embedded stores, through the command line."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from redis.asyncio import Redis
from typer.testing import CliRunner, Result

from clients.cli import app
from prefix_store.api_key import Scope, kept_of, new_key_text
from prefix_store.artefact import Artefact
from prefix_store.data_dir import store_dir
from prefix_store.embedded import EmbeddedValkey
from prefix_store.opening import opened_store
from prefix_store.prefix import Prefix
from prefix_store.redis_store import RedisPrefixStore, layout
from prefix_store.store import Task
from tests.clients.conftest import HEAD_DIM, HEADS, LAYERS

T = TypeVar("T")
Damage = Callable[[Redis], Awaitable[object]]


def an_artefact(seed: int, layers: int = LAYERS, **fields: Any) -> Artefact:
    shape = (layers, HEADS, 4, HEAD_DIM)
    keys, values = torch.randn((2, *shape), generator=torch.Generator().manual_seed(seed))
    return Artefact.of(Prefix.of(keys, values, method="prefix-tuning", **fields))


A, B, C = (an_artefact(seed, template=f"{seed} {{source}}") for seed in range(3))


async def with_tasks(store: RedisPrefixStore) -> None:
    """`one` has a version that `two` has, too; that has three, two split, is pinned and shared."""
    await store.put("one", A)
    for artefact in (A, B, C):
        await store.put("two", artefact)
    await store.rollback("two")
    await store.split("two", {A.version: 10, B.version: 90})
    await store.pin("two", True)
    await store.share("two", ["beta", "acme"])


async def in_store(data_dir: Path, use: Callable[[RedisPrefixStore], Awaitable[T]]) -> T:
    async with opened_store(None, data_dir) as store:
        return await use(store)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A data directory with two tasks in its store, which nobody runs."""
    asyncio.run(in_store(tmp_path / "data", with_tasks))
    return tmp_path / "data"


def tasks_in(data_dir: Path) -> list[Task]:
    """The tasks of a store, whose every artefact can be read."""

    async def read(store: RedisPrefixStore) -> list[Task]:
        tasks = await store.list()
        for task in tasks:
            for record in task.versions:
                assert Artefact.of(Prefix.from_bytes(await store.read(record.version)))
        return tasks

    return asyncio.run(in_store(data_dir, read))


def damage(data_dir: Path, do: Damage) -> None:
    async def run() -> None:
        async with (
            EmbeddedValkey(store_dir(data_dir)) as valkey,
            Redis.from_url(valkey.url) as redis,
        ):
            await do(redis)

    asyncio.run(run())


def run(command: str, data_dir: Path, *arguments: str | Path) -> Result:
    result = CliRunner().invoke(
        app, [command, *map(str, arguments), "--data-dir", str(data_dir)], env={"COLUMNS": "400"}
    )
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


async def chunk_of(redis: Redis, artefact: Artefact) -> str:
    name = await redis.hget(layout.BLOBS, artefact.version)
    assert name is not None
    return layout.Blob.named(name).key(0)


async def truncate(redis: Redis) -> None:
    key = await chunk_of(redis, C)
    await redis.set(key, (await redis.get(key))[:-1])


async def flip_a_bit(redis: Redis) -> None:
    key, last = await chunk_of(redis, C), 8 * len(C.data) - 1
    await redis.setbit(key, last, 1 - await redis.getbit(key, last))


async def drop_a_chunk(redis: Redis) -> None:
    await redis.delete(await chunk_of(redis, C))


def test_a_store_comes_back_as_it_was(data_dir: Path, tmp_path: Path) -> None:
    folder, other = tmp_path / "export", tmp_path / "other"
    before = tasks_in(data_dir)
    assert [len(task.versions) for task in before] == [1, 3]
    assert before[1].split
    assert before[1].history
    assert before[1].pinned
    assert before[1].shared_with == ("acme", "beta")

    exported = run("export", data_dir, folder)
    assert (exported.exit_code, exported.stdout) == (0, "2 tasks exported\n")
    names = {f"{one.version.replace(':', '-')}.safetensors": one.data for one in (A, B, C)}
    found = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert found == names
    assert {path.name for path in folder.iterdir()} == {*names, "tasks.json"}

    imported = run("import", other, folder)
    assert (imported.exit_code, imported.stdout) == (0, "2 tasks imported\n")
    assert tasks_in(other) == before


def test_what_is_there_is_left_alone(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    run("export", data_dir, folder)
    [path] = folder.glob(f"*{C.version[7:]}*")
    kept = [other.stat().st_mtime_ns for other in folder.glob("*.safetensors") if other != path]
    path.write_bytes(C.data[:-1])  # as a copy that broke off

    again = run("export", data_dir, folder)

    assert again.stdout == "1 tasks exported, 1 unchanged\n"
    assert path.read_bytes() == C.data
    assert kept == [
        other.stat().st_mtime_ns for other in folder.glob("*.safetensors") if other != path
    ]
    assert run("import", data_dir, folder).stdout == "0 tasks imported, 2 unchanged\n"


def test_beside_a_server_that_runs(data_dir: Path, tmp_path: Path) -> None:
    with asyncio.Runner() as runner:
        owner = EmbeddedValkey(store_dir(data_dir))
        runner.run(owner.start())
        done = subprocess.run(
            [
                *(sys.executable, "-m", "clients", "export", tmp_path / "export"),
                *("--data-dir", data_dir, "--json"),
            ],
            capture_output=True,
            check=True,
            timeout=60,
        )
        by_url = run("export", tmp_path / "none", tmp_path / "export", "--redis-url", owner.url)
        runner.run(owner.stop())

    assert json.loads(done.stdout) == {
        "done": ["one", "two"],
        "unchanged": [],
        "failed": {},
        "keys": 0,
    }
    assert by_url.stdout == "0 tasks exported, 2 unchanged\n"


def spoilt(folder: Path, how: str) -> None:
    [path] = folder.glob(f"*{C.version[7:]}*")
    index = json.loads((folder / "tasks.json").read_text())
    two = index["tasks"]["two"]
    match how:
        case "corrupted":
            path.write_bytes(C.data[:-1] + bytes([C.data[-1] ^ 1]))
        case "truncated":
            path.write_bytes(C.data[:-1])
        case "empty":
            path.write_bytes(b"")
        case "missing":
            path.unlink()
        case "split":
            two["split"] = {A.version: 10}
        case "path":
            two["versions"][0]["version"] = "sha256:../../etc/passwd"
        case "type":
            two["pinned"] = "yes"
        case "history":
            two["history"] = [two["version"]]
    (folder / "tasks.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("corrupted", "hashes to sha256:"),
        ("truncated", "hashes to sha256:"),
        ("empty", "hashes to sha256:"),
        ("missing", "cannot read .*: No such file"),
        ("split", "add to 10 percent; expected 100"),
        ("path", "expected sha256: and 64 hex digits"),
        ("type", "wrong at 'pinned'"),
        ("history", "must be versions that the task keeps, each once"),
    ],
)
def test_a_bad_task_is_left_out_whole(data_dir: Path, tmp_path: Path, how: str, says: str) -> None:
    folder, other = tmp_path / "export", tmp_path / "other"
    run("export", data_dir, folder)
    spoilt(folder, how)

    result = run("import", other, folder)

    assert result.exit_code == 1
    assert result.stdout == "1 tasks imported, 1 failed\n"
    [line] = result.stderr.splitlines()
    assert line.startswith("Error: task 'two' is not imported: ")
    assert re.search(says, line), line
    assert tasks_in(other) == tasks_in(data_dir)[:1]


def test_a_task_of_the_same_name_stays_unless_told(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    before = tasks_in(data_dir)
    run("export", data_dir, folder)
    asyncio.run(in_store(data_dir, lambda store: store.put("one", B)))
    changed = tasks_in(data_dir)

    refused = run("import", data_dir, folder)
    assert (refused.exit_code, tasks_in(data_dir)) == (1, changed)
    assert "has a different task of this name; --overwrite" in refused.stderr

    assert run("import", data_dir, folder, "--overwrite").exit_code == 0
    assert tasks_in(data_dir) == before


def test_a_damaged_task_is_not_exported_and_an_import_mends_it(
    data_dir: Path, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    run("export", data_dir, good)
    damage(data_dir, drop_a_chunk)

    result = run("export", data_dir, bad)
    assert (result.exit_code, result.stdout) == (1, "1 tasks exported, 1 failed\n")
    assert "task 'two' is not exported: bytes of the stored artefact" in result.stderr
    assert list(json.loads((bad / "tasks.json").read_text())["tasks"]) == ["one"]
    assert not list(bad.glob("*.partial"))
    assert not list(bad.glob(".*.partial"))

    assert run("import", data_dir, good).stdout == "1 tasks imported, 1 unchanged\n"
    assert run("doctor", data_dir, "--model", tiny_llama_dir).exit_code == 0


def test_tenants_and_the_hashes_of_keys_come_along(data_dir: Path, tmp_path: Path) -> None:
    folder, other = tmp_path / "export", tmp_path / "other"
    text = new_key_text()
    key = kept_of(text, "acme", [Scope.GENERATE, Scope.ADMIN], label="a", now=1.0, expires_at=9.0)

    async def add(store: RedisPrefixStore) -> None:
        await store.put("acme/one", an_artefact(7))
        await store.keys.change(key.key_id, lambda _: key)

    async def revoke(store: RedisPrefixStore) -> None:
        await store.keys.change(key.key_id, lambda _: replace(key, revoked_at=2.0))

    asyncio.run(in_store(data_dir, add))
    exported = run("export", data_dir, folder)
    assert exported.stdout == "3 tasks exported; 1 API keys exported\n"
    assert text.split("-", 2)[2] not in (folder / "tasks.json").read_text()
    imported = run("import", other, folder)
    assert imported.stdout == "3 tasks imported; 1 API keys imported\n"
    assert [task.task_id for task in tasks_in(other)] == ["acme/one", "one", "two"]
    assert asyncio.run(in_store(other, lambda store: store.keys.list())) == [key]

    asyncio.run(in_store(other, revoke))
    assert run("import", other, folder, "--overwrite").stdout == "0 tasks imported, 3 unchanged\n"
    [kept] = asyncio.run(in_store(other, lambda store: store.keys.list()))
    assert kept.revoked_at == 2.0, "an export gives back nothing that was taken"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("digest", "00"),
        ("tenant", "A/B"),
        ("scopes", ["root"]),
        ("created_at", "now"),
        ("more", 1),
    ],
)
def test_an_export_with_a_damaged_key_changes_nothing(
    data_dir: Path, tmp_path: Path, field: str, value: object
) -> None:
    folder, other = tmp_path / "export", tmp_path / "other"
    key = kept_of(new_key_text(), "acme", Scope, label="", now=1.0)
    asyncio.run(in_store(data_dir, lambda store: store.keys.change(key.key_id, lambda _: key)))
    run("export", data_dir, folder)
    index = json.loads((folder / "tasks.json").read_text())
    index["keys"][key.key_id][field] = value
    (folder / "tasks.json").write_text(json.dumps(index))

    result = run("import", other, folder)

    assert (result.exit_code, result.stdout) == (1, "")
    assert f"API key '{key.key_id}' is damaged" in result.stderr
    assert asyncio.run(in_store(other, lambda store: store.keys.list())) == []
    assert tasks_in(other) == []


def test_no_export_and_no_store(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run("import", tmp_path / "data", tmp_path / "empty")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "tasks.json: No such file" in result.stderr
    for command in (["export", tmp_path / "x"], ["doctor"]):
        result = run(str(command[0]), tmp_path / "nowhere", *command[1:])
        assert (result.exit_code, result.stdout) == (1, "")
        assert "there is no store in" in result.stderr
    assert not (tmp_path / "nowhere").exists()


def test_an_empty_store(tmp_path: Path, tiny_llama_dir: Path) -> None:
    data_dir, folder = tmp_path / "data", tmp_path / "export"
    assert asyncio.run(in_store(data_dir, lambda store: store.list())) == []

    assert run("export", data_dir, folder).stdout == "0 tasks exported\n"
    assert run("import", data_dir, folder).stdout == "0 tasks imported\n"
    assert run("doctor", data_dir, "--model", tiny_llama_dir).exit_code == 0


def test_the_doctor_finds_nothing_wrong(data_dir: Path, tiny_llama_dir: Path) -> None:
    # What an upload under way and one that broke off leave is in order.
    async def leave_uploads(redis: Redis) -> None:
        await redis.zadd(layout.PENDING, {f"{A.version}:u:8:4": 2**40, f"{B.version}:v:8:4": 0})
        await redis.set(f"prefixserve:{{{A.version}:u:8:4}}:0", b"data")
        await redis.set(f"prefixserve:{{{A.version}:late:8:4}}:0", b"data", ex=900)

    damage(data_dir, leave_uploads)

    result = run("doctor", data_dir, "--model", tiny_llama_dir)

    assert result.exit_code == 0
    heading, *rows = result.stdout.splitlines()
    assert heading.split() == ["TASK", "VERSION", "STATE", "WHAT", "TO", "DO"]
    assert [row.split() for row in rows] == [
        ["one", A.version[:19], "ok"],
        ["two", B.version[:19], "ok"],
    ]


@pytest.mark.parametrize(
    ("do", "task_id", "says"),
    [
        (truncate, "two", "bytes of the stored artefact"),
        (drop_a_chunk, "two", "bytes of the stored artefact"),
        (flip_a_bit, "two", "hashes to"),
        (lambda redis: redis.hdel(layout.BLOBS, C.version), "two", "not in the store"),
        (lambda redis: redis.hset(layout.TASKS, "two", "{}"), "two", "cannot be read"),
        (lambda redis: redis.hset(layout.USERS, A.version, 3), "", "number of tasks"),
        (lambda redis: redis.hdel(layout.SHARED, "two"), "two", "list of shared tasks"),
        (lambda redis: redis.hset(layout.stored("default"), "two", 7), "two", "size on record"),
        (lambda redis: redis.hset(layout.stored("acme"), "acme/x", 7), "acme/x", "size on record"),
        (lambda redis: redis.hset(layout.KEYS, "abc", "{}"), "", "API key cannot be read"),
        (
            lambda redis: redis.hset(layout.BLOBS, "sha256:0", "sha256:0:u:0:4"),
            "",
            "no task keeps it",
        ),
        (
            lambda redis: redis.set(f"prefixserve:{{{A.version}:lost:8:4}}:0", b"data"),
            "",
            "no task keeps it",
        ),
    ],
    ids=(
        [
            "truncated",
            "chunk",
            "hash",
            "blob",
            "task",
            "count",
            "shared",
            "size",
            "size of no task",
            "key",
            "unreferenced",
            "lost",
        ]
    ),
)
def test_the_doctor_finds_damage(
    data_dir: Path, tiny_llama_dir: Path, do: Damage, task_id: str, says: str
) -> None:
    damage(data_dir, do)

    result = run("doctor", data_dir, "--model", tiny_llama_dir, "--json")

    assert result.exit_code == 1
    findings = json.loads(result.stdout)["findings"]
    [finding] = [finding for finding in findings if finding["task_id"] == task_id]
    assert says in finding["problem"]
    table = run("doctor", data_dir, "--model", tiny_llama_dir)
    assert table.exit_code == 1
    assert says in table.stdout
    assert finding["remedy"] in table.stdout
    assert re.search(r"^one +\S+ +ok", table.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("artefact", "says"),
    [
        (an_artefact(5, fingerprint="ab" * 32, base_model="other"), "fingerprint abababababab"),
        (an_artefact(5, layers=3), "3 layers and the base model"),
    ],
    ids=["fingerprint", "shape"],
)
def test_the_doctor_finds_what_does_not_fit_the_model(
    data_dir: Path, tiny_llama_dir: Path, artefact: Artefact, says: str
) -> None:
    asyncio.run(in_store(data_dir, lambda store: store.put("odd", artefact)))

    result = run("doctor", data_dir, "--model", tiny_llama_dir, "--json")

    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["tasks"] == ["odd", "one", "two"]
    [finding] = report["findings"]
    assert (finding["task_id"], finding["version"]) == ("odd", artefact.version)
    assert says in finding["problem"]
