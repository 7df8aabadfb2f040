"""What `prefixserve status` shows."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, ConfigDict

from clients._client import Client

_RUNNING = "prefixserve_running_requests"
_WAITING = "prefixserve_waiting_requests"


class ServerStatus(BaseModel):
    """A server at one moment; `reason` says why it is not ready."""

    model_config = ConfigDict(frozen=True)

    url: str
    ready: bool
    reason: str
    model: str
    running: int
    waiting: int
    tasks: int

    def fields(self) -> dict[str, str]:
        """What people read."""
        return {
            "server": self.url,
            "health": "ready" if self.ready else f"not ready: {self.reason}",
            "model": self.model,
            "running": str(self.running),
            "waiting": str(self.waiting),
            "tasks": str(self.tasks),
        }


def read_status(client: Client, url: str) -> ServerStatus:
    """Ask a server how it is."""
    health = client.health()
    gauges = _gauges(client.metrics())
    return ServerStatus(
        url=url,
        ready=health.ready,
        reason=health.reason,
        model=client.info().model_id,
        running=int(gauges[_RUNNING]),
        waiting=int(gauges[_WAITING]),
        tasks=len(client.tasks()),
    )


def _gauges(exposition: str) -> dict[str, float]:
    """Values of the metrics that have no labels."""
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
        if not sample.labels
    }
