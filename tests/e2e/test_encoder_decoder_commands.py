"""An encoder-decoder model in a folder, from the command line: serve, train, eval, generate."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from benchmarks.small_bart.base import save_start
from clients import Client
from clients.cli import app
from prefix_store.groups import GROUPS
from prefix_store.prefix import Prefix
from tests.clients.command_line import Run, printed, refused
from tests.server_process import ServerProcess, running_server

ROWS = [
    {"source": f"name : {name} | food : {food}", "references": [f"{name} serves {food} food."]}
    for name, food in (("Cotto", "Chinese"), ("Zizzi", "Italian"), ("The Mill", "English"))
]
SIZES = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
BEAMS = ("--num-beams", "3", "--max-new-tokens", "8", "--no-repeat-ngram-size", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BART and a tokenizer made for the rows."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bart"
    save_start(
        folder, [*(r["source"] for r in ROWS), *(r["references"][0] for r in ROWS)], 1, **SIZES
    )
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    return file


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    flags = ("--no-demo-tasks", "--dtype", "float32", "--max-beams", "3")
    with running_server(folder, tmp_path_factory.mktemp("server"), *flags) as server:
        yield server


@pytest.fixture
def run(server: ServerProcess) -> Run:
    """Run a command on the server."""

    def run(*arguments: str | Path) -> Result:
        environment = {"PREFIXSERVE_URL": server.url, "PREFIXSERVE_API_KEY": server.key}
        return CliRunner().invoke(app, list(map(str, arguments)), env=environment)

    return run


def test_train_eval_and_generate(
    server: ServerProcess, run: Run, folder: Path, data: Path, tmp_path: Path
) -> None:
    flags = ("--base-model", folder, "--max-steps", "4", "--prefix-length", "3", "--upload")
    files = ("--data", data, "--dev", data, "--output", tmp_path / "run")
    facts = printed(run("train", "places", *files, *flags, "--dtype", "float32", "--json"))
    assert set(Prefix.from_bytes(Path(facts["path"]).read_bytes()).groups) == set(GROUPS)

    found = printed(run("eval", "places", "--data", data, *BEAMS, "--json"))
    assert found["parameters"] == {
        "num_beams": 3,
        "max_new_tokens": 8,
        "no_repeat_ngram_size": 2,
    }
    [result] = found["results"]
    assert result["versions"] == [facts["version"]]
    for row, output in zip(ROWS, result["outputs"], strict=True):
        generated = run("generate", "places", row["source"], *BEAMS)
        assert (generated.exit_code, generated.stdout.strip()) == (0, output)
    with Client(server.url, api_key=server.key) as client:
        sources = [str(row["source"]) for row in ROWS]
        plain = client.generate(sources, max_new_tokens=8)
    assert [one.generated_text.strip() for one in plain] != result["outputs"]


def test_more_beams_than_allowed(run: Run) -> None:
    done = run("generate", "--base", "Cotto", "--num-beams", "4")
    refused(done, "num_beams is 4; expected at most 3, this server's limit, which --max-beams")
