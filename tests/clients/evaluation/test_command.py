"""`prefixserve eval` and what it is made of, on a real server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from clients import AsyncClient, Client, Parameters
from clients.cli import app
from clients.data import Row, read_rows
from clients.evaluation import evaluate, generate_outputs, metric_names
from prefix_store.prefix import Prefix
from tests.clients import faulty_server as faulty
from tests.clients.command_line import Run, misused, printed, refused
from tests.server_process import ServerProcess, free_port

SOURCES = ["The capital of France", "A cat", "Once upon a time", "Two and two", "Rain", "The end"]
TOO_LONG = "word " * 600  # for the tiny model's 512 positions
LENGTH = 12


@pytest.fixture(scope="module")
def tasks(real_server: ServerProcess, prefix: Prefix) -> Iterator[tuple[str, str]]:
    """Two tasks that write different texts."""
    names = ("eval-one", "eval-two")
    with Client(real_server.url, api_key=real_server.key) as client:
        client.upload(names[0], prefix)
        client.upload(names[1], text="Something else.")
        yield names
        for name in names:
            client.delete(name)


@pytest.fixture(scope="module")
def data(
    real_server: ServerProcess, tasks: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Rows that the first task is perfect at, with one reference, two, three and so on."""
    with Client(real_server.url, api_key=real_server.key) as client:
        answers = client.generate(SOURCES, task_id=tasks[0], max_new_tokens=LENGTH)
    path = tmp_path_factory.mktemp("eval") / "dev.jsonl"
    with path.open("w") as file:
        for number, (source, answer) in enumerate(zip(SOURCES, answers, strict=True)):
            references = [*["unlike it"] * number, answer.generated_text]
            file.write(json.dumps({"source": source, "references": references}) + "\n")
    return path


def by_name(values: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {value["name"]: value for value in values}


def run_eval(run: Run, tasks: tuple[str, str], data: Path, *options: str | Path) -> Any:
    return printed(
        run("eval", tasks[0], "--data", data, "--max-new-tokens", str(LENGTH), "--json", *options)
    )


def test_a_perfect_task_against_another(
    run: Run, tasks: tuple[str, str], data: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.html"
    found = run_eval(run, tasks, data, "--against", tasks[1], "--html", report)
    assert (found["rows"], found["parameters"]) == (6, {"max_new_tokens": LENGTH})
    perfect, other = found["results"]
    assert [result["task_id"] for result in found["results"]] == list(tasks)
    assert list(by_name(perfect["scores"])) == list(metric_names())
    differences = by_name(found["differences"])
    for name, best in (("BLEU", 100), ("chrF", 100), ("TER", 0)):
        score = by_name(perfect["scores"])[name]
        assert (score["value"], score["low"], score["high"]) == pytest.approx((best,) * 3)
        theirs = by_name(other["scores"])[name]["value"]
        assert (theirs < best) == score["higher_is_better"]
        assert differences[name]["value"] == pytest.approx(best - theirs)
        assert differences[name]["p_value"] < 0.05
    assert perfect["outputs"] == [row.references[-1].strip() for row in read_rows(data)]
    assert all(len(result["versions"]) == 1 for result in found["results"])
    html = report.read_text()
    assert all(name in html for name in (*tasks, "dev.jsonl", found["sha256"]))


def test_the_table(run: Run, tasks: tuple[str, str], data: Path) -> None:
    length = ("--max-new-tokens", str(LENGTH))
    alone = run("eval", tasks[0], "--data", data, *length, "--metric", "bleu", "--metric", "TER")
    assert alone.exit_code == 0
    heading, bleu, ter = alone.stdout.splitlines()
    assert heading.split() == ["METRIC", tasks[0], "95", "%"]
    assert bleu.split() == ["BLEU", "↑", "100.00", "100.00", "to", "100.00"]
    assert ter.split() == ["TER", "↓", "0.00", "0.00", "to", "0.00"]
    assert "6 of 6 texts ended at 12 tokens" in alone.stderr
    against = run(
        "eval", tasks[0], "--data", data, *length, "--metric", "BLEU", "--against", tasks[1]
    )
    assert against.stdout.splitlines()[0].split()[-4:] == ["DIFFERENCE", "95", "%", "P"]


def test_a_terminal_sees_progress(run: Run, tasks: tuple[str, str], data: Path) -> None:
    shown = run("eval", tasks[0], "--data", data, "--max-new-tokens", "2", FORCE_COLOR="1").stderr
    assert "Generating" in shown
    assert "Scoring" in shown


def test_sampled_texts_are_repeatable_whatever_the_concurrency(
    run: Run, tasks: tuple[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "same.csv"
    path.write_text("source,target\n" + "The sea,is blue\n" * 8)
    options = ("--metric", "BLEU", "--temperature", "2", "--top-p", "0.95", "--seed", "5")
    one, eight, other = (
        run_eval(run, tasks, path, *options, *more)["results"][0]["outputs"]
        for more in (["--concurrency", "1"], ["--concurrency", "8"], ["--seed", "6"])
    )
    assert one == eight
    assert one[1:] == other[:-1]  # each row's seed is one more than that of the row before
    assert len(set(one)) > 1
    greedy = run_eval(run, tasks, path, "--metric", "BLEU")["results"][0]["outputs"]
    assert len(set(greedy)) == 1


def test_stop_strings_are_not_part_of_the_text(
    run: Run, tasks: tuple[str, str], data: Path
) -> None:
    whole = run_eval(run, tasks, data, "--metric", "BLEU")["results"][0]["outputs"]
    stop = whole[0].split()[1]
    cut = run_eval(run, tasks, data, "--metric", "BLEU", "--stop", stop)["results"][0]["outputs"]
    assert cut[0] == whole[0][: whole[0].index(stop)].strip()


def test_a_row_that_is_refused_scores_as_an_empty_text(
    run: Run, tasks: tuple[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "long.csv"
    path.write_text(f"source,target\nThe sea,is blue\n{TOO_LONG},is long\n")
    options = ("--data", path, "--max-new-tokens", "4", "--metric", "TER")
    result = run("eval", tasks[0], *options, "--json")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 2
    assert f"Error: {tasks[0]}: row 2 was refused and scores as an empty text: " in result.stderr
    (found,) = json.loads(result.stdout)["results"]
    assert list(found["refused"]) == ["2"]
    assert "over this server's limit of 512" in found["refused"]["2"]
    assert found["outputs"][1] == ""


def test_all_rows_refused(run: Run, tasks: tuple[str, str], data: Path) -> None:
    refused(
        run("eval", tasks[0], "--data", data, "--temperature", "-1"),
        f"refused every row for task '{tasks[0]}'; the first: .*temperature",
    )


def test_what_cannot_be_evaluated_is_one_sentence(
    run: Run, tasks: tuple[str, str], data: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{}")
    nowhere = f"http://127.0.0.1:{free_port()}"
    refused(run("eval", "eval-none", "--data", data), "no task 'eval-none'")
    refused(run("eval", tasks[0], "--data", data, "--against", "eval-none"), "no task 'eval-none'")
    refused(run("eval", tasks[0], "--data", data, "--base-url", nowhere), "cannot connect")
    refused(run("eval", tasks[0], "--data", broken), "line 1 has no columns")
    refused(run("eval", tasks[0], "--data", tmp_path / "none"), "there is no file")
    refused(run("eval", tasks[0], "--data", data, "--metric", "BLUE"), "no metric 'BLUE'")
    refused(run("eval", tasks[0], "--data", data, "--against", tasks[0]), "with itself")
    refused(run("eval", tasks[0], "--data", data, "--html", tmp_path), "name a file in a folder")
    misused(run("eval", tasks[0]), "--data")
    misused(run("eval", tasks[0], "--data", data, "--concurrency", "0"), "--concurrency")


def test_a_server_that_fails_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("source,target\na,b\nc,d\ne,f\n")
    info = dict.fromkeys(("model_id", "model_sha", "model_dtype", "model_device_type"), "m")
    sizes = dict.fromkeys(("num_layers", "num_kv_heads", "head_dim", "max_total_tokens"), 1)
    with faulty.faulty_server() as server:
        server.script(
            faulty.answer(200, {**info, **sizes, "version": "0"}), faulty.refuse(500, "out of luck")
        )
        arguments = ["eval", "t", "--data", str(path), "--url", server.url, "--concurrency", "1"]
        refused(CliRunner().invoke(app, arguments), "out of luck")
        assert len(server.requests) == 2


def test_without_the_libraries(data: Path) -> None:
    command = "import sys; sys.modules['rouge_score'] = None; from clients.cli import main; main()"
    found = subprocess.run(
        [sys.executable, "-c", command, "eval", "e2e", "--data", data],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr == (
        "Error: evaluation needs the package rouge_score, which is not installed: "
        "pip install 'prefixserve[eval]'\n"
    )


def test_in_python(real_server: ServerProcess, tasks: tuple[str, str], data: Path) -> None:
    done = []
    found = evaluate(
        tasks[0],
        read_rows(data),
        base_url=real_server.url,
        parameters={"max_new_tokens": LENGTH},
        metrics=["BLEU"],
        on_generated=lambda *counts: done.append(counts),
    )
    assert found.results[0].scores[0].value == pytest.approx(100)
    assert done == [(number, 6) for number in range(1, 7)]
    assert found.differences == ()


def test_detokenising_is_for_both_sides(real_server: ServerProcess, tasks: tuple[str, str]) -> None:
    rows = [Row("The sea", ("It 's £ 20 , kid - friendly .",))]
    plain, joined = (
        evaluate(
            tasks[0],
            rows,
            base_url=real_server.url,
            parameters={"max_new_tokens": 2},
            metrics=["BLEU"],
            detokenised=detokenised,
        )
        for detokenised in (False, True)
    )
    assert plain.rows[0].references == rows[0].references
    assert joined.rows[0].references == ("It's £20, kid-friendly.",)


async def test_tasks_of_a_row_are_asked_together(
    real_server: ServerProcess, tasks: tuple[str, str]
) -> None:
    parameters: Parameters = {"max_new_tokens": 3}
    async with AsyncClient(real_server.url) as client:
        both = await generate_outputs(client, tasks, SOURCES, parameters)
        alone = await generate_outputs(client, tasks[1:], SOURCES, parameters, concurrency=1)
    assert both[1] == alone[0]
    assert [len(outputs) for outputs in both] == [len(SOURCES)] * 2
