"""Errors a client can see. Each has a code, an HTTP status, and says if a retry may help."""

from __future__ import annotations


class KvbatonError(Exception):
    """Base of every error that crosses the wire.

    `field` names the request field at fault, if one is; `retry_after_s` is set where waiting helps.
    """

    code = "internal_error"
    status = 500
    is_retryable = False

    def __init__(
        self, message: str, *, field: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s


class InvalidRequestError(KvbatonError):
    """The request itself is wrong: the same request will fail again."""

    code = "invalid_request"
    status = 400


class UnprocessableError(KvbatonError):
    """A field has the wrong type or lies outside its range."""

    code = "unprocessable"
    status = 422


class TooLargeError(KvbatonError):
    """The request is larger than a limit of the server."""

    code = "too_large"
    status = 413


class ForbiddenError(KvbatonError):
    """The sender has not shown that it may ask this."""

    code = "forbidden"
    status = 403


class NotFoundError(KvbatonError):
    """The model, request or route named does not exist."""

    code = "not_found"
    status = 404


class NotSupportedError(KvbatonError):
    """The server knows what is asked, and does not have it."""

    code = "not_supported"
    status = 501


class UnavailableError(KvbatonError):
    """No worker of a needed role is alive, or the server is shutting down."""

    code = "unavailable"
    status = 503
    is_retryable = True


class OverloadedError(KvbatonError):
    """The server refuses new work for now."""

    code = "overloaded"
    status = 429
    is_retryable = True


class DeadlineError(KvbatonError):
    """The deadline of the request passed before it finished."""

    code = "deadline_exceeded"
    status = 408


class CancelledRequestError(KvbatonError):
    """The request was cancelled by its client."""

    code = "cancelled"
    status = 499


class ProtocolError(KvbatonError):
    """Bytes that are not a message of this protocol, or an unsupported protocol version."""

    code = "protocol_error"
    status = 400


class ConnectionLostError(KvbatonError):
    """The peer went away before it answered."""

    code = "connection_lost"
    status = 502
    is_retryable = True


_BY_CODE: dict[str, type[KvbatonError]] = {
    cls.code: cls
    for cls in (
        KvbatonError,
        InvalidRequestError,
        UnprocessableError,
        TooLargeError,
        ForbiddenError,
        NotFoundError,
        NotSupportedError,
        UnavailableError,
        OverloadedError,
        DeadlineError,
        CancelledRequestError,
        ProtocolError,
        ConnectionLostError,
    )
}


def error_from_wire(
    code: str, message: str, field: str | None, retry_after_s: float | None
) -> KvbatonError:
    """The typed error for a code received from a peer; an unknown code gives the base class."""
    return _BY_CODE.get(code, KvbatonError)(message, field=field, retry_after_s=retry_after_s)
