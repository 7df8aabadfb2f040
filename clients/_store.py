"""Commands that work on the store itself, whether a server runs or not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers.utils.logging import disable_progress_bar

from clients import _options as options
from clients._console import print_checkup, print_error, print_json, progress_bar
from prefix_store.admin_key import renew_admin_key
from prefix_store.archive import Outcome
from prefix_store.backup import export_store, import_store
from prefix_store.checkup import Checkup, check_store
from prefix_store.data_dir import DEFAULT_DATA_DIR, store_dir
from prefix_store.errors import StoreUnavailableError
from prefix_store.model_loading import DEFAULT_MODEL, load_base_model
from prefix_store.opening import opened_store
from prefix_store.redis_store import RedisPrefixStore

_Folder = Annotated[Path, typer.Argument(help="Folder of the export.", metavar="DIR")]
_Model = Annotated[
    str, typer.Option(envvar="PREFIXSERVE_MODEL", help="The base model that is served.")
]
_Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace tasks of the same name that are different.")
]


def export(
    folder: _Folder,
    redis_url: options.RedisUrl = None,
    data_dir: options.DataDir = DEFAULT_DATA_DIR,
    as_json: options.Json = False,
) -> None:
    """Write every task, its versions and the hashes of the API keys to a folder."""

    async def run() -> Outcome:
        async with _existing_store(redis_url, data_dir) as store:
            with progress_bar("Exporting", of_bytes=True) as progress:
                return await export_store(store, folder, progress)

    _finish(asyncio.run(run()), "exported", as_json)


def import_(
    folder: _Folder,
    overwrite: _Overwrite = False,
    redis_url: options.RedisUrl = None,
    data_dir: options.DataDir = DEFAULT_DATA_DIR,
    as_json: options.Json = False,
) -> None:
    """Put the tasks of an exported folder into the store; mends tasks whose bytes are damaged."""

    async def run() -> Outcome:
        async with opened_store(redis_url, data_dir, join=True) as store:
            with progress_bar("Importing", of_bytes=False) as progress:
                return await import_store(store, folder, progress, overwrite=overwrite)

    _finish(asyncio.run(run()), "imported", as_json)


def doctor(
    model: _Model = DEFAULT_MODEL,
    redis_url: options.RedisUrl = None,
    data_dir: options.DataDir = DEFAULT_DATA_DIR,
    as_json: options.Json = False,
) -> None:
    """Check every task in the store, against the base model too; exit code 1 if any is wrong."""
    disable_progress_bar()  # type: ignore[no-untyped-call]

    async def run() -> Checkup:
        async with _existing_store(redis_url, data_dir) as store:
            loaded = load_base_model(
                model,
                device=torch.device("cpu"),
                dtype=torch.bfloat16,
                cache_dir=data_dir.expanduser() / "models",
            )
            with progress_bar("Checking", of_bytes=False) as progress:
                return await check_store(store, loaded.spec, progress)

    checkup = asyncio.run(run())
    if as_json:
        findings = [asdict(finding) for finding in checkup.findings]
        print_json({"tasks": [task.task_id for task in checkup.tasks], "findings": findings})
    else:
        print_checkup(checkup)
    if checkup.findings:
        raise typer.Exit(1)


def new_admin_key(redis_url: str | None, data_dir: Path) -> Path:
    """Replace the admin key that the server made; the file with the new one."""

    async def run() -> Path:
        async with _existing_store(redis_url, data_dir) as store:
            return await renew_admin_key(store.keys, data_dir)

    return asyncio.run(run())


@asynccontextmanager
async def _existing_store(redis_url: str | None, data_dir: Path) -> AsyncIterator[RedisPrefixStore]:
    if redis_url is None and not store_dir(data_dir).is_dir():
        raise StoreUnavailableError(
            f"there is no store in {data_dir}; name another folder with --data-dir, or a Redis "
            "with --redis-url"
        )
    async with opened_store(redis_url, data_dir, join=True) as store:
        yield store


def _finish(outcome: Outcome, verb: str, as_json: bool) -> None:
    if as_json:
        print_json(asdict(outcome))
    else:
        for task_id, why in outcome.failed.items():
            print_error(f"task {task_id[:80]!r} is not {verb}: {why}")
        unchanged = f", {len(outcome.unchanged)} unchanged" if outcome.unchanged else ""
        failed = f", {len(outcome.failed)} failed" if outcome.failed else ""
        keys = f"; {outcome.keys} API keys {verb}" if outcome.keys else ""
        typer.echo(f"{len(outcome.done)} tasks {verb}{unchanged}{failed}{keys}")
    if outcome.failed:
        raise typer.Exit(1)
