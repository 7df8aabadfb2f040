"""The tasks that a new server starts with: small real prefixes for the default model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class DemoTask:
    """A task that ships with the server.

    Attributes:
        task_id: the name to serve it under.
        path: the file to upload.
        kind: `artefact`, a prefix's safetensors bytes, or `text`, UTF-8 text that the server runs
            through the model and keeps as a prefix.
        example: an input that gives a good answer with greedy decoding.
    """

    task_id: str
    path: Path
    kind: Literal["artefact", "text"]
    example: str


DEMO_TASKS: tuple[DemoTask, ...] = (
    DemoTask(
        task_id="e2e",
        path=_FOLDER / "e2e.safetensors",
        kind="artefact",
        example="name : The Eagle | Type : coffee shop | food : Chinese | price : more than £ 30 | "
        "customer rating : high | area : city centre | family friendly : no | near : Burger King",
    ),
    DemoTask(
        task_id="webnlg",
        path=_FOLDER / "webnlg.safetensors",
        kind="artefact",
        example="Aarhus_Airport | location | Tirstrup && "
        "Aarhus_Airport | operatingOrganisation | Aktieselskab",
    ),
    DemoTask(
        task_id="sentiment",
        path=_FOLDER / "sentiment.txt",
        kind="text",
        example="The battery died after an hour and nobody answered my mails.",
    ),
)
