"""Two ways to run a benchmark in a process of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parent.parent

Launch = Callable[[str, Sequence[str]], str]
"""Runs the benchmark of a name with arguments, and returns what it printed.

Raises `subprocess.CalledProcessError` where it failed.
"""


def command_of(name: str, arguments: Sequence[str]) -> list[str]:
    """What to type for it, `python` being the first word."""
    return ["python", "-m", f"benchmarks.{name}", *arguments]


def as_command(name: str, arguments: Sequence[str]) -> str:
    """A `Launch`: as one would type it."""
    command = [sys.executable, *command_of(name, arguments)[1:]]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def forked(names: Sequence[str]) -> Launch:
    """A `Launch` whose processes are forked from one that has imported these benchmarks.

    To import torch and transformers takes longer than what most of them do in a smoke run. The
    processes have the environment of the first launch.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([*map(_module, names)])

    def launch(name: str, arguments: Sequence[str]) -> str:
        with tempfile.NamedTemporaryFile("r", encoding="utf-8") as output:
            process = context.Process(target=_run, args=(name, list(arguments), output.name))
            process.start()
            process.join()
            if process.exitcode:
                raise subprocess.CalledProcessError(process.exitcode, command_of(name, arguments))
            return output.read()

    return launch


def _run(name: str, arguments: list[str], output: str) -> None:
    module = importlib.import_module(_module(name))
    sys.argv[1:] = arguments
    with Path(output).open("w", encoding="utf-8") as file, redirect_stdout(file):
        module.main()


def _module(name: str) -> str:
    """What `python -m` runs."""
    spec = importlib.util.find_spec(f"benchmarks.{name}")
    is_package = spec is not None and spec.submodule_search_locations is not None
    return f"benchmarks.{name}.__main__" if is_package else f"benchmarks.{name}"
