"""llama.cpp's server as a peer: the same weights in bfloat16, one slot for each sequence.

python -m benchmarks.peers.llama_cpp_worker MODEL.gguf
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

from benchmarks.peers.worker import Generate, serve

MAX_SEQUENCES, MAX_LENGTH = 64, 256
READY_SECONDS = 60


def load(model: str, server: subprocess.Popen[bytes], url: str) -> tuple[str, Generate]:
    """Wait for the server; every prompt of a batch is one request, all sent at once."""
    deadline = time.monotonic() + READY_SECONDS
    while not _is_ready(url):
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"llama-server did not start with {Path(model).name}")
        time.sleep(0.1)
    version: str = httpx.get(f"{url}/props").json()["build_info"]

    def generate(prompts: list[list[int]], new_tokens: int) -> int:
        return asyncio.run(_generate_all(url, prompts, new_tokens))

    return version, generate


async def _generate_all(url: str, prompts: list[list[int]], new_tokens: int) -> int:
    limits = httpx.Limits(max_connections=len(prompts))
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        body = {"n_predict": new_tokens, "ignore_eos": True, "temperature": 0}
        # Every round sends the same prompts; their prefill must not come from the last round.
        body["cache_prompt"] = False
        requests = [client.post("/completion", json={**body, "prompt": ids}) for ids in prompts]
        answers = await asyncio.gather(*requests)
    return sum(answer.raise_for_status().json()["tokens_predicted"] for answer in answers)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.TransportError:
        return False


def start(model: str) -> tuple[subprocess.Popen[bytes], str]:
    """The server on a free loopback port, and its address.

    Raises:
        FileNotFoundError: there is no llama-server, neither beside this interpreter nor on PATH.
    """
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    binary = shutil.which("llama-server", path=search)
    if binary is None:
        raise FileNotFoundError("llama-server is neither beside the interpreter nor on PATH")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    threads = str(len(os.sched_getaffinity(0)))
    command = [binary, "--model", model, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--threads", threads, "--parallel", str(MAX_SEQUENCES)]
    command += ["--ctx-size", str(MAX_SEQUENCES * MAX_LENGTH), "--log-verbosity", "0"]
    return subprocess.Popen(command, stdout=sys.stderr), f"http://127.0.0.1:{port}"


def main() -> None:
    """Serve until the input ends; the server goes with it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    options = parser.parse_args()
    servers: list[subprocess.Popen[bytes]] = []

    def start_and_load() -> tuple[str, Generate]:
        server, url = start(options.model)
        servers.append(server)
        return load(options.model, server, url)

    try:
        serve(start_and_load)
    finally:
        for server in servers:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
