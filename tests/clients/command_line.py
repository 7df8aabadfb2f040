"""What tests of commands say about the results of `run`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from typer.testing import Result

Run = Callable[..., Result]
"""Runs a command with the given arguments on the real server."""


def printed(result: Result) -> Any:
    """The JSON a command that succeeded has printed."""
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refused(result: Result, message: str) -> None:
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(rf"Error: [^\n]*{message}[^\n]*\n", result.stderr), result.stderr


def misused(result: Result, message: str) -> None:
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
