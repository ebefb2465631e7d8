"""Which errors pass by themselves, so that the same command is worth another try."""

import errno

import pytest
import requests
from mlflow.exceptions import MlflowException, RestException

from training.errors import is_outage


def met_by_mlflow(cause: Exception) -> Exception:
    """As MLflow's client reports what it met: with an error of its own, and status 500 whatever it was."""
    try:
        try:
            raise cause
        except Exception as met:
            raise MlflowException(f"API request failed: {met}")  # noqa: B904 (that is how MLflow does it)
    except MlflowException as error:
        return error


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ConnectionRefusedError(), True),
        (TimeoutError(), True),
        (requests.ConnectTimeout(), True),
        (requests.exceptions.ChunkedEncodingError(), True),
        (RestException({"error_code": "TEMPORARILY_UNAVAILABLE"}), True),
        (met_by_mlflow(requests.ConnectionError("refused")), True),
        (met_by_mlflow(PermissionError("denied")), False),
        (MlflowException("Detected out-of-date database schema"), False),
        (RestException({"error_code": "PERMISSION_DENIED"}), False),
        (requests.exceptions.SSLError("certificate verify failed"), False),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
    ],
    ids=repr,
)
def test_an_outage_is_what_passes_by_itself(error: Exception, passes: bool) -> None:
    assert is_outage(error) == passes
