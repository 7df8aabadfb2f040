"""A server on a thread of the test's process, on a real port, with a real store."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx_sse import connect_sse
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp

from prefix_store.data_dir import admin_key_file
from prefix_store.model_loading import LoadedModel
from prefix_store.prefix import Prefix
from server.serve import bind, serve
from server.services import Services
from server.settings import load_settings

DEADLINE_SECONDS = 60


@dataclass(frozen=True)
class LiveServer:
    """A running server and a client of it; `stop` is what SIGTERM does to a process."""

    url: str
    client: httpx.Client
    stop: Callable[[], None]

    def generate(
        self, inputs: str | list[str], task_id: str | None = None, **parameters: Any
    ) -> Any:
        """The answer of `POST /generate`, which must succeed."""
        body = {"inputs": inputs, "task_id": task_id, "parameters": parameters}
        answer = self.client.post("/generate", json=body)
        assert answer.status_code == httpx.codes.OK, answer.text
        return answer.json()

    def stream(
        self, inputs: str, task_id: str | None = None, **parameters: Any
    ) -> list[dict[str, Any]]:
        """The events of `POST /generate_stream`."""
        body = {"inputs": inputs, "task_id": task_id, "parameters": parameters}
        with connect_sse(self.client, "POST", "/generate_stream", json=body) as source:
            return [json.loads(event.data) for event in source.iter_sse()]

    def upload(self, task_id: str, prefix: Prefix) -> dict[str, Any]:
        """The answer of an upload, which must succeed."""
        files = {"file": ("prefix.safetensors", prefix.to_bytes())}
        answer = self.client.put(f"/admin/tasks/{task_id}", files=files)
        assert answer.status_code == httpx.codes.CREATED, answer.text
        task: dict[str, Any] = answer.json()
        return task

    def metric(self, name: str, **labels: str) -> float:
        """A metric's value now; 0 before its first count."""
        text = self.client.get("/metrics").text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == f"prefixserve_{name}" and sample.labels == labels:
                    return sample.value
        return 0.0

    def wait_until(self, name: str, value: float, **labels: str) -> None:
        """Poll until a metric has a value."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while (found := self.metric(name, **labels)) != value:
            assert time.monotonic() < deadline, f"{name} is {found} and not {value}"
            time.sleep(0.01)


def near(expected: Any) -> Any:
    """Equal to what is the same but for rounding: sums differ a little between batches."""
    if isinstance(expected, float):
        return pytest.approx(expected, abs=1e-4)
    if isinstance(expected, dict):
        return {name: near(value) for name, value in expected.items()}
    return [near(value) for value in expected] if isinstance(expected, list) else expected


def bearer(key: str) -> dict[str, str]:
    """The header that carries an API key."""
    return {"Authorization": f"Bearer {key}"}


@contextmanager
def live_server(
    loaded: LoadedModel, data_dir: Path, *flags: str, auth: bool = False
) -> Iterator[LiveServer]:
    """Start a server on a free port; stop it on the way out.

    Args:
        auth: ask for API keys; the client has that of the operator.
    """
    settings = load_settings(
        [
            "--data-dir",
            str(data_dir),
            "--no-demo-tasks",
            "--auth" if auth else "--no-auth",
            "--port",
            "0",
            "--drain-seconds",
            "5",
            *flags,
        ]
    )
    started: Future[LiveServer] = Future()

    async def run() -> None:
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()

        async def announce(_: Services, __: ASGIApp, address: str) -> None:
            headers = bearer(admin_key_file(data_dir).read_text().strip()) if auth else {}
            client = httpx.Client(base_url=address, timeout=DEADLINE_SECONDS, headers=headers)
            stop = partial(loop.call_soon_threadsafe, stopped.set)
            started.set_result(LiveServer(address, client, stop))

        with bind(settings.host, settings.port) as listener:
            await serve(settings, loaded, listener, announce, stopped)

    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(asyncio.run, run())
        running.add_done_callback(lambda _: started.cancel())
        try:
            server = started.result(DEADLINE_SECONDS)
        except CancelledError:
            running.result()
            raise
        with server.client:
            try:
                yield server
            finally:
                if not running.done():
                    server.stop()
                running.result(DEADLINE_SECONDS)
