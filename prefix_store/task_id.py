"""Which names a task may have, and what the store calls it.

A tenant calls its own task `name`, and another tenant's `tenant/name`. In the store a task of the
default tenant is `name`, as it was before there were tenants, and any other `tenant/name`.
"""

from __future__ import annotations

import re

from prefix_store.errors import InvalidTaskIdError, InvalidTenantError
from prefix_store.tenant import DEFAULT_TENANT, check_tenant

MAX_TASK_ID_CHARS = 128
TASK_ID_PATTERN = rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_TASK_ID_CHARS - 1}}}"
_ALLOWED = re.compile(TASK_ID_PATTERN)
_SHOWN = 40


def check_task_id(task_id: str) -> str:
    """`task_id` itself, safe in a URL path, a Redis key, a file name and a metric label.

    Raises:
        InvalidTaskIdError: empty, over 128 characters, other characters than ASCII letters,
            digits, `.`, `_` and `-`, or not beginning with a letter or digit.
    """
    if _ALLOWED.fullmatch(task_id):
        return task_id
    raise _invalid(task_id)


def stored_name(tenant: str, task_id: str) -> str:
    """What the store calls the task that a tenant calls so.

    Raises:
        InvalidTaskIdError: it is neither the name of a task nor that of a tenant and a task.
    """
    owner, slash, name = task_id.rpartition("/")
    if not slash:
        owner = tenant
    try:
        check_tenant(owner)
        check_task_id(name)
    except (InvalidTenantError, InvalidTaskIdError) as error:
        raise _invalid(task_id) from error
    return name if owner == DEFAULT_TENANT else f"{owner}/{name}"


def check_stored_name(task_id: str) -> str:
    """`task_id` itself, if the store may call a task so.

    Raises:
        InvalidTaskIdError
    """
    if stored_name(DEFAULT_TENANT, task_id) != task_id:
        raise _invalid(task_id)
    return task_id


def owner_and_name(task_id: str) -> tuple[str, str]:
    """The tenant of a task in the store, and what that tenant calls it."""
    owner, slash, name = task_id.rpartition("/")
    return (owner if slash else DEFAULT_TENANT), name


def name_for(tenant: str, task_id: str) -> str:
    """What a tenant calls a task in the store."""
    owner, name = owner_and_name(task_id)
    return name if owner == tenant else f"{owner}/{name}"


def _invalid(task_id: str) -> InvalidTaskIdError:
    shown = (
        task_id if len(task_id) <= _SHOWN else f"{task_id[:_SHOWN]}… ({len(task_id)} characters)"
    )
    return InvalidTaskIdError(
        f"task_id is {shown!r}; expected 1 to {MAX_TASK_ID_CHARS} characters, letters, digits, "
        "'.', '_' or '-', beginning with a letter or digit"
    )
