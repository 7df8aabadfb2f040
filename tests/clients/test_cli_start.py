"""The command line starts at once: only the commands that need a model import one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from clients.cli import LATER, load


def test_nothing_heavy_is_imported_before_a_command_needs_it() -> None:
    code = (
        "import sys, clients.cli; "
        "print(*{'torch', 'transformers', 'redis', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", LATER)
def test_what_the_list_of_commands_says_is_what_the_command_says(name: str) -> None:
    _, summary = LATER[name]
    assert " ".join((load(name).help or "").split()) == summary
