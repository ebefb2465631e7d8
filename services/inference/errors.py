"""Everything the service says no with, and the one mapping to HTTP.

ServiceError
├── BadRequest          400  not a picture, not the protocol's JSON, the wrong shape
├── NotFound            404  no such path, tenant, version or alias
├── MethodNotAllowed    405
├── TooLarge            413  the body is over the limit
├── Unsupported         501  asked for what this server does not do
├── Unavailable         503  queue full, draining, or nothing loaded yet; comes with Retry-After
└── DeadlineExceeded    504  the request's deadline passed before its turn came

Messages are written for the caller. Anything else that goes wrong is 500 with no text from inside the process.
"""


class ServiceError(Exception):
    status = 500
    headers: tuple[tuple[bytes, bytes], ...] = ()


class BadRequest(ServiceError):
    status = 400


class NotFound(ServiceError):
    status = 404


class MethodNotAllowed(ServiceError):
    status = 405


class TooLarge(ServiceError):
    status = 413


class Unsupported(ServiceError):
    status = 501


class Unavailable(ServiceError):
    status = 503
    headers = ((b"retry-after", b"1"),)


class DeadlineExceeded(ServiceError):
    status = 504


class Refused(Exception):
    """A version that must not be served; the reason goes to the API, the metrics, the log and MLflow."""
