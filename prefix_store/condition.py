"""Conditional changes, as HTTP's If-Match and If-None-Match say (RFC 9110, 13.1)."""

from __future__ import annotations

from dataclasses import dataclass

from prefix_store.errors import PreconditionFailedError

ANY = "*"


@dataclass(frozen=True, slots=True)
class Condition:
    """What a task's active version must be for a change to be made.

    Attributes:
        match: it is one of these; `*` is any, so the task must exist.
        none_match: it is none of these; with `*` the task must not exist.
    """

    match: frozenset[str] | None = None
    none_match: frozenset[str] | None = None

    def check(self, name: str, active: str | None) -> None:
        """Return if a task with this active version may be changed; None is no task.

        Raises:
            PreconditionFailedError: it may not.
        """
        if self.match is not None and not _among(active, self.match):
            found = "does not exist" if active is None else f"is at version {active}"
            raise PreconditionFailedError(
                f"task {name!r} {found}, and If-Match asks for {_listed(self.match)}; "
                "look at the task again and repeat the change if it still applies"
            )
        if self.none_match is not None and _among(active, self.none_match):
            raise PreconditionFailedError(
                f"task {name!r} exists at version {active}, and If-None-Match excludes "
                f"{_listed(self.none_match)}"
            )


ALWAYS = Condition()


def _among(active: str | None, versions: frozenset[str]) -> bool:
    return active is not None and (ANY in versions or active in versions)


def _listed(versions: frozenset[str]) -> str:
    shown = ", ".join(sorted(version[:80] for version in versions)[:3])
    return shown + (" or others" if len(versions) > 3 else "") or "nothing"
