"""Memory that was freed goes back to the operating system."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from server.freed_memory import return_freed_memory

MIB = 2**20


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    [line] = [line for line in lines if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked to")
def test_what_was_freed_is_the_systems_again() -> None:
    blocks = [bytearray(2000) for _ in range(50_000)]
    del blocks[:-1]  # the last one keeps the C library from shrinking the heap by itself
    before = resident_bytes()
    return_freed_memory()
    assert before - resident_bytes() > 50 * MIB
