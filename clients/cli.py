"""The `prefixserve` command."""

from __future__ import annotations

import sys
from importlib import import_module, metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from clients import _options as options
from clients._batch import app as batch_app
from clients._calls import DEFAULT_URL, MOST_LISTED
from clients._client import Client
from clients._console import (
    print_error,
    print_fields,
    print_json,
    print_stream,
    print_tasks,
    progress_bar,
)
from clients._errors import PrefixServeError
from clients._keys import app as keys_app
from clients._limits import tenants_app, usage
from clients._status import read_status
from clients._tasks import app as tasks_app
from prefix_store.errors import PrefixStoreError

COMMANDS = "prefixserve.commands"
"""Entry-point group of commands that other packages bring: functions of the argument list."""

LATER = {
    "plan": (
        "clients.planning.command:plan",
        "Compute what a model and a workload need: memory, hit rates, replicas, the store.",
    ),
    "export": (
        "clients._store:export",
        "Write every task, its versions and the hashes of the API keys to a folder.",
    ),
    "import": (
        "clients._store:import_",
        "Put the tasks of an exported folder into the store; mends tasks whose bytes are damaged.",
    ),
    "doctor": (
        "clients._store:doctor",
        "Check every task in the store, against the base model too; exit code 1 if any is wrong.",
    ),
    "train": (
        "clients.training.command:train_command",
        "Train the prefix of TASK on the base model, which stays as it is.",
    ),
    "eval": (
        "clients._evaluate:evaluate",
        "Score a task on rows of data; exit code 1 if the server refused some of them.",
    ),
}
"""Commands whose modules take seconds to import: where each is, and what it does."""


class _Commands(TyperGroup):
    """Imports a command when it is called, and ends one that was refused with a sentence."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, load(name) if name in LATER else command, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (PrefixServeError, PrefixStoreError) as error:
            print_error(str(error))
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    help="Serve many tasks from one frozen language model: a task is a prefix.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


app.add_typer(tasks_app, name="tasks")
app.add_typer(tenants_app, name="tenants")
app.command()(usage)
app.add_typer(keys_app, name="keys")
app.add_typer(batch_app, name="batch")


def _imported_when_called() -> None:
    raise AssertionError("`load` gives the command itself")


for _name, (_, _summary) in LATER.items():
    app.command(_name, help=_summary)(_imported_when_called)


def load(name: str) -> Any:
    """The command of `LATER`, imported."""
    module, function = LATER[name][0].split(":")
    alone = typer.Typer()
    alone.command(name)(getattr(import_module(module), function))
    return typer.main.get_command(alone)


def main() -> None:
    """Run the command line."""
    app()


@app.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def serve(context: typer.Context) -> None:
    """Run the server; `prefixserve serve --help` lists its settings."""
    found = metadata.entry_points(group=COMMANDS, name="serve")
    if not found:
        print_error("the server is not installed here: pip install prefixserve")
        raise typer.Exit(1)
    raise typer.Exit(next(iter(found)).load()(context.args) or 0)


@app.command()
def upload(  # noqa: PLR0917 - the command line gives them by name
    task: Annotated[str, typer.Argument(help="Name of the task.")],
    path: Annotated[
        Path | None, typer.Argument(help="A .safetensors file, or a folder with a PEFT adapter.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="A prompt to make the prefix of, instead of PATH; - reads it from stdin."
        ),
    ] = None,
    activate: Annotated[
        bool,
        typer.Option(
            "--activate/--no-activate", help="Use it at once, or keep it as a version for later."
        ),
    ] = True,
    url: options.Url = DEFAULT_URL,
    as_json: options.Json = False,
) -> None:
    """Give a task its prefix; a task that exists gets the new one."""
    if (path is None) == (text is None):
        raise typer.BadParameter("give either a PATH or --text")
    if text is not None:
        text = _text(text)
    with Client(url) as client, progress_bar(f"Uploading {task}", of_bytes=True) as progress:
        stored = client.upload(task, path, text=text, activate=activate, progress=progress)
    print_json(stored) if as_json else print_tasks([stored])


@app.command()
def ls(
    limit: Annotated[int, typer.Option(min=1, help="How many.")] = MOST_LISTED,
    after: Annotated[str | None, typer.Option(help="Only names that come after this one.")] = None,
    url: options.Url = DEFAULT_URL,
    as_json: options.Json = False,
) -> None:
    """List the tasks by name, the first 1000 unless --limit says otherwise."""
    with Client(url) as client:
        tasks = client.tasks(limit=limit + 1, after=after)  # one more tells whether there is more
    shown = tasks[:limit]
    print_json(shown) if as_json else print_tasks(shown)
    if len(tasks) > limit:
        typer.echo(f"There are more: --after {shown[-1].task_id}", err=True)


@app.command()
def rm(
    tasks: Annotated[list[str], typer.Argument(help="Names of the tasks.", metavar="TASK...")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: options.Url = DEFAULT_URL,
    as_json: options.Json = False,
) -> None:
    """Remove tasks and their prefixes."""
    if not yes:
        typer.confirm(f"Remove {', '.join(tasks)}?", abort=True, err=True)
    removed = []
    with Client(url) as client:
        for task in tasks:
            try:
                client.delete(task)
            except PrefixServeError as error:
                print_error(str(error))
            else:
                removed.append(task)
    if as_json:
        print_json({"removed": removed})
    elif removed:
        typer.echo(f"Removed {', '.join(removed)}")
    if len(removed) < len(tasks):
        raise typer.Exit(1)


@app.command()
def generate(  # noqa: PLR0917 - the command line gives them by name
    task: Annotated[str, typer.Argument(help="Name of the task; not with --base.")],
    text: Annotated[str | None, typer.Argument(help="The input; - reads it from stdin.")] = None,
    base: options.Base = False,
    stream: options.Stream = False,
    max_new_tokens: options.MaxNewTokens = None,
    do_sample: options.DoSample = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    typical_p: options.TypicalP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    num_beams: options.NumBeams = None,
    length_penalty: options.LengthPenalty = None,
    no_repeat_ngram_size: options.NoRepeatNgramSize = None,
    min_new_tokens: options.MinNewTokens = None,
    ignore_eos: options.IgnoreEos = None,
    url: options.Url = DEFAULT_URL,
    as_json: options.Json = False,
) -> None:
    """Generate text: `generate TASK TEXT` for a task, `generate --base TEXT` without one."""
    task_id, inputs = _task_and_text(task, text, base)
    parameters = options.parameters(
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        repetition_penalty=repetition_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=stop or None,
        num_beams=num_beams,
        length_penalty=length_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        min_new_tokens=min_new_tokens,
        ignore_eos=ignore_eos,
    )
    with Client(url) as client:
        if stream:
            print_stream(client.stream(inputs, task_id=task_id, **parameters), as_json)
            return
        generation = client.generate(inputs, task_id=task_id, **parameters)
    print_json(generation) if as_json else typer.echo(generation.generated_text)


@app.command()
def status(url: options.Url = DEFAULT_URL, as_json: options.Json = False) -> None:
    """Show whether the server is ready and what it does; exit code 1 when it is not ready."""
    with Client(url, max_retries=0) as client:
        found = read_status(client, url)
    print_json(found) if as_json else print_fields(found.lines())
    if not found.ready:
        raise typer.Exit(1)


def _task_and_text(first: str, second: str | None, base: bool) -> tuple[str | None, str]:
    if base and second is not None:
        raise typer.BadParameter("give the text alone with --base, or leave --base out")
    if base:
        return None, _text(first)
    if second is None:
        raise typer.BadParameter("give TASK and TEXT, or --base and TEXT")
    return first, _text(second)


def _text(argument: str) -> str:
    """The argument, or for `-` what stdin holds, without the line end that echo adds."""
    if argument != "-":
        return argument
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise typer.BadParameter("stdin is not UTF-8 text") from error
