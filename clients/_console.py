"""What the commands print: plain or coloured for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

import typer
from pydantic_core import to_json
from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from clients._answers import Key, StreamToken, Task, Version
from clients._files import Progress as OnSent

if TYPE_CHECKING:
    from prefix_store.checkup import Checkup

_PIPED_WIDTH = 1000
_SHORT_VERSION = len("sha256:") + 12


def print_error(message: str) -> None:
    """One red sentence on stderr."""
    Console(stderr=True, soft_wrap=True).print(Text(f"Error: {message}", style="red"))


def print_json(value: Any) -> None:
    """One line of JSON."""
    typer.echo(to_json(value).decode())


def print_tasks(tasks: Sequence[Task]) -> None:
    """A line for each task, under a heading."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("TASK", overflow="fold")
    table.add_column("METHOD")
    table.add_column("LENGTH", justify="right")
    table.add_column("SIZE", justify="right")
    table.add_column("VERSION", no_wrap=True)
    for task in tasks:
        table.add_row(
            Text(task.task_id),
            Text(task.method),
            str(task.prefix_length),
            decimal(task.bytes),
            task.version[:_SHORT_VERSION],
        )
    print_table(table)


def print_versions(versions: Sequence[Version]) -> None:
    """A line for each version of a task, the active one marked."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("VERSION", no_wrap=True)
    table.add_column("ACTIVE")
    table.add_column("SHARE", justify="right")
    table.add_column("METHOD")
    table.add_column("LENGTH", justify="right")
    table.add_column("SIZE", justify="right")
    table.add_column("UPLOADED")
    for version in versions:
        table.add_row(
            version.version[:_SHORT_VERSION],
            "*" if version.active else "",
            f"{version.percent} %",
            Text(version.method),
            str(version.prefix_length),
            decimal(version.bytes),
            version.created_at.strftime("%Y-%m-%d %H:%M:%S UTC"),
        )
    print_table(table)


def print_keys(keys: Sequence[Key]) -> None:
    """A line for each API key, under a heading."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("KEY ID", "TENANT", "SCOPES", "STATE", "MADE", "EXPIRES", "LABEL"):
        table.add_column(name, overflow="fold")
    for key in keys:
        table.add_row(
            key.key_id,
            Text(key.tenant),
            ", ".join(key.scopes),
            Text(key.state, style="" if key.state == "active" else "red"),
            _date(key.created_at),
            "never" if key.expires_at is None else _date(key.expires_at),
            Text(key.label),
        )
    print_table(table)


def _date(when: datetime) -> str:
    return when.strftime("%Y-%m-%d %H:%M UTC")


def print_fields(fields: Mapping[str, str]) -> None:
    """A line for each name and value."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in fields.items():
        table.add_row(name, Text(value))
    print_table(table)


def print_stream(tokens: Iterable[StreamToken], as_json: bool) -> None:
    """Tokens as they come: their text, or one line of JSON each."""
    for token in tokens:
        if as_json:
            print_json(token)
        elif not token.token.special:
            typer.echo(token.token.text, nl=False)
    if not as_json:
        typer.echo()


def print_checkup(checkup: Checkup) -> None:
    """A line for each task that is in order and for each thing that is wrong."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("TASK", overflow="fold")
    table.add_column("VERSION", no_wrap=True)
    table.add_column("STATE", overflow="fold")
    table.add_column("WHAT TO DO", overflow="fold")
    wrong = {finding.task_id for finding in checkup.findings}
    for task in checkup.tasks:
        if task.task_id not in wrong:
            table.add_row(
                Text(task.task_id), task.version[:_SHORT_VERSION], Text("ok", style="green")
            )
    for finding in checkup.findings:
        table.add_row(
            Text(finding.task_id or "-"),
            finding.version[:_SHORT_VERSION] or "-",
            Text(finding.problem, style="red"),
            Text(finding.remedy),
        )
    print_table(table)


@contextmanager
def progress_bar(label: str, *, of_bytes: bool) -> Iterator[OnSent]:
    """A bar on stderr, of bytes or of a count, gone when it is done; no bar without a terminal."""
    console = Console(stderr=True)
    counters: tuple[ProgressColumn, ...] = (
        (DownloadColumn(), TransferSpeedColumn()) if of_bytes else (MofNCompleteColumn(),)
    )
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *counters,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bars:
        bar = bars.add_task(label, total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)


def print_table(table: Table) -> None:
    """A table, whole when a program reads it."""
    console = Console()
    if not console.is_terminal:
        console.width = _PIPED_WIDTH
    console.print(table)
