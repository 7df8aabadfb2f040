"""A Python client for a prefixserve server, sync and async, and the command line."""

from clients._answers import Details, Generation, Health, ServerInfo, StreamToken, Task, Token
from clients._calls import Parameters
from clients._client import AsyncClient, Client
from clients._errors import (
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    ConfigurationError,
    GenerationError,
    InvalidRequestError,
    PayloadTooLargeError,
    PrefixFileError,
    PrefixServeError,
    QueueFullError,
    ServerError,
    UnavailableError,
    UnknownTaskError,
)

__all__ = [
    "APIConnectionError",
    "APIResponseError",
    "APIStatusError",
    "APITimeoutError",
    "AsyncClient",
    "AuthenticationError",
    "Client",
    "ConfigurationError",
    "Details",
    "Generation",
    "GenerationError",
    "Health",
    "InvalidRequestError",
    "Parameters",
    "PayloadTooLargeError",
    "PrefixFileError",
    "PrefixServeError",
    "QueueFullError",
    "ServerError",
    "ServerInfo",
    "StreamToken",
    "Task",
    "Token",
    "UnavailableError",
    "UnknownTaskError",
]
