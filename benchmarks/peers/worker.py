"""What a peer runs in: a process that loads once, then answers one JSON line for each it reads.

It writes `{"ready": version}` or `{"absent": reason}`; then for every
`{"prompts": [[token id]], "new_tokens": n}` it reads, `{"seconds": s, "tokens": n}`: the wall time
of the whole batch, prefill included, and how many tokens it generated. It ends with its input.

Imported by interpreters of other environments too, so it needs the standard library alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[list[int]], int], int]
"""Generates exactly that many new tokens for each prompt; returns how many in all."""


def serve(load: Callable[[], tuple[str, Generate]]) -> None:
    """Load a peer and answer until the input ends. `load` gives its version and what runs it."""
    answers = os.fdopen(os.dup(1), "w")
    # What a peer prints must not come between the answers.
    os.dup2(2, 1)

    def answer(line: dict[str, Any]) -> None:
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    try:
        version, generate = load()
    except Exception as error:  # whatever keeps a peer from running is the reason
        return answer({"absent": f"{type(error).__name__}: {error}"})
    answer({"ready": version})
    for line in sys.stdin:
        request = json.loads(line)
        started = time.perf_counter()
        tokens = generate(request["prompts"], request["new_tokens"])
        answer({"seconds": time.perf_counter() - started, "tokens": tokens})
    return None
