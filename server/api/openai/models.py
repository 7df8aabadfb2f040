"""Tasks as OpenAI's models, and the base model as one."""

from __future__ import annotations

import time

from prefix_store.task import TaskRecord
from server.api.openai.answers import ModelAnswer, ModelList
from server.callers import Caller
from server.generation import Usage
from server.services import Services

_OWNER = "prefixserve"
_STARTED = int(time.time())


def task_of(services: Services, model: str) -> str | None:
    """The task that `model` names; None where it is the base model's name, which comes first."""
    return None if model == services.engine.spec.name else model


def fingerprint(services: Services, usage: Usage) -> str:
    """Which weights made an answer: the prefix's version, or the base model's own."""
    return usage.version or services.engine.spec.fingerprint


async def list_models(services: Services, caller: Caller) -> ModelList:
    """The base model, then every task that the caller may use, by what it calls them."""
    tasks = await services.tasks.usable(caller.tenant)
    models = (_task(services, name, task.record) for name, task in sorted(tasks.items()))
    return ModelList(data=[_base(services), *models])


async def get_model(services: Services, caller: Caller, model: str) -> ModelAnswer:
    """One of them."""
    task_id = task_of(services, model)
    if task_id is None:
        return _base(services)
    task = await services.tasks.resolve(caller.tenant, task_id)
    return _task(services, task_id, task.record)


def _base(services: Services) -> ModelAnswer:
    spec = services.engine.spec
    return ModelAnswer(
        id=spec.name,
        created=_STARTED,
        owned_by=_OWNER,
        root=spec.fingerprint,
        parent=None,
        max_model_len=services.engine.max_length,
    )


def _task(services: Services, name: str, record: TaskRecord) -> ModelAnswer:
    return ModelAnswer(
        id=name,
        created=int(record.created_at),
        owned_by=_OWNER,
        root=record.version,
        parent=services.engine.spec.name,
        max_model_len=services.engine.max_length,
    )
