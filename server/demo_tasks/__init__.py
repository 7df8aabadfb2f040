"""The tasks that a new server starts with: small real prefixes for the default model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class DemoTask:
    """A task that ships with the server.

    Attributes:
        task_id: the name to serve it under.
        path: the file to upload, a prefix's safetensors bytes.
        example: an input that gives a good answer with greedy decoding.
    """

    task_id: str
    path: Path
    example: str


DEMO_TASKS: tuple[DemoTask, ...] = (
    DemoTask(
        task_id="e2e",
        path=_FOLDER / "e2e.safetensors",
        example="name : The Eagle | Type : coffee shop | food : Chinese | price : more than £ 30 | "
        "customer rating : high | area : city centre | family friendly : no | near : Burger King",
    ),
    DemoTask(
        task_id="webnlg",
        path=_FOLDER / "webnlg.safetensors",
        example="Aarhus_Airport | location | Tirstrup && "
        "Aarhus_Airport | operatingOrganisation | Aktieselskab",
    ),
    DemoTask(
        task_id="sentiment",
        path=_FOLDER / "sentiment.safetensors",
        example="The battery died after an hour and nobody answered my mails.",
    ),
)
