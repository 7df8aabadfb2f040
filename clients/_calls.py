"""What each method asks of the server. `Client` and `AsyncClient` differ only in how they wait."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, BinaryIO, Generic, Literal, TypedDict, TypeVar
from urllib.parse import quote

import httpx

from clients._answers import (
    Batch,
    File,
    Generation,
    Key,
    KeyLimits,
    NewKey,
    ServerInfo,
    Task,
    TaskCount,
    TenantLimits,
    UsageRow,
    Version,
)
from clients._errors import InvalidArgumentError
from clients._files import CountedStream, Progress
from clients._responses import reader
from prefix_store.data_dir import DEFAULT_DATA_DIR, admin_key_file

DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_TIMEOUT_SECONDS = 5.0
MOST_LISTED = 1000
"""Tasks that the server tells at once."""
TASK_HEADER = "X-Task-Id"
"""Tells a balancer the task, so that it can send it where its prefix is; servers do not read it."""
_LOOPBACK = re.compile(r"https?://(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?(/|$)")
_KEYS_PATH = "/admin/keys"

T = TypeVar("T")


class Parameters(TypedDict, total=False):
    """How to generate; the server's defaults hold for what is not given."""

    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    frequency_penalty: float
    seed: int
    stop: list[str]
    ignore_eos: bool
    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    no_repeat_ngram_size: int
    min_new_tokens: int
    truncate: int
    top_n_tokens: int
    return_full_text: bool


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request.

    Attributes:
        read: makes the answer of the answer's body.
        body: arguments of httpx's `build_request`.
    """

    method: str
    path: str
    read: Callable[[bytes], T]
    body: Mapping[str, Any] = field(default_factory=dict)


_generation = reader(Generation)
_generations = reader(list[Generation])
_task = reader(Task)
_tasks = reader(list[Task])
_task_count = reader(TaskCount)
_versions = reader(list[Version])
_key = reader(Key)
_keys = reader(list[Key])
_new_key = reader(NewKey)
_info = reader(ServerInfo)
_batch = reader(Batch)


def http_options(base_url: str | None, api_key: str | None, timeout: float) -> dict[str, Any]:
    """Arguments of httpx's clients.

    Raises:
        InvalidArgumentError: the address is not an http one, or the key has odd characters or
            cannot be read.
    """
    url = base_url or os.environ.get("PREFIXSERVE_URL") or DEFAULT_URL
    if not re.match(r"https?://[^/]", url):
        raise InvalidArgumentError(f"{url!r} is not an address such as {DEFAULT_URL}")
    key = api_key or os.environ.get("PREFIXSERVE_API_KEY") or _own_servers_key(url)
    if key and not (key.isascii() and key.isprintable()):
        raise InvalidArgumentError("the API key has characters that no key has, e.g. a line end")
    return {
        "base_url": url,
        "headers": {"Authorization": f"Bearer {key}"} if key else {},
        # Waiting for one of this client's own connections is no fault of the server's.
        "timeout": httpx.Timeout(timeout, connect=CONNECT_TIMEOUT_SECONDS, pool=None),
    }


def _own_servers_key(url: str) -> str:
    """The admin key that a server on this machine has in a file, if there is one."""
    if not _LOOPBACK.match(url):
        return ""
    named = os.environ.get("PREFIXSERVE_ADMIN_KEY_FILE")
    data_dir = Path(os.environ.get("PREFIXSERVE_DATA_DIR") or DEFAULT_DATA_DIR)
    path = Path(named) if named else admin_key_file(data_dir)
    try:
        return path.read_text(errors="replace").strip()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise InvalidArgumentError(
            f"cannot read the server's key in {path}: {error.strerror}; set PREFIXSERVE_API_KEY"
        ) from error


def build_request(
    http: httpx.Client | httpx.AsyncClient, call: Call[Any], progress: Progress | None
) -> httpx.Request:
    """The request that a call sends.

    Raises:
        InvalidArgumentError: an argument of the call has no place in JSON, such as NaN.
    """
    try:
        request = http.build_request(call.method, call.path, **call.body)
    except ValueError as error:
        raise InvalidArgumentError(f"this cannot be sent as JSON: {error}") from error
    if progress is not None:
        request.stream = CountedStream(request, progress)
    return request


def generate(
    inputs: str | list[str], task_id: str | None, user: str | None, parameters: Parameters
) -> Call[Generation | list[Generation]]:
    """A text for one input, or one for each of several."""
    read = _generation if isinstance(inputs, str) else _generations
    return Call("POST", "/generate", read, _generate_request(inputs, task_id, user, parameters))


def stream(
    inputs: str, task_id: str | None, user: str | None, parameters: Parameters
) -> Call[bytes]:
    """The tokens of a text as server-sent events."""
    return Call(
        "POST", "/generate_stream", bytes, _generate_request(inputs, task_id, user, parameters)
    )


def _generate_request(
    inputs: str | list[str], task_id: str | None, user: str | None, parameters: Parameters
) -> dict[str, Any]:
    body: dict[str, Any] = {
        "inputs": inputs,
        "parameters": {"details": True, **parameters},
    }
    if task_id is not None:
        body["task_id"] = task_id
    if user is not None:
        body["user"] = user
    headers = {} if task_id is None else {TASK_HEADER: _segment(task_id)}
    return {"json": body, "headers": headers}


def upload(
    task_id: str, body: Mapping[str, Any], activate: bool, if_match: str | None
) -> Call[Task]:
    """A task's new prefix, in a body of `upload_body`."""
    params = {} if activate else {"params": {"activate": "false"}}
    return Call("PUT", _task_path(task_id), _task, {**body, **params, **_matching(if_match)})


def tasks(limit: int, after: str | None) -> Call[list[Task]]:
    """The first tasks by name, after one."""
    params = {"limit": limit} | ({} if after is None else {"after": after})
    return Call("GET", "/admin/tasks", _tasks, {"params": params})


def page_size(limit: int | None, found: int) -> int:
    """How many tasks to ask for next, when so many are found."""
    return MOST_LISTED if limit is None else min(MOST_LISTED, limit - found)


def count_tasks() -> Call[int]:
    """How many tasks there are."""
    return Call("GET", "/admin/task-count", lambda body: _task_count(body).tasks)


def task(task_id: str) -> Call[Task]:
    """One task."""
    return Call("GET", _task_path(task_id), _task)


def prefix(task_id: str) -> Call[bytes]:
    """A task's prefix as it was stored."""
    return Call("GET", f"{_task_path(task_id)}/prefix", bytes)


def delete(task_id: str) -> Call[bytes]:
    """Removal of a task."""
    return Call("DELETE", _task_path(task_id), bytes)


def versions(task_id: str) -> Call[list[Version]]:
    """The versions of a task."""
    return Call("GET", f"{_task_path(task_id)}/versions", _versions)


def activate(task_id: str, version: str, if_match: str | None) -> Call[Task]:
    """Another active version."""
    body = {"json": {"version": version}, **_matching(if_match)}
    return Call("POST", f"{_task_path(task_id)}/activate", _task, body)


def rollback(task_id: str, if_match: str | None) -> Call[Task]:
    """The version that was active before."""
    return Call("POST", f"{_task_path(task_id)}/rollback", _task, _matching(if_match))


def split(task_id: str, shares: Mapping[str, int], if_match: str | None) -> Call[Task]:
    """Shares of the requests by version."""
    body = {"json": dict(shares), **_matching(if_match)}
    return Call("POST", f"{_task_path(task_id)}/split", _task, body)


def delete_version(task_id: str, version: str) -> Call[bytes]:
    """Removal of one version."""
    return Call("DELETE", f"{_task_path(task_id)}/versions/{_segment(version)}", bytes)


def share(task_id: str, tenants: Sequence[str], if_match: str | None) -> Call[Task]:
    """The tenants that may use a task."""
    body = {"json": {"tenants": list(tenants)}, **_matching(if_match)}
    return Call("PUT", f"{_task_path(task_id)}/sharing", _task, body)


def create_key(
    scopes: Sequence[str], tenant: str | None, label: str, expires_in: float | None
) -> Call[NewKey]:
    """A new API key."""
    fields = {"scopes": list(scopes), "tenant": tenant, "label": label, "expires_in": expires_in}
    return Call("POST", _KEYS_PATH, _new_key, {"json": fields})


def keys() -> Call[list[Key]]:
    """Every API key of the tenant."""
    return Call("GET", _KEYS_PATH, _keys)


def revoke_key(key_id: str) -> Call[Key]:
    """The end of an API key."""
    return Call("DELETE", f"{_KEYS_PATH}/{_segment(key_id)}", _key)


def all_limits() -> Call[list[TenantLimits]]:
    """Every tenant for which limits are set."""
    return Call("GET", "/admin/limits", reader(list[TenantLimits]))


def limits(tenant: str) -> Call[TenantLimits]:
    """A tenant's limits."""
    return Call("GET", f"/admin/tenants/{_segment(tenant)}/limits", reader(TenantLimits))


def set_limits(
    tenant: str, limits: Mapping[str, int | float | None], key_id: str | None
) -> Call[TenantLimits | KeyLimits]:
    """Other limits of a tenant, or of one of its keys."""
    path, body = f"/admin/tenants/{_segment(tenant)}", {"json": dict(limits)}
    if key_id is None:
        return Call("PUT", f"{path}/limits", reader(TenantLimits), body)
    return Call("PUT", f"{path}/keys/{_segment(key_id)}/limits", reader(KeyLimits), body)


def usage(
    tenant: str | None, task_id: str | None, first: date | None, last: date | None
) -> Call[list[UsageRow]]:
    """What was used."""
    asked = {"tenant": tenant, "task": task_id, "from": first, "to": last}
    params = {name: str(value) for name, value in asked.items() if value is not None}
    return Call("GET", "/admin/usage", reader(list[UsageRow]), {"params": params})


def upload_file(name: str, data: BinaryIO) -> Call[File]:
    """A batch's requests."""
    body = {"files": {"file": (name, data)}, "data": {"purpose": "batch"}}
    return Call("POST", "/v1/files", reader(File), body)


def file_content(file_id: str) -> Call[bytes]:
    """What is in a file."""
    return Call("GET", f"/v1/files/{_segment(file_id)}/content", bytes)


def create_batch(file_id: str, endpoint: str) -> Call[Batch]:
    """A new batch."""
    fields = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": "24h"}
    return Call("POST", "/v1/batches", _batch, {"json": fields})


def batch(batch_id: str) -> Call[Batch]:
    """A batch."""
    return Call("GET", f"/v1/batches/{_segment(batch_id)}", _batch)


def cancel_batch(batch_id: str) -> Call[Batch]:
    """The end of a batch."""
    return Call("POST", f"/v1/batches/{_segment(batch_id)}/cancel", _batch)


def info() -> Call[ServerInfo]:
    """What the server runs."""
    return Call("GET", "/info", _info)


def metrics() -> Call[str]:
    """The server's metrics in Prometheus' text format."""
    return Call("GET", "/metrics", bytes.decode)


def _task_path(task_id: str) -> str:
    return f"/admin/tasks/{_segment(task_id)}"


def _segment(name: str) -> str:
    return quote(name, safe="", errors="backslashreplace")


def _matching(version: str | None) -> dict[str, Any]:
    return {} if version is None else {"headers": {"If-Match": f'"{version}"'}}
