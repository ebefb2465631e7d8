"""Everything the service says no with, and the one mapping to HTTP.

ServiceError
├── BadRequest          400  not a picture, not the protocol's JSON, the wrong shape
├── Unauthorized        401  no key, or one that nobody has
├── Forbidden           403  the key is another tenant's
├── NotFound            404  no such path, tenant, version or alias
├── MethodNotAllowed    405
├── RequestTimeout      408  the body did not come in time
├── TooLarge            413  the body is over the limit
├── UnsupportedMedia    415  an encoding or media type that is not read
├── TooManyRequests     429  over the tenant's quota; Retry-After says when it isn't any more
├── Unsupported         501  asked for what this server does not do
├── Unavailable         503  queue full, draining, or nothing loaded yet; comes with Retry-After
└── DeadlineExceeded    504  the request's deadline passed before its answer was there

Messages are written for the caller. Anything else that goes wrong is 500 with no text from inside the process.
"""

import math

Headers = list[tuple[bytes, bytes]]


class ServiceError(Exception):
    status = 500

    def __init__(self, message: str, *headers: tuple[bytes, bytes]) -> None:
        super().__init__(message)
        self.headers: Headers = list(headers)


class BadRequest(ServiceError):
    status = 400


class Unauthorized(ServiceError):
    status = 401

    def __init__(self, message: str) -> None:
        super().__init__(message, (b"www-authenticate", b"Bearer"))


class Forbidden(ServiceError):
    status = 403


class NotFound(ServiceError):
    status = 404


class MethodNotAllowed(ServiceError):
    status = 405

    def __init__(self, message: str, allowed: str) -> None:
        super().__init__(message, (b"allow", allowed.encode()))


class RequestTimeout(ServiceError):
    status = 408


class TooLarge(ServiceError):
    status = 413


class UnsupportedMedia(ServiceError):
    status = 415


class _Later(ServiceError):
    """after_s: seconds until another try makes sense; told in whole seconds, RFC 9110 section 10.2.3."""

    def __init__(self, message: str, after_s: float = 1.0, *headers: tuple[bytes, bytes]) -> None:
        super().__init__(message, (b"retry-after", str(max(1, math.ceil(after_s))).encode()), *headers)


class TooManyRequests(_Later):
    status = 429


class Unsupported(ServiceError):
    status = 501


class Unavailable(_Later):
    status = 503


class DeadlineExceeded(ServiceError):
    status = 504


class Refused(Exception):
    """A version that must not be served; the reason goes to the API, the log and MLflow."""
