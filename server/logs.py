"""How the server writes its log: lines for people, or JSON lines for programs."""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal

from pythonjsonlogger.json import JsonFormatter
from transformers.utils.logging import disable_progress_bar

from server.request_context import current_request

LogFormat = Literal["text", "json"]

REQUESTS = "server.requests"
"""The logger that has a line for each request."""


def configure_logging(level: str, format_: LogFormat) -> None:
    """Write everything of a level and over to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_add_request_id)
    handler.setFormatter(_Json() if format_ == "json" else _Text())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for noisy in ("httpx", "httpcore", "urllib3", "filelock", "python_multipart"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    disable_progress_bar()  # type: ignore[no-untyped-call]


def _add_request_id(record: logging.LogRecord) -> bool:
    record.request_id = getattr(record, "request_id", None) or current_request().request_id
    return True


class _Text(logging.Formatter):
    """`time LEVEL logger: message name=value ...`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        facts: dict[str, object] = dict(getattr(record, "facts", {}))
        if request_id := getattr(record, "request_id", ""):
            facts["request_id"] = request_id
        words = (f"{name}={value}" for name, value in facts.items())
        return " ".join((super().formatMessage(record), *words))


class _Json(JsonFormatter):
    """One object a line; what is known of a request are fields of it."""

    def __init__(self) -> None:
        super().__init__(
            "%(levelname)s %(name)s %(message)s %(request_id)s",
            rename_fields={"levelname": "level", "name": "logger", "timestamp": "time"},
            timestamp=True,
        )

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        facts = log_data.pop("facts", {})
        log_data.pop("color_message", None)  # uvicorn's, for terminals
        if not log_data.get("request_id"):
            log_data.pop("request_id", None)
        return {**log_data, **facts}
