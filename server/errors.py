"""What the server itself refuses; the store and the engine have errors of their own."""


class ServerError(Exception):
    """Base of this module's errors; its text is written for the end user."""


class StartupError(ServerError):
    """The server cannot start as it is set up."""


class InvalidRequestError(ServerError):
    """The request cannot be carried out as it is."""


class AuthenticationError(ServerError):
    """The request comes without an API key that is good."""


class ForbiddenError(ServerError):
    """The caller may not do this."""


class DrainingError(ServerError):
    """The server is shutting down and takes no new work."""
