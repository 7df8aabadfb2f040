"""What `prefixserve status` shows."""

from __future__ import annotations

from contextlib import suppress

from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, ConfigDict

from clients._client import Client
from clients._errors import AuthenticationError, UnavailableError

_RUNNING = "prefixserve_running_requests"
_WAITING = "prefixserve_waiting_requests"


class ServerStatus(BaseModel):
    """A server at one moment.

    Attributes:
        reason: why it is not ready; empty when it is.
        model: the base model, what it computes in and on.
        running, waiting: sequences that have a slot, and that wait for one; None where the API key
            does not let one know.
        tasks: number of the tenant's tasks; None in that case too, and while the store does not
            answer.
    """

    model_config = ConfigDict(frozen=True)

    url: str
    version: str
    ready: bool
    reason: str
    model: str
    running: int | None
    waiting: int | None
    tasks: int | None

    def lines(self) -> dict[str, str]:
        """What people read."""
        return {
            "server": f"{self.url} (prefixserve {self.version})",
            "health": "ready" if self.ready else f"not ready: {self.reason}",
            "model": self.model,
            "running": _shown(self.running),
            "waiting": _shown(self.waiting),
            "tasks": _shown(self.tasks),
        }


def read_status(client: Client, url: str) -> ServerStatus:
    """Ask a server how it is."""
    health, info = client.health(), client.info()
    gauges: dict[str, float] = {}
    with suppress(AuthenticationError):
        gauges = _gauges(client.metrics())
    tasks = None
    with suppress(AuthenticationError, UnavailableError):
        tasks = client.count_tasks()
    return ServerStatus(
        url=url,
        version=info.version,
        ready=health.ready,
        reason=health.reason,
        model=f"{info.model_id} ({info.model_dtype} on {info.model_device_type})",
        running=None if not gauges else int(gauges[_RUNNING]),
        waiting=None if not gauges else int(gauges[_WAITING]),
        tasks=tasks,
    )


def _shown(count: int | None) -> str:
    return "not known" if count is None else str(count)


def _gauges(exposition: str) -> dict[str, float]:
    """Values of the metrics that have no labels."""
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
        if not sample.labels
    }
