"""What a person can mend. Every such error is one of these; `bit` prints its message and ends with its status.

UserError
├── ConfigError       config.py      params.yaml, --set, a receipt that is not there yet
├── SourceError       data/sources   pictures and tables that cannot be packed
├── PackError         pack.py        a dataset that was refused
├── DatasetError      data/shards    shards that are missing or damaged
├── RemoteError       data/remote    a file of the DVC remote that its hash does not fit
├── ArchError         models/zoo     an architecture that the table lacks
├── WeightsError      models/npz     a weights file that does not fit
├── CheckpointError   engine         a checkpoint of another training
├── BatchError        engine         a batch that cannot be cut into ranks and micro-batches
├── BudgetError       engine         a training that failed too often or took too long
├── DivergedError     engine         the loss is no longer finite
├── TrackingError     tracking.py    MLflow does not answer when its answer is needed, or refuses
├── OutageError       here           a server or store that does not answer now: status 1, to be tried again
├── ParityError       export.py      ONNX Runtime and torch disagree
├── ManifestError     cluster        a file in k8s/ that the cluster would refuse or misunderstand
├── ClusterError      cluster        the cluster cannot be reached, or refuses
│   └── JobError      submit.py      a job that failed: `bit` ends with its container's exit code
└── GateError         promote.py     a challenger that a gate holds back

Messages name the value, the choices and what to do next.
"""

from collections.abc import Iterator
from contextlib import contextmanager

# Kinds of errors that pass, by name: of the language, requests, botocore and aiohttp, which need not all be installed.
PASSING = {
    "ConnectionError",
    "TimeoutError",
    "Timeout",
    "HTTPClientError",
    "ClientConnectionError",
    "ClientPayloadError",
    "ChunkedEncodingError",
    "RetryError",
}
LASTING = {"BrokenPipeError", "SSLError", "ClientSSLError"}  # of these kinds, but they do not pass by themselves
BUSY = {408, 429, 500, 502, 503, 504}  # statuses of HTTP that pass


class UserError(ValueError):
    """Something that the person at the keyboard can mend. status: the exit status of `bit`."""

    status = 2


class OutageError(UserError):
    """What the same command, started again later, may find mended; pods that end with this status are started again."""

    status = 1


@contextmanager
def outages(what: str) -> Iterator[None]:
    """Errors of a server or store that does not answer now become OutageError; all others pass as they are."""
    try:
        yield
    except Exception as error:
        cause = _outage(error)
        if cause is None or isinstance(error, OutageError):
            raise
        raise OutageError(
            f"{what} does not answer: {reason(cause)}. Start the same command again when it does."
        ) from error


def is_outage(error: BaseException) -> bool:
    """Whether the error, or one that it was made from, says that a server is away, slow or busy."""
    return _outage(error) is not None


def reason(error: BaseException) -> str:
    """What went wrong, as one line: fsspec calls all that it cannot have not found, and says its name; servers send pages."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())[:500] or type(error).__name__
    return f"not found: {text}" if isinstance(error, FileNotFoundError) and error.errno is None else text


def _outage(error: BaseException | None) -> BaseException | None:
    """Of an error and those that it was made from the first that tells of an outage."""
    while error is not None:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if kinds & LASTING:
            return None
        if kinds & PASSING or _status(error) in BUSY:
            return error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def _status(error: BaseException) -> int:
    """The status of HTTP that an error of aiohttp, gcsfs, requests, botocore or MLflow tells, else 0."""
    if told := getattr(
        error, "get_http_status_code", None
    ):  # MLflow, whose client says 500 of all that it meets itself
        said = int(told())
        return said if said != 500 or type(error).__name__ == "RestException" else 0
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    for holder, name in ((error, "status"), (error, "code"), (response, "status_code")):
        if isinstance(status := getattr(holder, name, None), int):
            return status
    return 0
