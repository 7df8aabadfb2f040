"""Limits and usage from the client and the command line."""

from __future__ import annotations

import csv
import io

import pytest

import clients
from clients import Client
from tests.clients.command_line import Run, misused, printed, refused

INPUT = "The capital of France is"


def test_limits_and_usage_by_the_client(real_client: Client, kind: str) -> None:
    tenant = f"client-{kind}"
    found = real_client.set_limits(tenant, {"requests_per_minute": 60, "tasks": None})
    assert found == real_client.limits(tenant)
    assert isinstance(found, clients.TenantLimits)
    assert found.limits == {"requests_per_minute": 60, "tasks": None}
    assert found.effective["requests_per_minute"] == 60
    assert found in real_client.all_limits()
    key = real_client.set_limits(tenant, {"tokens_per_minute": 5}, key_id="k1")
    assert key == clients.KeyLimits(tenant=tenant, key_id="k1", limits={"tokens_per_minute": 5})
    real_client.set_limits(tenant, {})
    assert found not in real_client.all_limits()
    with pytest.raises(clients.InvalidRequestError, match="speed"):
        real_client.set_limits(tenant, {"speed": 1})

    def generated() -> int:
        rows = real_client.usage(tenant="default")
        return sum(row.generated_tokens for row in rows if row.task_id is None)

    before = generated()
    details = real_client.generate(INPUT, max_new_tokens=3).details
    assert generated() == before + details.generated_tokens
    assert real_client.usage(tenant="nobody") == []


def test_limits_by_the_command(run: Run) -> None:
    run("tenants", "limits", "set", "acme", "requests_per_minute=60", "tasks=none", "weight=2.5")
    heading, *rows = run("tenants", "limits", "show", "acme").stdout.splitlines()
    assert heading.split() == ["TENANT", "LIMIT", "VALUE", "FROM"]
    shown = {row.split()[1]: row.split()[2:] for row in rows}
    assert shown["requests_per_minute"] == ["60", "set"]
    assert shown["tasks"] == ["-", "set"]
    assert shown["weight"] == ["2.5", "set"]
    assert shown["tokens_per_minute"] == ["-", "default"]
    [listed] = printed(run("tenants", "limits", "ls", "--json"))
    assert listed["limits"] == {"requests_per_minute": 60, "tasks": None, "weight": 2.5}
    assert "k1 of acme" in run("tenants", "limits", "set", "acme", "--key", "k1").stdout
    run("tenants", "limits", "set", "acme")
    assert printed(run("tenants", "limits", "ls", "--json")) == []


def test_limits_that_are_none(run: Run) -> None:
    refused(run("tenants", "limits", "set", "acme", "speed=1"), "speed")
    misused(run("tenants", "limits", "set", "acme", "tasks=many"), "LIMIT=NUMBER")


def test_usage_by_the_command(run: Run) -> None:
    run("generate", "--base", INPUT, "--max-new-tokens", "2")
    heading, row, *_ = run("usage", "--tenant", "default").stdout.splitlines()
    assert heading.split() == [
        *("DAY", "TENANT", "TASK", "SEQUENCES", "PROMPT", "PREFIX", "GENERATED"),
    ]
    [first, *_] = printed(run("usage", "--json", "--tenant", "default"))
    assert row.split()[:3] == [first["day"], "default", "-"]
    rows = list(csv.DictReader(io.StringIO(run("usage", "--csv", "--tenant", "default").stdout)))
    assert rows[0] == {name: str(value or "") for name, value in first.items()} | {
        "prefix_tokens": "0"
    }
    assert printed(run("usage", "--json", "--to", "2020-01-01", "--from", "2020-01-01")) == []
