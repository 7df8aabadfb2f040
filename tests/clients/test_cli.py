"""Every command, against a real server."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clients import Client
from clients.cli import app
from prefix_store.prefix import Prefix, version_of
from tests.clients import faulty_server as faulty
from tests.clients.command_line import Run, misused, printed, refused
from tests.server_process import ServerProcess

INPUT = "The capital of France is"
COLOUR = "\x1b["


@pytest.fixture
def task(real_server: ServerProcess, prefix: Prefix) -> Iterator[str]:
    """A task for one test, which may remove it."""
    with Client(real_server.url) as client:
        client.upload("cli-task", prefix)
        yield "cli-task"
        if "cli-task" in [task.task_id for task in client.tasks()]:
            client.delete("cli-task")


def test_upload_list_and_remove(run: Run, tmp_path: Path, prefix: Prefix) -> None:
    path = tmp_path / "prefix.safetensors"
    path.write_bytes(prefix.to_bytes())
    uploaded = run("upload", "cli-life", path)
    assert uploaded.exit_code == 0
    heading, row = uploaded.stdout.splitlines()
    assert heading.split() == ["TASK", "METHOD", "LENGTH", "SIZE", "VERSION"]
    assert re.fullmatch(r"cli-life +prefix-tuning +4 +\S+ \S+ +sha256:[0-9a-f]{12} *", row)
    assert row.split() in [line.split() for line in run("ls").stdout.splitlines()]
    first = run("ls", "--limit", "1", "--after", "cli-lif")
    assert first.stdout.splitlines()[1].split() == row.split()
    removed = run("rm", "cli-life", "--yes")
    assert (removed.exit_code, removed.stdout) == (0, "Removed cli-life\n")
    assert "cli-life" not in run("ls").stdout


def test_upload_list_and_remove_as_json(run: Run, adapter: Path) -> None:
    uploaded = printed(run("upload", "cli-json", adapter, "--json"))
    assert (uploaded["task_id"], uploaded["prefix_length"]) == ("cli-json", 3)
    assert uploaded in printed(run("ls", "--json"))
    assert printed(run("rm", "-y", "cli-json", "--json")) == {"removed": ["cli-json"]}


@pytest.mark.parametrize(("argument", "stdin"), [(INPUT, None), ("-", f"{INPUT}\n")])
def test_upload_of_a_text(run: Run, argument: str, stdin: str | None) -> None:
    task = printed(run("upload", "cli-text", "--text", argument, "--json", stdin=stdin))
    assert (task["method"], task["prefix_length"]) == ("text", 5)


def test_a_terminal_sees_progress_and_colour(run: Run, tmp_path: Path, prefix: Prefix) -> None:
    path = tmp_path / "prefix.safetensors"
    path.write_bytes(prefix.to_bytes())
    result = run("upload", "cli-bar", path, FORCE_COLOR="1")
    assert "Uploading cli-bar" in result.stderr
    assert COLOUR in result.stdout
    assert COLOUR in run("rm", "-y", "cli-none", FORCE_COLOR="1").stderr


def test_rm_asks(run: Run, task: str) -> None:
    refused_by_user = run("rm", task, stdin="n\n")
    assert refused_by_user.exit_code == 1
    assert f"Remove {task}?" in refused_by_user.stderr
    assert run("rm", task).exit_code == 1  # nobody answers
    assert task in run("ls").stdout
    assert f"Removed {task}" in run("rm", task, stdin="y\n").stdout
    assert task not in run("ls").stdout


def test_rm_removes_what_it_can(run: Run, task: str) -> None:
    result = run("rm", "-y", "cli-none", task, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {"removed": [task]}
    assert "cli-none" in result.stderr


def test_versions_of_a_task(run: Run, task: str, adapter: Path, prefix: Prefix) -> None:
    old = version_of(prefix.to_bytes())
    new = printed(run("upload", task, adapter, "--no-activate", "--json"))["version"]
    listed = printed(run("tasks", "versions", task, "--json"))
    assert [(found["version"], found["active"]) for found in listed] == [(new, False), (old, True)]
    heading, first, second = run("tasks", "versions", task).stdout.splitlines()
    assert heading.split() == ["VERSION", "ACTIVE", "SHARE", "METHOD", "LENGTH", "SIZE", "UPLOADED"]
    assert first.split()[:3] == [new[:19], "0", "%"]
    assert second.split()[:4] == [old[:19], "*", "100", "%"]

    assert printed(run("tasks", "activate", task, new[:15], "--json"))["version"] == new
    assert printed(run("tasks", "rollback", task, "--json"))["version"] == old
    shares = (f"{old[7:15]}=90", f"{new}=10")
    assert printed(run("tasks", "split", task, *shares, "--json"))["split"] == {old: 90, new: 10}
    assert "10 %" in run("tasks", "split", task, *shares).stdout
    assert printed(run("tasks", "split", task, "--json"))["split"] == {}
    assert old[:19] in run("tasks", "rm", task, new).stdout
    assert len(printed(run("tasks", "versions", task, "--json"))) == 1

    refused(run("tasks", "rollback", task), "no version that was active before")
    refused(run("tasks", "rm", task, old), "is the active one")
    refused(run("tasks", "activate", task, "sha256:zz"), "keeps no version whose name begins")
    refused(run("tasks", "split", task, f"{old}=99"), "add to 99 percent")
    refused(run("tasks", "split", task, f"{old}=90", f"{old[7:]}=10"), "one version")
    refused(run("tasks", "versions", "cli-none"), "cli-none")
    misused(run("tasks", "split", task, old), "VERSION=PERCENT")


def test_generate(run: Run, task: str, real_server: ServerProcess) -> None:
    with Client(real_server.url) as client:
        with_task = client.generate(INPUT, task_id=task, max_new_tokens=6)
        bare = client.generate(INPUT, max_new_tokens=6)
    length = ("--max-new-tokens", "6")
    assert run("generate", task, INPUT, *length).stdout == f"{with_task.generated_text}\n"
    assert run("generate", "--base", INPUT, *length).stdout == f"{bare.generated_text}\n"
    assert run("generate", task, "-", *length, stdin=f"{INPUT}\n").stdout == (
        f"{with_task.generated_text}\n"
    )
    assert printed(run("generate", task, INPUT, *length, "--json")) == with_task.model_dump(
        mode="json"
    )


def test_generate_as_a_stream(run: Run, task: str) -> None:
    arguments = ("generate", task, INPUT, "--max-new-tokens", "6")
    whole = printed(run(*arguments, "--json"))
    assert run(*arguments, "--stream").stdout == f"{whole['generated_text']}\n"
    lines = run(*arguments, "--stream", "--json").stdout.splitlines()
    tokens = [json.loads(line) for line in lines]
    assert [token["token"] for token in tokens] == whole["details"]["tokens"]
    assert tokens[-1]["generated_text"] == whole["generated_text"]


def test_every_flag_of_generate_reaches_the_server(real_server: ServerProcess) -> None:
    flags = {
        "--max-new-tokens": 5,
        "--temperature": 0.5,
        "--top-k": 3,
        "--top-p": 0.9,
        "--min-p": 0.1,
        "--typical-p": 0.8,
        "--repetition-penalty": 1.2,
        "--frequency-penalty": 0.3,
        "--seed": 4,
    }
    words = [str(word) for pair in flags.items() for word in pair]
    with faulty.faulty_server() as server:
        server.script(faulty.refuse(422), faulty.refuse(422))
        for extra in (["--sample", "--stop", "a", "--stop", "b"], ["--greedy", "--ignore-eos"]):
            arguments = ["generate", "t", INPUT, "--url", server.url, *words, *extra]
            CliRunner().invoke(app, arguments)
        sampled, greedy = (json.loads(body)["parameters"] for _, _, _, body in server.requests)
    expected = {flag[2:].replace("-", "_"): value for flag, value in flags.items()}
    assert sampled == {"details": True, **expected, "do_sample": True, "stop": ["a", "b"]}
    assert greedy == {"details": True, **expected, "do_sample": False, "ignore_eos": True}


def test_status(run: Run, real_server: ServerProcess, task: str) -> None:
    shown = dict(line.split(maxsplit=1) for line in run("status").stdout.splitlines())
    status = printed(run("status", "--json"))
    assert shown["health"].strip() == "ready"
    assert (status["ready"], status["reason"]) == (True, "")
    assert status["url"] == real_server.url
    assert status["url"] in shown["server"]
    assert status["model"] in shown["model"]
    assert (status["running"], status["waiting"]) == (0, 0)
    assert status["tasks"] == len(printed(run("ls", "--json"))) == int(shown["tasks"])


INFO = {
    "model_id": "m",
    "model_sha": "0",
    "model_dtype": "float32",
    "model_device_type": "cpu",
    "num_layers": 1,
    "num_kv_heads": 1,
    "head_dim": 1,
    "max_total_tokens": 1,
    "version": "0",
}
GAUGES = faulty.text("prefixserve_running_requests 3\nprefixserve_waiting_requests 4\n")


def test_status_of_a_server_in_trouble() -> None:
    with faulty.faulty_server() as server:
        not_ready, no_store = faulty.refuse(503, "draining"), faulty.refuse(503, "no store")
        server.script(not_ready, faulty.answer(200, INFO), GAUGES, no_store)
        result = CliRunner().invoke(app, ["status", "--url", server.url])
    assert result.exit_code == 1
    shown = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    values = [shown[name].strip() for name in ("health", "running", "waiting", "tasks")]
    assert values == ["not ready: draining", "3", "4", "not known"]


def test_what_the_server_refuses_is_one_sentence(run: Run, tmp_path: Path) -> None:
    refused(run("generate", "cli-none", INPUT), "cli-none")
    refused(run("generate", "cli-none", INPUT, "--stream"), "cli-none")
    refused(run("generate", "--base", INPUT, "--max-new-tokens", "9999"), "9999")
    refused(run("rm", "-y", "cli-none"), "cli-none")
    refused(run("upload", "cli-none", tmp_path / "missing"), "cannot read")
    refused(run("upload", "cli-none", Path(__file__)), "safetensors")
    refused(run("ls", "--url", "localhost:8000"), "localhost:8000")
    refused(run("generate", "--base", INPUT, "--temperature", "nan"), "JSON")


def test_misuse_is_exit_code_2(run: Run, tmp_path: Path) -> None:
    misused(run("generate", INPUT), "give TASK and TEXT")
    misused(run("generate", "--base", "e2e", INPUT), "--base")
    misused(run("upload", "e2e"), "--text")
    misused(run("upload", "e2e", tmp_path, "--text", INPUT), "--text")
    misused(run("rm"), "TASK")
    misused(run("unknown"), "unknown")
    misused(run("generate", "--base", "-", stdin=b"\xff"), "UTF-8")


@pytest.fixture
def stub_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package whose `serve` prints its arguments."""
    info = tmp_path / "stub-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stub\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[prefixserve.commands]\nserve = stub_serve:main\n")
    (tmp_path / "stub_serve.py").write_text("def main(argv): print(argv)\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("stub_command")
def test_serve_gets_its_arguments_untouched() -> None:
    arguments = ["--port", "3", "--no-demo-tasks", "--help", "x", "--json", "-v"]
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert (result.exit_code, result.stdout) == (0, f"{arguments}\n")


def test_serve_without_a_server_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    refused(CliRunner().invoke(app, ["serve"]), "pip install prefixserve")


def test_as_a_process(real_server: ServerProcess) -> None:
    command = [sys.executable, "-m", "clients", "ls", "--url"]
    listed = subprocess.run([*command, real_server.url], capture_output=True, check=False)
    assert (listed.returncode, listed.stderr) == (0, b"")
    assert listed.stdout.startswith(b"TASK ")
    nowhere = subprocess.run([*command, "localhost"], capture_output=True, check=False)
    assert (nowhere.returncode, nowhere.stdout) == (1, b"")
    assert nowhere.stderr.startswith(b"Error: 'localhost' is not an address")


@pytest.mark.usefixtures("heard_ctrl_c")
def test_ctrl_c() -> None:
    event = {"index": 1, "token": {"id": 1, "text": "a", "logprob": -1.0, "special": False}}
    with faulty.faulty_server() as server:
        server.script(faulty.events(event, then=server.stall))
        command = [sys.executable, "-m", "clients", "generate", "t", INPUT, "--stream", "--url"]
        with subprocess.Popen(
            [*command, server.url], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.read(1) == b"a"
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
            assert process.stderr.read() == b""
