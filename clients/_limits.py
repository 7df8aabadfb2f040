"""`prefixserve tenants limits` and `prefixserve usage`: what tenants may use, and what they did."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from datetime import date, datetime
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from clients import _options as options
from clients._answers import TenantLimits, UsageRow
from clients._calls import DEFAULT_URL
from clients._client import Client
from clients._console import print_json, print_table

tenants_app = typer.Typer(help="What tenants may use.", no_args_is_help=True)
app = typer.Typer(
    help="Show and set limits; set by the server's operator only.", no_args_is_help=True
)
tenants_app.add_typer(app, name="limits")

_NONE = "none"

TenantName = Annotated[str, typer.Argument(help="Name of the tenant.", metavar="TENANT")]
Setting = Annotated[
    list[str] | None,
    typer.Argument(
        help="Such as requests_per_minute=60; `none` for no limit. What is not named is the "
        "server's default.",
        metavar="[LIMIT=VALUE]...",
    ),
]
Key = Annotated[
    str | None, typer.Option("--key", help="Of the key with this id, not of the whole tenant.")
]


@app.command(name="ls")
def list_limits(url: options.Url = DEFAULT_URL, as_json: options.Json = False) -> None:
    """List the tenants for which limits are set."""
    with Client(url) as client:
        found = client.all_limits()
    print_json(found) if as_json else _print_limits(found)


@app.command()
def show(tenant: TenantName, url: options.Url = DEFAULT_URL, as_json: options.Json = False) -> None:
    """Show a tenant's limits as they hold."""
    with Client(url) as client:
        found = client.limits(tenant)
    print_json(found) if as_json else _print_limits([found])


@app.command(name="set")
def set_(
    tenant: TenantName,
    limits: Setting = None,
    key: Key = None,
    url: options.Url = DEFAULT_URL,
    as_json: options.Json = False,
) -> None:
    """Replace a tenant's limits: `set acme requests_per_minute=60 tokens_per_minute=none`."""
    wanted = dict(map(_parsed, limits or ()))
    with Client(url) as client:
        found = client.set_limits(tenant, wanted, key_id=key)
    if as_json:
        print_json(found)
    elif isinstance(found, TenantLimits):
        _print_limits([found])
    else:
        typer.echo(f"Set for key {found.key_id} of {tenant}")


def usage(  # noqa: PLR0917 - the command line gives them by name
    tenant: Annotated[str | None, typer.Option(help="Of this tenant only.")] = None,
    task: Annotated[str | None, typer.Option(help="Of this task only.")] = None,
    first: Annotated[
        datetime | None,
        typer.Option("--from", formats=["%Y-%m-%d"], help="First day, in UTC.", metavar="DAY"),
    ] = None,
    last: Annotated[
        datetime | None,
        typer.Option("--to", formats=["%Y-%m-%d"], help="Last day, in UTC.", metavar="DAY"),
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, for spreadsheets.")] = False,
    url: options.Url = DEFAULT_URL,
    as_json: options.Json = False,
) -> None:
    """Show tokens by day, tenant and task, of the last 30 days."""
    with Client(url) as client:
        rows = client.usage(tenant=tenant, task_id=task, first=_day(first), last=_day(last))
    if as_json:
        print_json(rows)
    elif as_csv:
        _print_csv(rows)
    else:
        _print_usage(rows)


def _parsed(text: str) -> tuple[str, int | float | None]:
    name, _, value = text.partition("=")
    if value == _NONE:
        return name, None
    try:
        return name, float(value) if name == "weight" else int(value)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not LIMIT=NUMBER or LIMIT=none") from error


def _day(moment: datetime | None) -> date | None:
    return None if moment is None else moment.date()


def _print_limits(found: Sequence[TenantLimits]) -> None:
    """A line for each limit of each tenant."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("TENANT", overflow="fold")
    table.add_column("LIMIT")
    table.add_column("VALUE", justify="right")
    table.add_column("FROM")
    for one in found:
        for name, value in one.effective.items():
            origin = "set" if name in one.limits else "default"
            shown = "-" if value is None else f"{value:,}"
            table.add_row(Text(one.tenant), name, shown, origin)
    print_table(table)


def _print_usage(rows: Sequence[UsageRow]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("DAY")
    table.add_column("TENANT", overflow="fold")
    table.add_column("TASK", overflow="fold")
    for name in ("SEQUENCES", "PROMPT", "PREFIX", "GENERATED"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.day),
            Text(row.tenant),
            Text(row.task_id or "-"),
            f"{row.sequences:,}",
            f"{row.prompt_tokens:,}",
            f"{row.prefix_tokens:,}",
            f"{row.generated_tokens:,}",
        )
    print_table(table)


def _print_csv(rows: Sequence[UsageRow]) -> None:
    writer = csv.DictWriter(sys.stdout, list(UsageRow.model_fields))
    writer.writeheader()
    writer.writerows(row.model_dump() for row in rows)
