"""The measuring side of a peer: its process, and questions to it."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.common import ROOT


@dataclass(frozen=True, slots=True)
class PeerSpec:
    """How to start a peer.

    Attributes:
        name: what results call it.
        python: an interpreter that has it.
        arguments: the module to run and its options.
        sizes: at how many sequences it is measured.
        environment: variables it needs, beyond those of this process.
        sample: measure the first so many prompts only; for a peer that takes one request at a
            time, whose rate does not depend on how many wait.
    """

    name: str
    python: Path
    arguments: Sequence[str]
    sizes: frozenset[int]
    environment: Mapping[str, str]
    sample: int | None = None


class Peer:
    """A running peer, or the reason why there is none. Close it, or use it in a `with`."""

    def __init__(self, spec: PeerSpec) -> None:
        """Start the process and wait until it has loaded."""
        self.spec = spec
        self.version: str | None = None
        self.absent: str | None = None
        self._stack = ExitStack()
        if spec.python.is_file():
            self._start()
        else:
            self.absent = f"no interpreter at {spec.python}; `make peers` installs it"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def status(self) -> dict[str, str | None]:
        """Its version, or why it is absent."""
        return {"absent": self.absent} if self.absent else {"version": self.version}

    def rate(self, prompt_ids: Sequence[Sequence[int]], new_tokens: int) -> float:
        """Generated tokens per second of one batch, prefill included.

        Raises:
            RuntimeError: it ended, or generated another number of tokens than it was asked for.
        """
        prompt_ids = prompt_ids[: self.spec.sample]
        request = {"prompts": prompt_ids, "new_tokens": new_tokens}
        self._requests.write(json.dumps(request) + "\n")
        self._requests.flush()
        answer = self._answer()
        expected = len(prompt_ids) * new_tokens
        if answer.get("tokens") != expected:
            raise RuntimeError(f"{self.spec.name}: expected {expected} tokens, got {answer}")
        return expected / float(answer["seconds"])

    def close(self) -> None:
        """End the process."""
        self._stack.close()

    def _start(self) -> None:
        self._log = self._stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115
        process = subprocess.Popen(
            [str(self.spec.python), "-m", *self.spec.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env={**_own_environment(), **self.spec.environment},
        )
        # Leaving a process closes its input, which ends it, and waits.
        self._stack.enter_context(process)
        assert process.stdin is not None  # noqa: S101 - it is a pipe
        assert process.stdout is not None  # noqa: S101
        self._requests, self._answers = process.stdin, process.stdout
        answer = self._answer()
        self.version, self.absent = answer.get("ready"), answer.get("absent")

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._log.seek(0)
        last = (self._log.read().strip().splitlines() or ["nothing"])[-1]
        return {"absent": f"its process ended; the last it said: {last}"}


def _own_environment() -> dict[str, str]:
    """This process's, without what this project's server sets for its own threads."""
    ours = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    return {name: value for name, value in os.environ.items() if name not in ours}
