"""What `prefixserve status` shows."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, ConfigDict

from clients._client import Client
from clients._errors import UnavailableError

_RUNNING = "prefixserve_running_requests"
_WAITING = "prefixserve_waiting_requests"


class ServerStatus(BaseModel):
    """A server at one moment.

    Attributes:
        reason: why it is not ready; empty when it is.
        model: the base model, what it computes in and on.
        running, waiting: sequences that have a slot, and that wait for one.
        tasks: number of tasks; None while the store does not answer.
    """

    model_config = ConfigDict(frozen=True)

    url: str
    version: str
    ready: bool
    reason: str
    model: str
    running: int
    waiting: int
    tasks: int | None

    def lines(self) -> dict[str, str]:
        """What people read."""
        return {
            "server": f"{self.url} (prefixserve {self.version})",
            "health": "ready" if self.ready else f"not ready: {self.reason}",
            "model": self.model,
            "running": str(self.running),
            "waiting": str(self.waiting),
            "tasks": "the store does not answer" if self.tasks is None else str(self.tasks),
        }


def read_status(client: Client, url: str) -> ServerStatus:
    """Ask a server how it is."""
    health, info, gauges = client.health(), client.info(), _gauges(client.metrics())
    try:
        tasks = len(client.tasks())
    except UnavailableError:
        tasks = None
    return ServerStatus(
        url=url,
        version=info.version,
        ready=health.ready,
        reason=health.reason,
        model=f"{info.model_id} ({info.model_dtype} on {info.model_device_type})",
        running=int(gauges[_RUNNING]),
        waiting=int(gauges[_WAITING]),
        tasks=tasks,
    )


def _gauges(exposition: str) -> dict[str, float]:
    """Values of the metrics that have no labels."""
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
        if not sample.labels
    }
