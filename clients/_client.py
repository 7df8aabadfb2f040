"""`Client`: every method waits for the answer. `AsyncClient` has the same methods."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeVar, Unpack, overload

import httpx
from httpx_sse import EventSource
from tenacity import Retrying

from clients import _calls as calls
from clients._answers import (
    Batch,
    File,
    Generation,
    Health,
    Key,
    KeyLimits,
    NewKey,
    ServerInfo,
    StreamToken,
    Task,
    TenantLimits,
    UsageRow,
    Version,
)
from clients._calls import Call, Parameters
from clients._files import Progress, UploadSource, save_file, upload_body
from clients._responses import (
    check_finished,
    parse_event,
    read_health,
    status_error,
    translated_errors,
)
from clients._retry import retry_options

T = TypeVar("T")


class Client:
    """Talks to a prefixserve server. Safe to share between threads; close it, or use `with`.

    Args:
        base_url: the server's address; default `PREFIXSERVE_URL` or `http://127.0.0.1:8000`.
        api_key: sent as a bearer token; default `PREFIXSERVE_API_KEY`, or the admin key that a
            server on this machine keeps in its data directory (`PREFIXSERVE_DATA_DIR`).
        timeout: seconds without a byte from the server after which a call fails; a text that is
            not streamed arrives all at once, so this bounds its whole generation.
        max_retries: how often a call is repeated when the server is full (429), unavailable (503)
            or the connection fails before the answer begins.

    Every method raises the errors of `clients.PrefixServeError`'s tree and no others.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = 120.0,
        max_retries: int = 3,
    ) -> None:
        self._http = httpx.Client(**calls.http_options(base_url, api_key, timeout))
        self._retry_options = retry_options(max_retries)

    @overload
    def generate(
        self,
        inputs: str,
        *,
        task_id: str | None = None,
        user: str | None = None,
        **parameters: Unpack[Parameters],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        inputs: list[str],
        *,
        task_id: str | None = None,
        user: str | None = None,
        **parameters: Unpack[Parameters],
    ) -> list[Generation]: ...

    def generate(
        self,
        inputs: str | list[str],
        *,
        task_id: str | None = None,
        user: str | None = None,
        **parameters: Unpack[Parameters],
    ) -> Generation | list[Generation]:
        """Continue one input, or each of several; without a `task_id` with the bare base model.

        Args:
            user: whoever it is for, in any words; gets the same version of a split task each time.
        """
        return self._fetch(calls.generate(inputs, task_id, user, parameters))

    def stream(
        self,
        inputs: str,
        *,
        task_id: str | None = None,
        user: str | None = None,
        **parameters: Unpack[Parameters],
    ) -> Generator[StreamToken]:
        """Yield tokens as they are generated; the last has `generated_text` and `details`.

        Closing the generator early stops the generation on the server.
        """
        last = None
        with self._answer(calls.stream(inputs, task_id, user, parameters)) as response:
            for event in EventSource(response).iter_sse():
                last = parse_event(event)
                yield last
            check_finished(last)

    def upload(
        self,
        task_id: str,
        source: UploadSource | None = None,
        *,
        text: str | None = None,
        activate: bool = True,
        if_match: str | None = None,
        progress: Progress | None = None,
    ) -> Task:
        """Give a task its prefix; a task that exists gets the new one from now on.

        Args:
            source: a safetensors file of this project, a folder with a PEFT adapter, the bytes of
                the former, or anything with `to_bytes()`.
            text: instead of `source`, a prompt the server turns into a prefix.
            activate: false keeps it as a version of a task that exists, for `activate` or `split`.
            if_match: change only a task whose active version this is.
            progress: called with the bytes sent and the bytes in all.
        """
        with upload_body(source, text) as body:
            return self._fetch(calls.upload(task_id, body, activate, if_match), progress)

    def tasks(self, *, limit: int | None = None, after: str | None = None) -> list[Task]:
        """The tasks by name: all of them, or at most so many, or those after a name."""
        found: list[Task] = []
        while asked := calls.page_size(limit, len(found)):
            page = self._fetch(calls.tasks(asked, found[-1].task_id if found else after))
            found += page
            if len(page) < asked:
                break
        return found

    def count_tasks(self) -> int:
        """How many tasks there are."""
        return self._fetch(calls.count_tasks())

    def task(self, task_id: str) -> Task:
        """One task."""
        return self._fetch(calls.task(task_id))

    def download(self, task_id: str, path: str | os.PathLike[str]) -> Path:
        """Write a task's prefix, byte for byte as it was stored, to a file."""
        return save_file(self._fetch(calls.prefix(task_id)), path)

    def delete(self, task_id: str) -> None:
        """Remove a task; requests already running finish."""
        self._fetch(calls.delete(task_id))

    def versions(self, task_id: str) -> list[Version]:
        """The versions that a task keeps, the last uploaded first."""
        return self._fetch(calls.versions(task_id))

    def activate(self, task_id: str, version: str, *, if_match: str | None = None) -> Task:
        """Give requests this version from now on; ends a split."""
        return self._fetch(calls.activate(task_id, version, if_match))

    def rollback(self, task_id: str, *, if_match: str | None = None) -> Task:
        """Activate again what was active before; again goes back further. Ends a split."""
        return self._fetch(calls.rollback(task_id, if_match))

    def split(
        self, task_id: str, shares: Mapping[str, int], *, if_match: str | None = None
    ) -> Task:
        """Divide the requests among versions, in percent that add to 100; nothing ends it."""
        return self._fetch(calls.split(task_id, shares, if_match))

    def delete_version(self, task_id: str, version: str) -> None:
        """Remove a version that is neither active nor in a split."""
        self._fetch(calls.delete_version(task_id, version))

    def share(self, task_id: str, tenants: Sequence[str], *, if_match: str | None = None) -> Task:
        """Let these tenants use a task, `public` for all of them, and no others."""
        return self._fetch(calls.share(task_id, tenants, if_match))

    def create_key(
        self,
        scopes: Sequence[str],
        *,
        tenant: str | None = None,
        label: str = "",
        expires_in: float | None = None,
    ) -> NewKey:
        """Make an API key, the caller's tenant's by default; this is the only time it is told.

        Args:
            scopes: of `generate`, `admin`, `metrics`.
            expires_in: seconds until it is good no longer.
        """
        return self._fetch(calls.create_key(scopes, tenant, label, expires_in))

    def list_keys(self) -> list[Key]:
        """Every API key of the tenant, or of every tenant for the server's operator."""
        return self._fetch(calls.keys())

    def revoke_key(self, key_id: str) -> Key:
        """End an API key for good."""
        return self._fetch(calls.revoke_key(key_id))

    def all_limits(self) -> list[TenantLimits]:
        """The tenants for which limits are set."""
        return self._fetch(calls.all_limits())

    def limits(self, tenant: str) -> TenantLimits:
        """A tenant's limits, as set and as they hold."""
        return self._fetch(calls.limits(tenant))

    def set_limits(
        self,
        tenant: str,
        limits: Mapping[str, int | float | None],
        *,
        key_id: str | None = None,
    ) -> TenantLimits | KeyLimits:
        """Replace a tenant's limits, or those of one of its keys.

        Args:
            limits: by name; None is no limit, and what is not named the server's default.
        """
        return self._fetch(calls.set_limits(tenant, limits, key_id))

    def usage(
        self,
        *,
        tenant: str | None = None,
        task_id: str | None = None,
        first: date | None = None,
        last: date | None = None,
    ) -> list[UsageRow]:
        """Tokens by day (UTC), tenant and task; without days of the last 30."""
        return self._fetch(calls.usage(tenant, task_id, first, last))

    def upload_file(self, name: str, data: BinaryIO, *, progress: Progress | None = None) -> File:
        """Give the server a batch's requests: JSON lines as OpenAI has them.

        Args:
            name: what the file is called in lists.
            progress: called with the bytes sent and the bytes in all.
        """
        return self._fetch(calls.upload_file(name, data), progress)

    def file_content(self, file_id: str) -> bytes:
        """What is in a file, such as a batch's output."""
        return self._fetch(calls.file_content(file_id))

    def create_batch(self, file_id: str, endpoint: str = "/v1/completions") -> Batch:
        """Have every request of a file answered when the server has time.

        Args:
            endpoint: what every request's `url` is; or `/v1/chat/completions`.
        """
        return self._fetch(calls.create_batch(file_id, endpoint))

    def batch(self, batch_id: str) -> Batch:
        """How far a batch is."""
        return self._fetch(calls.batch(batch_id))

    def cancel_batch(self, batch_id: str) -> Batch:
        """End a batch; what is done of it is kept."""
        return self._fetch(calls.cancel_batch(batch_id))

    def health(self) -> Health:
        """Whether the server takes requests now; not retried."""
        with translated_errors(self._http.base_url):
            return read_health(self._http.get("/health/ready"))

    def info(self) -> ServerInfo:
        """What the server runs."""
        return self._fetch(calls.info())

    def metrics(self) -> str:
        """The server's metrics in Prometheus' text format."""
        return self._fetch(calls.metrics())

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _fetch(self, call: Call[T], progress: Progress | None = None) -> T:
        with self._answer(call, progress) as response:
            return call.read(response.read())

    @contextmanager
    def _answer(
        self, call: Call[Any], progress: Progress | None = None
    ) -> Iterator[httpx.Response]:
        """The answer to a call once it is known not to be an error; its body is not read yet."""
        request = calls.build_request(self._http, call, progress)
        with translated_errors(self._http.base_url):
            response = Retrying(**self._retry_options)(self._send, request)
            with closing(response):
                yield response

    def _send(self, request: httpx.Request) -> httpx.Response:
        response = self._http.send(request, stream=True)
        if response.is_success:
            return response
        with closing(response):
            response.read()
            raise status_error(response)
