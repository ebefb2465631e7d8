"""What a job left in the store: its receipt, checked and written where the stage's own run would have written it."""

import hashlib
import json
import sys
from typing import Any

import fsspec

from training import receipt
from training.cluster.jobs import ClusterError, Object
from training.config import Config


def collect(config: Config, pods: list[Object], job: Object, stage: str, tenant: str | None) -> None:
    """The receipt of a job that succeeded, into the stage's folder; checked against the hash that its pod left, if one did.

    The run in MLflow gets the job's uid, which its pods could not know. Raises ClusterError for a receipt that is not there or
    not what the pod wrote.
    """
    name, uid = job["metadata"]["name"], job["metadata"].get("uid")
    url, expected = f"{config.cluster.store}/{name}/{receipt.FILE}", None
    for pod in pods:
        for status in pod.get("status", {}).get("containerStatuses") or ():
            message = ((status.get("state") or {}).get("terminated") or {}).get("message") or ""
            if message.startswith("{"):
                told = json.loads(message)
                url, expected = told["receipt"], told["sha256"]
    try:
        fs, path = fsspec.core.url_to_fs(url)
        data = fs.cat_file(path)
    except (OSError, ValueError) as error:
        raise ClusterError(f"{name} succeeded, but its receipt {url} cannot be read: {error}") from error
    if expected not in (None, hashlib.sha256(data).hexdigest()):
        raise ClusterError(f"{url} is not what the pod wrote: it was damaged or replaced. Submit again with --retry.")
    made = receipt.Receipt.model_validate_json(data)
    folder = receipt.folder(stage, tenant)
    folder.mkdir(parents=True, exist_ok=True)
    for small in fs.glob(path.replace(receipt.FILE, "*.png")):
        (folder / small.rpartition("/")[2]).write_bytes(fs.cat_file(small))
    details: dict[str, Any] = made.details | {"job": name}
    if uid:
        details["job_uid"] = uid
        if made.run_id:
            from training import tracking  # MLflow takes seconds, which a detached submission should not wait

            if problem := tracking.note(config.tracking_uri, made.run_id, {"k8s.job_uid": uid}):
                print(f"the run in MLflow does not get its job's uid: {problem}", file=sys.stderr)
    made.model_copy(update={"details": details}).write(folder)
