"""The HTTP application."""

from __future__ import annotations

from fastapi import FastAPI

from server.api import admin, generate, health, keys, lora_adapters, tenant_limits, usage, versions
from server.api.auditing import Auditing
from server.api.authentication import Authentication
from server.api.description import DescribedAPI
from server.api.error_responses import install_error_handlers
from server.api.limits import BodyLimit
from server.api.openai import batches, files
from server.api.openai import routes as openai
from server.services import VERSION, Services

_DESCRIPTION = """
Many tasks from one frozen language model. A task is a *prefix*: trained keys and values in front of
every request of that task. Upload one under `/admin/tasks`, then name it as `task_id` in
`POST /generate`. Requests of all tasks share every batch.

Every request but `/health/*` carries an API key, `Authorization: Bearer ps-...`; see `/admin/keys`.

Every error is `{"error": ..., "error_type": ...}`, and under `/v1/` has OpenAI's shape.
"""


def create_app(services: Services) -> FastAPI:
    """The application on services that run; who opened them closes them."""
    app = DescribedAPI(
        title="prefixserve",
        version=VERSION,
        description=_DESCRIPTION,
        redirect_slashes=False,  # an empty task name is a mistake, not another page
    )
    app.state.services = services
    settings = services.settings
    app.add_middleware(
        BodyLimit,
        max_body_bytes=settings.max_body_bytes,
        max_upload_bytes=settings.max_upload_bytes,
        max_batch_file_bytes=settings.max_batch_file_bytes,
    )
    app.add_middleware(Auditing, log=services.audit)
    # Added last, so it is in front: a request without a key is not read.
    app.add_middleware(Authentication, authenticate=services.authenticate, metrics=services.metrics)
    install_error_handlers(app)
    for router in (
        generate.router,
        openai.router,
        files.router,
        batches.router,
        admin.router,
        admin.counts,
        versions.router,
        keys.router,
        tenant_limits.router,
        usage.router,
        health.router,
    ):
        app.include_router(router)
    if settings.adapter_dir is not None:
        app.include_router(lora_adapters.router)
    return app
