"""`prefixserve train`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from pydantic import ValidationError
from rich.console import Console
from transformers.utils.logging import disable_progress_bar
from typer import Option

from clients import _options as options
from clients._calls import DEFAULT_URL
from clients._client import Client
from clients._console import print_fields, print_json
from clients._errors import TrainingError
from clients.data import Row, detokenise, read_rows
from clients.training.run import Trained, train
from clients.training.settings import PREFIX_METHODS, TASK, Method, TrainSettings
from prefix_store.base_model import BaseModelSpec
from prefix_store.data_dir import DEFAULT_DATA_DIR
from prefix_store.model_loading import (
    DEFAULT_MODEL,
    LoadedModel,
    default_device,
    load_base_model,
)
from prefix_store.prefix import Prefix

_DEFAULTS = TrainSettings()

Data = Annotated[Path, Option(help="Training rows: .jsonl or .csv with source and target.")]
Dev = Annotated[Path | None, Option(help="Held-out rows, for early stopping.")]
BaseModel = Annotated[
    str, Option(envvar="PREFIXSERVE_BASE_MODEL", help="Hub id, folder, .gguf file or alias.")
]
Output = Annotated[Path | None, Option(help="Folder of the run.", show_default="runs/TASK")]
Init = Annotated[
    str,
    Option(
        help='Where to start: random, text:"SOME TEXT" or task:NAME.',
        show_default="the first training rows as text",
    ),
]


def train_command(  # noqa: PLR0917 - the command line gives them by name
    task: Annotated[str, typer.Argument(help="Name of the task.")],
    data: Data,
    dev: Dev = None,
    base_model: BaseModel = DEFAULT_MODEL,
    method: Annotated[
        Method, Option(help="How to train; all but prefix and direct are for comparison.")
    ] = _DEFAULTS.method,
    prefix_length: Annotated[int, Option(help="Vectors.")] = _DEFAULTS.prefix_length,
    init: Init = _DEFAULTS.init,
    where: Annotated[
        str | None,
        Option(
            help="With an encoder, what gets a prefix: encoder, decoder, cross, by commas.",
            show_default="all",
        ),
    ] = None,
    freeze_first: Annotated[
        bool, Option("--freeze-first", help="Keep the first vector of `direct` as it starts.")
    ] = False,
    template: Annotated[
        str, Option(help="Text around {source}; the target follows it.", show_default="{source}\\n")
    ] = _DEFAULTS.template,
    references: Annotated[
        int | None,
        Option(
            help="Train on so many references a row, those most like its others.",
            show_default="all",
        ),
    ] = None,
    join: Annotated[
        bool, Option("--detokenise", help="Join what a tokenizer split, such as `it 's £ 20 .`")
    ] = False,
    learning_rate: Annotated[
        float | None, Option(help="At its highest.", show_default="the method's own")
    ] = None,
    schedule: Annotated[str, Option(help="linear, cosine or constant.")] = _DEFAULTS.schedule,
    warmup: Annotated[float, Option(help="Share of the steps.")] = _DEFAULTS.warmup,
    batch_size: Annotated[int, Option(help="Rows in a forward pass.")] = _DEFAULTS.batch_size,
    accumulate: Annotated[int, Option(help="Forward passes in a step.")] = _DEFAULTS.accumulate,
    epochs: Annotated[float, Option(help="Passes over the rows.")] = _DEFAULTS.epochs,
    max_steps: Annotated[int | None, Option(help="Counts instead of --epochs.")] = None,
    eval_steps: Annotated[
        int | None,
        Option(help="Steps between measurements and checkpoints.", show_default="a tenth"),
    ] = None,
    patience: Annotated[
        int, Option(help="Measurements without a better dev loss before it ends; 0: never.")
    ] = _DEFAULTS.patience,
    dtype: Annotated[str, Option(help="auto, bfloat16 or float32.")] = _DEFAULTS.dtype,
    checkpointing: Annotated[
        bool, Option("--checkpointing", help="Save memory by computing activations twice.")
    ] = False,
    seed: Annotated[int, Option(help="Of weights and order.")] = _DEFAULTS.seed,
    output: Output = None,
    resume: Annotated[bool, Option("--resume", help="Go on with the run in --output.")] = False,
    tensorboard: Annotated[bool, Option("--tensorboard", help="Write TensorBoard logs.")] = False,
    upload: Annotated[bool, Option("--upload", help="Put it on the server afterwards.")] = False,
    url: options.Url = DEFAULT_URL,
    as_json: options.Json = False,
) -> None:
    """Train the prefix of TASK on the base model, which stays as it is."""
    given = {name: value for name, value in locals().items() if name in TrainSettings.model_fields}
    settings = _settings(given)
    if upload and method not in PREFIX_METHODS:
        raise typer.BadParameter(f"--upload needs a prefix, and --method {method} makes none")
    rows, dev_rows = _rows(data, join), _rows(dev, join) if dev else ()
    console = Console(stderr=True)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    with console.status(f"Loading {base_model}"):
        loaded = _load(base_model, settings)
    with Client(url) as client:
        if upload:
            _check_same_base(client, loaded.spec)
        trained = train(
            settings,
            loaded,
            rows,
            output or Path("runs") / task,
            dev=dev_rows,
            start=_start(client, settings),
            resume=resume,
            tensorboard=tensorboard,
            console=console,
        )
        answer = _upload(client, task, trained, (*dev_rows, *rows)[0]) if upload else {}
    facts = _facts(trained) | answer
    print_json(facts) if as_json else print_fields({k: str(v) for k, v in facts.items()})


def _settings(given: dict[str, object]) -> TrainSettings:
    try:
        return TrainSettings.model_validate(given)
    except ValidationError as error:
        [first, *_] = error.errors()
        option = "-".join(str(part) for part in first["loc"]).replace("_", "-")
        message = first["msg"].removeprefix("Value error, ")
        where = f"--{option} {first['input']}: " if option else ""
        raise typer.BadParameter(f"{where}{message}") from error


def _rows(path: Path, join: bool) -> tuple[Row, ...]:
    rows = read_rows(path)
    if not join:
        return rows
    return tuple(Row(row.source, tuple(map(detokenise, row.references))) for row in rows)


def _load(name: str, settings: TrainSettings) -> LoadedModel:
    device = default_device()
    dtype = settings.dtype_on(device)
    return load_base_model(
        name,
        device=device,
        dtype=torch.float32 if settings.method == "finetune" else dtype,
        cache_dir=DEFAULT_DATA_DIR.expanduser() / "models",
    )


def _check_same_base(client: Client, spec: BaseModelSpec) -> None:
    info = client.info()
    if info.model_sha != spec.fingerprint:
        raise TrainingError(
            f"the server runs {info.model_id!r}, and this would train {spec.name!r}, which has "
            "other weights; give the server's with --base-model"
        )


def _start(client: Client, settings: TrainSettings) -> Prefix | None:
    if not settings.init.startswith(TASK):
        return None
    with TemporaryDirectory() as folder:
        path = client.download(settings.init.removeprefix(TASK), Path(folder) / "start")
        return Prefix.from_bytes(path.read_bytes())


def _upload(client: Client, task: str, trained: Trained, row: Row) -> dict[str, object]:
    """Put the prefix on the server, and let it answer a row."""
    stored = client.upload(task, trained.path)
    generation = client.generate(row.source, task_id=task)
    return {
        "version": stored.version,
        "source": row.source,
        "answer": generation.generated_text,
        "reference": row.references[0],
    }


def _facts(trained: Trained) -> dict[str, object]:
    facts = {
        "path": str(trained.path),
        "steps": trained.steps,
        "dev_loss": trained.dev_loss,
        "seconds": round(trained.seconds, 1),
        "parameters": trained.parameters,
    }
    return {name: value for name, value in facts.items() if value is not None}
