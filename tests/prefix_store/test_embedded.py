"""The embedded Valkey: what was acknowledged is there after any restart."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import signal
import stat
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from redis.asyncio import Redis

from prefix_store.embedded import EmbeddedValkey
from prefix_store.errors import StoreUnavailableError
from prefix_store.redis_store import RedisPrefixStore
from prefix_store.valkey_process import LOCK_NAME
from tests.prefix_store.examples import an_artefact
from tests.prefix_store.servers import VALKEY


async def pid_of(valkey: EmbeddedValkey) -> int:
    async with Redis.from_url(valkey.url) as client:
        return int((await client.info("server"))["process_id"])


def socket_of(url: str) -> Path:
    return Path(unquote(url.removeprefix("unix://")))


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def kept_by(data_dir: Path) -> list[str]:
    """The tasks that a new server on `data_dir` has, each with its artefact."""
    async with EmbeddedValkey(data_dir) as valkey:
        store = RedisPrefixStore.from_url(valkey.url)
        records = [task.record for task in await store.list()]
        for record in records:
            await store.read(record.version)
        await store.close()
        return [record.task_id for record in records]


async def test_a_restart_keeps_every_task(tmp_path: Path) -> None:
    async with EmbeddedValkey(tmp_path) as valkey:
        store = RedisPrefixStore.from_url(valkey.url)
        for seed, name in enumerate("abc"):
            await store.put(name, an_artefact(seed))
        await store.delete("b")
        await store.close()

    assert await kept_by(tmp_path) == ["a", "c"]


async def test_a_kill_right_after_the_answer_keeps_the_task(tmp_path: Path) -> None:
    async with EmbeddedValkey(tmp_path) as valkey:
        pid = await pid_of(valkey)
        store = RedisPrefixStore.from_url(valkey.url)
        await store.put("one", an_artefact())
        os.kill(pid, signal.SIGKILL)
        await store.close()

    assert await kept_by(tmp_path) == ["one"]


KILLED_OWNER = """
import asyncio, os, sys
from pathlib import Path
from prefix_store.embedded import EmbeddedValkey

async def main():
    owned = [EmbeddedValkey(Path(data_dir)) for data_dir in sys.argv[1:]]
    for valkey in owned:
        await valkey.start()
        print(valkey.url, flush=True)
    os.kill(os.getpid(), 9)

asyncio.run(main())
"""


async def test_takes_over_from_an_owner_that_was_killed(tmp_path: Path) -> None:
    data_dirs = [tmp_path / "short", tmp_path / ("long" * 30)]
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", KILLED_OWNER, *map(str, data_dirs), stdout=asyncio.subprocess.PIPE
    )
    urls = (await owner.communicate())[0].decode().split()
    assert owner.returncode == -signal.SIGKILL
    for url in urls:  # their servers run on
        store = RedisPrefixStore.from_url(url)
        await store.put("one", an_artefact())
        await store.close()

    for data_dir in data_dirs:
        assert await kept_by(data_dir) == ["one"]
    shutil.rmtree(socket_of(urls[1]).parent.parent)  # the killed owner could not remove its link


async def test_stops_what_was_left_behind_before_it_listened(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.sock"
    with (tmp_path / LOCK_NAME).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [VALKEY, "--port", "0", "--unixsocket", str(elsewhere)]
        left = await asyncio.create_subprocess_exec(
            *command, cwd=tmp_path, pass_fds=[lock.fileno()]
        )
    async with EmbeddedValkey(tmp_path):
        assert await asyncio.wait_for(left.wait(), 10) == -signal.SIGKILL


async def test_one_owner_at_a_time(tmp_path: Path) -> None:
    async with EmbeddedValkey(tmp_path) as valkey:
        with pytest.raises(StoreUnavailableError, match=f"already keeps its data in {tmp_path}"):
            await EmbeddedValkey(tmp_path).start()
        assert await pid_of(valkey)

    async with EmbeddedValkey(tmp_path):
        pass


@pytest.mark.parametrize("folder", ["short", "x" * 120])
async def test_a_second_process_may_join_the_server_that_runs(tmp_path: Path, folder: str) -> None:
    data_dir = tmp_path / folder
    async with EmbeddedValkey(data_dir) as owner:
        async with EmbeddedValkey(data_dir, join=True) as joined:
            assert await pid_of(joined) == await pid_of(owner)
        assert await pid_of(owner)

    async with EmbeddedValkey(data_dir, join=True) as alone:
        assert await pid_of(alone)


@pytest.mark.parametrize("folder", ["x" * 120, "a b", "quo'te", 'quo"te', "größe", "#x"])
async def test_any_path_will_do(tmp_path: Path, folder: str) -> None:
    data_dir = tmp_path / folder
    async with EmbeddedValkey(data_dir) as valkey:
        store = RedisPrefixStore.from_url(valkey.url)
        await store.put("one", an_artefact())
        await store.close()
        socket = socket_of(valkey.url)
        assert mode_of(socket.parent.parent) == 0o700
        assert mode_of(socket) == 0o700

    assert (data_dir / "appendonlydir").is_dir()
    assert mode_of(data_dir) == 0o700
    assert not socket.parent.exists()
    assert await kept_by(data_dir) == ["one"]


async def test_is_reached_by_its_socket_alone(valkey: EmbeddedValkey) -> None:
    async with Redis.from_url(valkey.url) as client:
        config = await client.config_get("*")

    assert config["port"] == "0"
    assert (config["appendonly"], config["appendfsync"]) == ("yes", "always")
    assert config["maxmemory-policy"] == "noeviction"


async def test_a_folder_it_cannot_use_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(StoreUnavailableError, match=f"cannot start in {tmp_path}/file"):
        await EmbeddedValkey(tmp_path / "file").start()


async def test_data_that_cannot_be_read_is_refused_and_the_folder_is_free_again(
    tmp_path: Path,
) -> None:
    async with EmbeddedValkey(tmp_path):
        pass
    [log] = (tmp_path / "appendonlydir").glob("*.incr.aof")
    log.write_bytes(b"not an append-only file\n" * 100)

    with pytest.raises(StoreUnavailableError, match="Bad file format"):
        await EmbeddedValkey(tmp_path).start()

    log.write_bytes(b"")
    assert await kept_by(tmp_path) == []


async def test_a_cancelled_start_leaves_nothing_behind(tmp_path: Path) -> None:
    starting = asyncio.create_task(EmbeddedValkey(tmp_path).start())
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting

    assert await kept_by(tmp_path) == []


async def test_has_no_url_unless_it_runs(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="not running"):
        _ = EmbeddedValkey(tmp_path).url
