"""`prefixserve tasks`: the versions of a task, and who may use it."""

from __future__ import annotations

from typing import Annotated

import typer

from clients import _options as options
from clients._answers import Task
from clients._calls import DEFAULT_URL
from clients._client import Client
from clients._console import print_json, print_versions
from clients._errors import InvalidArgumentError

app = typer.Typer(
    help="List the versions of a task, choose among them, and split requests between them.",
    no_args_is_help=True,
)

TaskName = Annotated[str, typer.Argument(help="Name of the task.", metavar="TASK")]
VersionName = Annotated[
    str, typer.Argument(help="The version, or how its name begins.", metavar="VERSION")
]


@app.command()
def versions(task: TaskName, url: options.Url = DEFAULT_URL, as_json: options.Json = False) -> None:
    """List the versions that a task keeps, the last uploaded first."""
    with Client(url) as client:
        _print_versions(client, task, as_json)


@app.command()
def activate(
    task: TaskName,
    version: VersionName,
    url: options.Url = DEFAULT_URL,
    as_json: options.Json = False,
) -> None:
    """Give requests this version from now on; ends a split."""
    with Client(url) as client:
        changed = client.activate(task, _full_name(client, task, version))
        _print_changed(client, changed, as_json)


@app.command()
def rollback(task: TaskName, url: options.Url = DEFAULT_URL, as_json: options.Json = False) -> None:
    """Activate again what was active before; again goes back further."""
    with Client(url) as client:
        _print_changed(client, client.rollback(task), as_json)


@app.command()
def split(
    task: TaskName,
    shares: Annotated[
        list[str] | None,
        typer.Argument(help="Percent by version; none ends the split.", metavar="VERSION=PERCENT"),
    ] = None,
    url: options.Url = DEFAULT_URL,
    as_json: options.Json = False,
) -> None:
    """Divide a task's requests: `split TASK sha256:1f=90 sha256:9c=10`."""
    wanted = dict(map(_share, shares or ()))
    with Client(url) as client:
        named = {_full_name(client, task, name): percent for name, percent in wanted.items()}
        if len(named) < len(wanted):
            raise InvalidArgumentError("two of these names are one version")
        _print_changed(client, client.split(task, named), as_json)


@app.command()
def share(
    task: TaskName,
    tenants: Annotated[
        list[str] | None,
        typer.Argument(help="Who may use it; public is everybody, none nobody.", metavar="TENANT"),
    ] = None,
    url: options.Url = DEFAULT_URL,
    as_json: options.Json = False,
) -> None:
    """Let other tenants generate with a task, and no others than these."""
    with Client(url) as client:
        changed = client.share(task, tenants or [])
    if as_json:
        print_json(changed)
    else:
        typer.echo(f"{task} is shared with {', '.join(changed.shared_with) or 'nobody'}")


@app.command(name="rm")
def remove(
    task: TaskName,
    version: VersionName,
    url: options.Url = DEFAULT_URL,
    as_json: options.Json = False,
) -> None:
    """Remove a version that is neither active nor in a split."""
    with Client(url) as client:
        client.delete_version(task, _full_name(client, task, version))
        _print_versions(client, task, as_json)


def _share(text: str) -> tuple[str, int]:
    name, _, percent = text.rpartition("=")
    if not name or not percent.isascii() or not percent.isdecimal():
        raise typer.BadParameter(f"{text!r} is not VERSION=PERCENT, such as sha256:1f09=90")
    return name, int(percent)


def _full_name(client: Client, task: str, name: str) -> str:
    """The one version of the task whose name, with or without `sha256:`, begins so."""
    kept = [version.version for version in client.versions(task)]
    found = [version for version in kept if version.startswith((name, f"sha256:{name}"))]
    if len(found) != 1:
        number = "no version" if not found else f"{len(found)} versions"
        raise InvalidArgumentError(
            f"task {task} keeps {number} whose name begins with {name[:80]!r}; see: "
            f"prefixserve tasks versions {task}"
        )
    return found[0]


def _print_changed(client: Client, task: Task, as_json: bool) -> None:
    if as_json:
        print_json(task)
    else:
        _print_versions(client, task.task_id, as_json=False)


def _print_versions(client: Client, task: str, as_json: bool) -> None:
    found = client.versions(task)
    print_json(found) if as_json else print_versions(found)
