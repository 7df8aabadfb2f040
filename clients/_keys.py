"""`prefixserve keys`: who may use the server."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Annotated

import typer

from clients import _options as options
from clients._calls import DEFAULT_URL
from clients._client import Client
from clients._console import print_json, print_keys
from prefix_store.api_key import Scope
from prefix_store.data_dir import DEFAULT_DATA_DIR

app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@app.command()
def create(  # noqa: PLR0917 - the command line gives them by name
    scope: Annotated[
        list[Scope],
        typer.Option(help="What it allows; may be given several times."),
    ],
    tenant: Annotated[
        str | None, typer.Option(help="Whose it is; without it, your own tenant's.")
    ] = None,
    label: Annotated[str, typer.Option(help="What it is for.")] = "",
    expires: Annotated[
        str | None, typer.Option(help="How long it is good, such as 90d, 12h or 30m.")
    ] = None,
    url: options.Url = DEFAULT_URL,
    as_json: options.Json = False,
) -> None:
    """Make a key and print it; nobody can see it again."""
    expires_in = None if expires is None else _seconds(expires)
    with Client(url) as client:
        key = client.create_key(scope, tenant=tenant, label=label, expires_in=expires_in)
    print_json(key) if as_json else typer.echo(key.key)


@app.command()
def ls(url: options.Url = DEFAULT_URL, as_json: options.Json = False) -> None:
    """List the keys of your tenant, or of every tenant for the server's operator."""
    with Client(url) as client:
        keys = client.list_keys()
    print_json(keys) if as_json else print_keys(keys)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The key's id, as `keys ls` shows it.")],
    url: options.Url = DEFAULT_URL,
    as_json: options.Json = False,
) -> None:
    """End a key for good, on every server within a second."""
    with Client(url) as client:
        key = client.revoke_key(key_id)
    print_json(key) if as_json else typer.echo(f"Revoked {key.key_id}")


@app.command()
def recover(
    redis_url: options.RedisUrl = None, data_dir: options.DataDir = DEFAULT_DATA_DIR
) -> None:
    """Write a new admin key into the store itself, when nobody has one any more."""
    path = import_module("clients._store").new_admin_key(redis_url, data_dir)  # takes seconds
    typer.echo(f"A new admin key is in {path}")


def _seconds(text: str) -> int:
    match = re.fullmatch(r"([1-9][0-9]{0,8})([smhd])", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a number and s, m, h or d, such as 90d")
    return int(match[1]) * _SECONDS[match[2]]
