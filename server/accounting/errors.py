"""What a limit refuses."""

from server.errors import ServerError


class LimitExceededError(ServerError):
    """Too much for now; `retry_after` seconds later there may be room."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after
