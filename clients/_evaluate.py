"""`prefixserve eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from clients import _options as options
from clients._calls import DEFAULT_URL
from clients._console import print_error, print_json, print_table, progress_bar
from clients._errors import InvalidArgumentError
from clients.data import read_rows, sha256_of

if TYPE_CHECKING:
    from clients.evaluation import TaskResult

_MOST_REFUSALS_TOLD = 10

_Task = Annotated[str, typer.Argument(help="Name of the task.")]
_Data = Annotated[Path, Option(help="JSON lines or CSV with source and target or references.")]
_Against = Annotated[str | None, Option(help="Another task to compare with.", metavar="TASK2")]
_Html = Annotated[Path | None, Option(help="Write a report with examples to this file.")]
_Detokenise = Annotated[
    bool, Option("--detokenise", help="Join split words, `it 's , `, in references and outputs.")
]
_Metric = Annotated[
    list[str] | None, Option(help="Compute only this one; may be given several times.")
]
_Concurrency = Annotated[int, Option(min=1, help="Requests under way at once.")]
_MaxNewTokens = Annotated[int, Option(help="Most tokens to generate for a row.")]


def evaluate(  # noqa: PLR0917 - the command line gives them by name
    task: _Task,
    data: _Data,
    against: _Against = None,
    html: _Html = None,
    detokenise: _Detokenise = False,
    metric: _Metric = None,
    concurrency: _Concurrency = 32,
    max_new_tokens: _MaxNewTokens = 128,
    do_sample: options.DoSample = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    num_beams: options.NumBeams = None,
    length_penalty: options.LengthPenalty = None,
    no_repeat_ngram_size: options.NoRepeatNgramSize = None,
    min_new_tokens: options.MinNewTokens = None,
    url: options.Url = DEFAULT_URL,
    as_json: options.Json = False,
) -> None:
    """Score a task on rows of data; exit code 1 if the server refused some of them."""
    # Here, since the libraries are optional and slow to import.
    from clients import evaluation as ev  # noqa: PLC0415
    from clients.evaluation.table import score_table, to_fields  # noqa: PLC0415

    rows = read_rows(data)
    if html is not None:
        _check_writable(html)
    with (
        progress_bar("Generating", of_bytes=False) as on_generated,
        progress_bar("Scoring", of_bytes=False) as on_scored,
    ):
        evaluation = ev.evaluate(
            task,
            rows,
            against=against,
            base_url=url,
            parameters=options.parameters(
                max_new_tokens=max_new_tokens,
                do_sample=do_sample,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                repetition_penalty=repetition_penalty,
                seed=seed,
                stop=stop or None,
                num_beams=num_beams,
                length_penalty=length_penalty,
                no_repeat_ngram_size=no_repeat_ngram_size,
                min_new_tokens=min_new_tokens,
            ),
            detokenised=detokenise,
            metrics=metric or (),
            concurrency=concurrency,
            on_generated=on_generated,
            on_scored=on_scored,
        )
    if html is not None:
        ev.write_report(html, evaluation, data)
    if as_json:
        print_json({"data": str(data), "sha256": sha256_of(data), **to_fields(evaluation)})
    else:
        print_table(score_table(evaluation))
    for result in evaluation.results:
        _tell(result, max_new_tokens)
    if any(result.refused for result in evaluation.results):
        raise typer.Exit(1)


def _check_writable(path: Path) -> None:
    """A report that cannot be written is told before minutes are spent on it."""
    if path.is_dir() or not path.parent.is_dir():
        raise InvalidArgumentError(f"a report cannot be written to {path}: name a file in a folder")


def _tell(result: TaskResult, max_new_tokens: int) -> None:
    """On stderr, what a reader of the scores has to know."""
    name, rows = result.task_id, len(result.outputs)
    if len(result.versions) > 1:
        typer.echo(f"{name}: {len(result.versions)} versions of it answered", err=True)
    if result.cut:
        typer.echo(
            f"{name}: {result.cut} of {rows} texts ended at {max_new_tokens} tokens; "
            "--max-new-tokens lets them go on",
            err=True,
        )
    for number, reason in list(result.refused.items())[:_MOST_REFUSALS_TOLD]:
        print_error(f"{name}: row {number} was refused and scores as an empty text: {reason}")
    if len(result.refused) > _MOST_REFUSALS_TOLD:
        print_error(f"{name}: {len(result.refused)} of {rows} rows were refused in all")
