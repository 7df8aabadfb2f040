"""The files through which vLLM's processes read prefixes."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from prefix_store.archive import artefact_path
from prefix_store.prefix import Prefix
from server.engine.vllm.prefix_folder import PrefixFolder

PREFIX = Prefix.of(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), "unchecked")


@pytest.fixture
def folder() -> Iterator[PrefixFolder]:
    folder = PrefixFolder()
    folder.write("v", PREFIX)
    folder.add("v", 3)
    yield folder
    folder.close()
    assert not folder.path.exists()


def test_only_this_user_can_read_it(folder: PrefixFolder) -> None:
    assert folder.path.stat().st_mode & 0o077 == 0
    assert [path.name for path in folder.path.iterdir()] == ["v.safetensors"]


def test_a_dropped_version_stays_for_those_that_use_it(folder: PrefixFolder) -> None:
    file = artefact_path(folder.path, "v")
    for _ in range(2):
        folder.acquire("v")
    folder.drop("v")
    assert folder.prefix_length("v") is None
    folder.release("v")
    assert file.exists()
    folder.release("v")
    assert not file.exists()


def test_a_version_that_returns_in_time_is_kept(folder: PrefixFolder) -> None:
    folder.acquire("v")
    folder.drop("v")
    folder.write("v", PREFIX)
    folder.add("v", 3)
    folder.release("v")
    assert folder.prefix_length("v") == 3
    assert artefact_path(folder.path, "v").exists()
    folder.drop("v")
    assert not artefact_path(folder.path, "v").exists()


def test_an_unknown_version_is_ignored(folder: PrefixFolder) -> None:
    folder.drop("other")
    assert folder.prefix_length("other") is None


KILLED = """
import os, signal, sys
from pathlib import Path
from server.engine.vllm.prefix_folder import PrefixFolder
print(PrefixFolder(Path(sys.argv[1])).path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_server_left_is_deleted_by_the_next(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [str(path) for path in tmp_path.iterdir()] == [killed.stdout.strip()]
    (tmp_path / "prefixserve-file").touch()
    (tmp_path / "other").mkdir()
    folders = [PrefixFolder(tmp_path) for _ in range(2)]  # the second leaves the first alone
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"prefixserve-file", "other", *(folder.path.name for folder in folders)}
    for folder in (*folders, *folders):
        folder.close()
