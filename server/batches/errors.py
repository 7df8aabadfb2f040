"""What is refused of batches and files."""

from server.errors import ServerError


class UnknownBatchError(ServerError):
    """There is no such batch or file, or it is another tenant's."""


class TooManyBatchesError(ServerError):
    """The tenant has as many unfinished batches as it may."""
