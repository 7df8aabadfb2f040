"""Which names a task may have."""

from __future__ import annotations

import re

from prefix_store.errors import InvalidTaskIdError

MAX_TASK_ID_CHARS = 128
_ALLOWED = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_TASK_ID_CHARS - 1}}}")
_SHOWN = 40


def check_task_id(task_id: str) -> str:
    """`task_id` itself, safe in a URL path, a Redis key, a file name and a metric label.

    Raises:
        InvalidTaskIdError: empty, over 128 characters, other characters than ASCII letters,
            digits, `.`, `_` and `-`, or not beginning with a letter or digit.
    """
    if _ALLOWED.fullmatch(task_id):
        return task_id
    shown = (
        task_id if len(task_id) <= _SHOWN else f"{task_id[:_SHOWN]}… ({len(task_id)} characters)"
    )
    raise InvalidTaskIdError(
        f"task_id is {shown!r}; expected 1 to {MAX_TASK_ID_CHARS} characters, letters, digits, "
        "'.', '_' or '-', beginning with a letter or digit"
    )
