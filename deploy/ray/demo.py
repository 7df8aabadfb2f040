"""Replicas behind Ray Serve on this machine, with a store of their own: `make ray-demo`.

    python -m deploy.ray.demo [--replicas 2] [--max-replicas 2] [flags of prefixserve serve]

Ray listens on loopback only. SIGTERM and Ctrl-C stop everything.
"""

import argparse
import asyncio
import os
import secrets
import shlex
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

# Ray reads these as it is imported, and hands them on to its processes.
os.environ |= {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deploy.ray.proxy.middlewares",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # all of Ray on loopback, as it is there
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}

import ray
from ray import serve

from deploy.ray.app import Arguments, build
from prefix_store.data_dir import admin_key_file, store_dir
from prefix_store.embedded import EmbeddedValkey
from prefix_store.errors import PrefixStoreError
from prefix_store.model_loading import model_source
from server.errors import StartupError
from server.settings import load_settings

_HOST = "127.0.0.1"
_OBJECT_STORE_BYTES = 100 * 1024**2  # nothing of ours is in it


def main() -> None:
    """Run until a signal."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--max-replicas", type=int)
    own, flags = parser.parse_known_args()
    settings = load_settings(flags)
    most = own.max_replicas or own.replicas
    _exit_on_signals()
    model_source(settings.model, settings.data_dir.expanduser() / "models")  # once, not by each
    with ExitStack() as opened:
        runner = opened.enter_context(asyncio.Runner())
        valkey = EmbeddedValkey(store_dir(settings.data_dir))
        opened.callback(lambda: runner.run(valkey.stop()))
        runner.run(valkey.start())
        folder = opened.enter_context(tempfile.TemporaryDirectory(prefix="ray-"))
        opened.callback(ray.shutdown)
        ray.init(
            num_cpus=most,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            _node_ip_address=_HOST,
            _temp_dir=folder,
        )
        _exit_on_signals()  # Ray has handlers of its own
        opened.callback(serve.shutdown)
        serve.start(http_options={"host": _HOST, "port": settings.port})
        key = settings.admin_key_file or admin_key_file(settings.data_dir)
        line = shlex.join([*flags, "--redis-url", valkey.url, "--admin-key-file", str(key)])
        serve.run(build(Arguments(flags=line, min_replicas=own.replicas, max_replicas=most)))
        _announce(settings.port, key)
        signal.pause()


def _exit_on_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit())


def _announce(port: int, key: Path) -> None:
    address = f"http://{_HOST}:{port}"
    sys.stdout.write(
        f"\nRay Serve answers at {address}, each replica also at a port after that.\n\n"
        f"Try it:\n  curl {address}/generate -H 'Content-Type: application/json' "
        f'-H "Authorization: Bearer $(cat {shlex.quote(str(key))})" '
        """-d '{"inputs": "The capital of France is"}'\n\n"""
    )
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        main()
    except (StartupError, PrefixStoreError) as error:
        sys.exit(f"prefixserve: {error}")
