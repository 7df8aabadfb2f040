"""API keys with the real clients, the real command and a real server that asks for them."""

from __future__ import annotations

import re
import shlex
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from clients import AuthenticationError, Client, InvalidArgumentError, UnknownTaskError
from clients import _calls as calls
from clients.cli import app
from prefix_store.data_dir import admin_key_file
from prefix_store.prefix import Prefix
from tests.clients.blocking import blocking_client
from tests.clients.command_line import Run, misused, printed, refused
from tests.server_process import ServerProcess


def test_keys_in_python(real_client: Client, real_server: ServerProcess, kind: str) -> None:
    made = real_client.create_key(["generate"], tenant="acme", label="website", expires_in=3600)
    left = (made.expires_at or made.created_at) - made.created_at
    assert (made.tenant, made.label, made.state) == ("acme", "website", "active")
    assert timedelta(minutes=59) < left <= timedelta(hours=1)
    with blocking_client(kind, real_server.url, api_key=made.key) as theirs:
        assert theirs.generate("Hi", max_new_tokens=1).generated_text is not None
        with pytest.raises(AuthenticationError, match="scope admin") as refusal:
            theirs.tasks()
        assert (refusal.value.status_code, refusal.value.error_type) == (403, "forbidden")
        assert made.key_id in [key.key_id for key in real_client.list_keys()]
        assert real_client.revoke_key(made.key_id).state == "revoked"
        with pytest.raises(AuthenticationError, match="revoked") as ended:
            theirs.generate("Hi", max_new_tokens=1)
        assert (ended.value.status_code, ended.value.error_type) == (401, "authentication")


def test_sharing_in_python(real_client: Client, real_server: ServerProcess, kind: str) -> None:
    key = real_client.create_key(["generate", "admin"], tenant="borrower").key
    with blocking_client(kind, real_server.url, api_key=key) as theirs:
        real_client.upload("lent", text="Lent by its owner.")
        with pytest.raises(UnknownTaskError):
            theirs.generate("Hi", task_id="default/lent")
        assert real_client.share("lent", ["borrower"]).shared_with == ("borrower",)
        answer = theirs.generate("Hi", task_id="default/lent", max_new_tokens=1)
        assert answer.task_id == "default/lent"
        assert theirs.tasks() == []
        assert real_client.share("lent", []).shared_with == ()
        real_client.delete("lent")


def test_keys_on_the_command_line(run: Run, real_server: ServerProcess, prefix: Prefix) -> None:
    scopes = ("--scope", "generate", "--scope", "admin")
    made = run("keys", "create", *scopes, "--tenant", "cli-tenant")
    assert re.fullmatch(r"ps-[0-9a-f]{12}-[A-Za-z0-9_-]{43}\n", made.stdout)
    key, key_id = made.stdout.strip(), made.stdout.split("-")[1]
    short = printed(run("keys", "create", "--scope", "generate", "--expires", "12h", "--json"))
    expires = datetime.fromisoformat(short["expires_at"]) - datetime.now(UTC)
    assert timedelta(hours=11) < expires <= timedelta(hours=12)

    listed = run("keys", "ls").stdout
    assert re.search(rf"^{key_id} +cli-tenant +admin, generate +active ", listed, re.MULTILINE)
    assert key not in listed
    own = {"PREFIXSERVE_API_KEY": key}
    assert {entry["tenant"] for entry in printed(run("keys", "ls", "--json", **own))} == {
        "cli-tenant"
    }
    run("upload", "own", "--text", "Own task.", **own)
    assert printed(run("ls", "--json", **own))[0]["task_id"] == "own"
    assert "own" not in [task["task_id"] for task in printed(run("ls", "--json"))]
    shared = run("tasks", "share", "own", "default", **own)
    assert shared.stdout == "own is shared with default\n"
    assert run("generate", "cli-tenant/own", "Hi", "--max-new-tokens", "1").exit_code == 0
    assert run("tasks", "share", "own", **own).stdout == "own is shared with nobody\n"
    refused(run("generate", "cli-tenant/own", "Hi"), "no task 'cli-tenant/own'")
    assert printed(run("status", "--json", **own))["running"] is None
    assert printed(run("status", "--json"))["running"] == 0

    assert run("keys", "revoke", key_id).stdout == f"Revoked {key_id}\n"
    refused(run("ls", **own), "revoked")
    refused(run("keys", "revoke", "0" * 12), "no API key")
    misused(run("keys", "create"), "--scope")
    misused(run("keys", "create", "--scope", "root"), "root")
    misused(run("keys", "create", "--scope", "generate", "--expires", "soon"), "90d")


def test_where_the_key_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFIXSERVE_DATA_DIR", str(tmp_path))

    def sent(url: str, api_key: str | None = None) -> str | None:
        header: str | None = calls.http_options(url, api_key, 1.0)["headers"].get("Authorization")
        return header

    own = ["http://127.0.0.1:8000", "http://localhost", "http://[::1]:1/", "https://127.9.9.9:1"]
    others = [
        "http://example.com",
        "http://localhost.example.com",
        "http://127.0.0.1.example.com",
        "http://127.0.0.1@example.com",
        "http://10.0.0.1:8000",
    ]
    assert [sent(url) for url in own] == [None] * 4
    admin_key_file(tmp_path).write_text("ps-admin-x\n")
    assert [sent(url) for url in own] == ["Bearer ps-admin-x"] * 4
    assert [sent(url) for url in others] == [None] * 5, "it never leaves this machine"
    monkeypatch.setenv("PREFIXSERVE_API_KEY", "from-environment")
    assert sent(own[0]) == "Bearer from-environment"
    assert sent(others[0], "given") == "Bearer given"
    monkeypatch.delenv("PREFIXSERVE_API_KEY")
    admin_key_file(tmp_path).unlink()
    admin_key_file(tmp_path).mkdir()
    with pytest.raises(InvalidArgumentError, match=r"cannot read .*admin\.key"):
        sent(own[0])


def test_the_printed_request_works_as_printed(real_server: ServerProcess) -> None:
    [line] = re.findall(r"^  (curl .*)$", real_server.log.read_text(), re.MULTILINE)
    done = subprocess.run(
        ["sh", "-c", f"{line} --silent --fail --max-time 60"], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert b'"generated_text"' in done.stdout
    assert real_server.key not in line
    assert shlex.split(line)[0] == "curl"


def test_a_lost_admin_key_is_made_anew(real_server: ServerProcess) -> None:
    """In the store itself, while the server runs on it."""
    old = real_server.key
    command = ["keys", "recover", "--data-dir", str(real_server.data_dir)]
    done = CliRunner().invoke(app, command)
    assert done.stdout == f"A new admin key is in {admin_key_file(real_server.data_dir)}\n"
    assert real_server.key != old
    deadline = time.monotonic() + 30
    for key, expected in ((real_server.key, 200), (old, 401)):
        headers = {"Authorization": f"Bearer {key}"}
        while httpx.get(f"{real_server.url}/admin/keys", headers=headers).status_code != expected:
            assert time.monotonic() < deadline
            time.sleep(0.01)
