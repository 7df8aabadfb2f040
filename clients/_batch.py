"""`prefixserve batch`: files of requests that the server answers when it has time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from clients import _options as options
from clients._answers import Batch
from clients._calls import DEFAULT_URL
from clients._client import Client
from clients._console import print_error, print_json, progress_bar
from clients._errors import BatchError, UnknownTaskError

app = typer.Typer(help="Have files of requests answered.", no_args_is_help=True)

_SUFFIX = ".batch"
"""Beside the results while they are awaited: the batch's id."""


@app.callback()
def _batch() -> None:
    """So that `run` is a word of the command although it is the only one."""


@app.command()
def run(
    requests: Annotated[
        Path, Argument(help="JSON lines with custom_id, method, url and body, as OpenAI has them.")
    ],
    output: Annotated[Path, Argument(help="File for the answers; errors go to OUTPUT.errors.")],
    interval: Annotated[float, Option(min=0.01, help="Seconds between looks at it.")] = 1.0,
    url: options.Url = DEFAULT_URL,
    as_json: options.Json = False,
) -> None:
    """Have a file of requests answered, and wait; exit code 1 if some of them failed.

    Interrupted, the server goes on; the same command again waits for the same batch.
    """
    state = output.with_name(output.name + _SUFFIX)
    with Client(url) as client:
        batch = _started(client, requests, state)
        try:
            batch = _awaited(client, batch, interval)
        except KeyboardInterrupt:
            print_error(f"interrupted; {batch.id} goes on: run the same command again to wait")
            raise typer.Exit(130) from None
        _save(client, batch.output_file_id, output)
        _save(client, batch.error_file_id, output.with_name(output.name + ".errors"))
    state.unlink()
    counts = batch.request_counts
    told = f"{batch.status}: {counts.completed} answered, {counts.failed} failed of {counts.total}"
    print_json(batch) if as_json else typer.echo(told)
    if batch.status != "completed":
        raise BatchError(batch.errors.data[0].message if batch.errors else told)
    if counts.failed:
        raise typer.Exit(1)


def _started(client: Client, requests: Path, state: Path) -> Batch:
    """The batch that an earlier call has started for this output, or a new one."""
    if state.exists():
        try:
            return client.batch(state.read_text().strip())
        except UnknownTaskError:
            pass  # another server's, or long ago
    endpoint = _endpoint(requests)
    with (
        requests.open("rb") as data,
        progress_bar("Uploading", of_bytes=True) as progress,
    ):
        file = client.upload_file(requests.name, data, progress=progress)
    batch = client.create_batch(file.id, endpoint)
    state.write_text(f"{batch.id}\n")
    return batch


def _endpoint(requests: Path) -> str:
    """What the first request is for."""
    try:
        with requests.open("rb") as file:
            first = next((line for line in file if line.strip()), b"")
        return str(json.loads(first)["url"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BatchError(
            f"{requests}: the first line is not a request with a url ({error}); expected "
            '{"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {...}}'
        ) from error


def _awaited(client: Client, batch: Batch, interval: float) -> Batch:
    with progress_bar("Waiting", of_bytes=False) as progress:
        while not batch.has_ended:
            time.sleep(interval)
            batch = client.batch(batch.id)
            counts = batch.request_counts
            progress(counts.completed + counts.failed, counts.total)
    return batch


def _save(client: Client, file_id: str | None, path: Path) -> None:
    """Write a file of results, whole or not at all; without one, no older one stays."""
    if file_id is None:
        path.unlink(missing_ok=True)
        return
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(client.file_content(file_id))
        part.replace(path)
    except OSError as error:
        raise BatchError(f"cannot write {path}: {error.strerror or error}") from error
