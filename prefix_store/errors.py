"""Everything the prefix store can refuse, as one tree."""

from __future__ import annotations

from typing import Self


class PrefixStoreError(Exception):
    """Base of every error raised by `prefix_store`; its text is written for the end user."""


class InvalidPrefixError(PrefixStoreError):
    """The bytes are not a usable prefix: names the tensor, what was found and what was expected."""


class IncompatiblePrefixError(InvalidPrefixError):
    """A well-formed prefix that does not fit this base model."""


class PrefixTooLargeError(PrefixStoreError):
    """The upload is over the configured size, or the prefix over the memory for all of them."""


class QuotaExceededError(PrefixStoreError):
    """The tenant may not store so much; waiting does not help."""


class CacheFullError(PrefixStoreError):
    """Running requests and pins leave no room for this prefix; it may succeed later."""


class PinsFullError(PrefixStoreError):
    """There is no memory for this prefix beside those that are pinned."""


class InvalidTaskIdError(PrefixStoreError):
    """The task name is empty, too long or has characters that are not allowed."""


class InvalidTenantError(PrefixStoreError):
    """The tenant's name is empty, too long or has characters that are not allowed."""


class UnknownKeyError(PrefixStoreError):
    """No API key of this id."""


class KeyFileError(PrefixStoreError):
    """A file with an API key cannot be used."""


class UnknownTaskError(PrefixStoreError):
    """No task of this name."""

    @classmethod
    def named(cls, name: str) -> Self:
        """The error for whoever called the task so."""
        return cls(f"no task {name[:80]!r}: upload its prefix, or check the name")


class UnknownVersionError(PrefixStoreError):
    """No artefact of this version is stored any more."""


class VersionConflictError(PrefixStoreError):
    """The task's versions do not allow this change as they are now."""


class InvalidSplitError(PrefixStoreError):
    """The shares of a split are not whole percentages that add to 100."""


class PreconditionFailedError(PrefixStoreError):
    """The task is not at the version that the change was conditional on."""


class CorruptArtefactError(PrefixStoreError):
    """The stored bytes do not have the hash that names them."""


class StoreUnavailableError(PrefixStoreError):
    """The store did not answer; the request may succeed later."""


class ModelLoadError(PrefixStoreError):
    """The base model cannot be found, read or served."""


class ArchiveError(PrefixStoreError):
    """An exported folder, or a task in it, cannot be written or used."""
