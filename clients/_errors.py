"""Everything the clients raise, as one tree.

PrefixServeError
├── InvalidArgumentError      an argument that cannot be used, e.g. an address without http://
├── MissingExtraError         a package that this part needs is not installed
├── PrefixFileError           a prefix cannot be read, or written, or is none this client can send
├── TrainingError             rows, settings and model that cannot be trained together
│   ├── TrainingDivergedError    the loss became NaN or infinite
│   └── TrainingInterruptedError it was stopped and can be resumed
├── EvaluationError           there is nothing to score, or the report cannot be written
├── DataError                 a data file cannot be used (`clients.data`)
├── APIConnectionError        no answer, or it broke off
│   └── APITimeoutError       the server took longer than the client's timeout
├── APIResponseError          an answer that is not prefixserve's: is the address right?
├── GenerationError           the server gave up in the middle of a stream
└── APIStatusError            the server refused; carries status_code, error_type and retry_after
    ├── InvalidRequestError   400, 422
    ├── AuthenticationError   401, 403
    ├── UnknownTaskError      404
    ├── ConflictError         409, 412
    ├── PayloadTooLargeError  413
    ├── QueueFullError        429
    └── ServerError           5xx
        └── UnavailableError  503
"""

from __future__ import annotations


class PrefixServeError(Exception):
    """Base of every error of this package; its text is one sentence written for people."""


class InvalidArgumentError(PrefixServeError):
    """An argument that cannot be used, e.g. an address without `http://` or half a character."""


class MissingExtraError(PrefixServeError, ImportError):
    """A package is not installed that only a part of this project needs.

    Args:
        part: what needs it, e.g. `evaluation`.
        module: the module that was not found, as the interpreter names it.
        extra: the optional dependencies of prefixserve's that bring it.
    """

    def __init__(self, part: str, module: str | None, extra: str) -> None:
        package = (module or "").partition(".")[0]
        super().__init__(
            f"{part} needs the package {package}, which is not installed: "
            f"pip install 'prefixserve[{extra}]'"
        )


class PrefixFileError(PrefixServeError):
    """A prefix file cannot be read or written, or is none that this client can send."""


class TrainingError(PrefixServeError):
    """Rows, settings and model that cannot be trained together."""


class TrainingDivergedError(TrainingError):
    """The loss became NaN or infinite."""


class TrainingInterruptedError(TrainingError):
    """Training was stopped; it can be resumed."""


class EvaluationError(PrefixServeError):
    """There is nothing to score, or the report cannot be written."""


class BatchError(PrefixServeError):
    """A file of requests that is none, or a batch that ended before its last request."""


class APIConnectionError(PrefixServeError):
    """The server did not answer, or its answer broke off."""


class APITimeoutError(APIConnectionError):
    """The server took longer than the client's timeout."""


class APIResponseError(PrefixServeError):
    """The answer is not one of prefixserve's; most often the address is wrong."""


class GenerationError(PrefixServeError):
    """The server gave up in the middle of a stream."""


class APIStatusError(PrefixServeError):
    """The server refused the request.

    Attributes:
        status_code: the HTTP status.
        error_type: the server's own name for the error, or empty.
        retry_after: seconds after which the server asks to try again, or None.
    """

    def __init__(
        self,
        message: str,
        status_code: int,
        error_type: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.error_type = error_type
        self.retry_after = retry_after


class InvalidRequestError(APIStatusError):
    """400 or 422: the request or the uploaded prefix cannot be used as it is."""


class AuthenticationError(APIStatusError):
    """401 or 403: the API key is missing, wrong or not allowed to do this."""


class UnknownTaskError(APIStatusError):
    """404: no task of this name, or no such version of it."""


class ConflictError(APIStatusError):
    """409 or 412: the task is not, or no longer, as this change needs it."""


class PayloadTooLargeError(APIStatusError):
    """413: the upload is over the server's size limit."""


class QueueFullError(APIStatusError):
    """429: too many requests wait already."""


class ServerError(APIStatusError):
    """5xx: the server failed."""


class UnavailableError(ServerError):
    """503: the server, or the store behind it, cannot answer now."""


_BY_STATUS: dict[int, type[APIStatusError]] = {
    400: InvalidRequestError,
    401: AuthenticationError,
    403: AuthenticationError,
    404: UnknownTaskError,
    409: ConflictError,
    412: ConflictError,
    413: PayloadTooLargeError,
    422: InvalidRequestError,
    429: QueueFullError,
    503: UnavailableError,
}


def status_error_class(status_code: int) -> type[APIStatusError]:
    """The class for an error status of prefixserve's."""
    return _BY_STATUS.get(status_code, ServerError if status_code >= 500 else APIStatusError)
