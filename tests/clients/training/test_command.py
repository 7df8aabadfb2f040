"""`prefixserve train` as people type it, on a real server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from clients import Client
from clients.data import Row
from tests.clients.command_line import Run, printed
from tests.server_process import ServerProcess

FEW_STEPS = ("--max-steps", "4", "--batch-size", "4", "--prefix-length", "3")


@pytest.fixture
def data(rows: Sequence[Row], tmp_path: Path) -> Path:
    file = tmp_path / "train.jsonl"
    lines = [json.dumps({"source": row.source, "references": row.references}) for row in rows]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture
def train(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `prefixserve train colours` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return partial(run, "train", "colours")


def test_trains_uploads_and_shows_an_answer(
    real_server: ServerProcess, tiny_llama_dir: Path, data: Path, tmp_path: Path, train: Run
) -> None:
    flags = (*FEW_STEPS, "--data", data, "--dev", data, "--base-model", tiny_llama_dir)
    done = train(*flags, "--upload", "--dtype", "float32", "--json")
    facts = printed(done)
    assert facts["path"] == "runs/colours/prefix.safetensors"
    assert facts["steps"] == 4
    assert facts["source"] == "colour : red"
    assert "step 4 of 4: loss " in done.stderr
    with Client(real_server.url) as client:
        task = client.task("colours")
        assert task.version == facts["version"]
        assert client.generate("colour : red", task_id="colours").generated_text == facts["answer"]
        client.delete("colours")


def test_starts_at_a_task_of_the_server(
    real_server: ServerProcess, tiny_llama_dir: Path, data: Path, tmp_path: Path, train: Run
) -> None:
    with Client(real_server.url) as client:
        client.upload("start", text="one two three")
        length = client.task("start").prefix_length
        flags = ("--data", data, "--base-model", tiny_llama_dir, "--init", "task:start")
        numbers = ("--prefix-length", str(length), "--max-steps", "1")
        done = train(*flags, *numbers)
        assert done.exit_code == 0, done.stderr
        client.delete("start")


def test_another_base_than_the_servers_is_refused_before_training(
    real_server: ServerProcess, data: Path, tmp_path: Path, train: Run
) -> None:
    done = train("--data", data, "--upload")
    assert done.exit_code == 1
    assert "this would train 'smollm2-135m', which has other weights" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"source": "a"}', "train.jsonl, line 2 has columns source; it needs source and either"),
        ('{"source": "a", "target": " "}', "train.jsonl, line 2 has an empty target"),
        ('{"source": "a", ', "train.jsonl, line 2 is not JSON"),
        ('{"source": "' + "a " * 600 + '", "target": "b"}', "row 2 has 60"),
    ],
)
def test_bad_rows_are_named_before_training(
    line: str, said: str, tiny_llama_dir: Path, tmp_path: Path, train: Run
) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"source": "a", "target": "b"}\n' + line)
    done = train("--data", file, "--base-model", tiny_llama_dir)
    assert done.exit_code == 1
    assert said in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--prefix-length", "600"), "prefix_length is 600"),
        (("--prefix-length", "0"), "--prefix-length 0"),
        (("--template", "no place"), "where the input goes"),
        (("--init", "words"), "expected random, text:SOME TEXT or task:NAME"),
        (("--base-model", "./nothing"), "no folder with a config.json"),
        (("--method", "lora", "--upload"), "--method lora makes none"),
        (("--init", "task:x", "--url", "http://127.0.0.1:9"), "cannot connect to"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    flags: tuple[str, ...], said: str, tiny_llama_dir: Path, data: Path, train: Run
) -> None:
    done = train("--data", data, "--base-model", tiny_llama_dir, *flags)
    assert done.exit_code in {1, 2}
    assert said in " ".join(done.stderr.replace("│", " ").split())


def test_ctrl_c_leaves_what_resume_goes_on_with(
    tiny_llama_dir: Path, data: Path, tmp_path: Path, train: Run
) -> None:
    flags = ("--data", data, "--dev", data, "--base-model", tiny_llama_dir, "--eval-steps", "1")
    steps = ("--max-steps", "60", "--patience", "0")
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "OMP_NUM_THREADS": "1",
    }
    with subprocess.Popen(
        [sys.executable, "-m", "clients", "train", "colours", *map(str, [*flags, *steps])],
        env=environment,
        text=True,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 2 of 60"):
                process.send_signal(signal.SIGINT)
        assert process.wait(60) == 1
    resumed = train(*flags, *steps, "--resume", "--json")
    assert printed(resumed)["steps"] == 60
    assert "step 1 of 60" not in resumed.stderr
