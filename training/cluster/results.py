"""What a job left in the store: its receipt, checked and written where the stage's own run would have written it."""

import hashlib
import json
import sys
from typing import Any

import fsspec

from training import receipt
from training.cluster.jobs import ClusterError, Object
from training.cluster.pod import PLOTS
from training.config import Config
from training.data import remote


class LostReceipt(ClusterError):
    """The receipt of a job that succeeded is not there, or damaged: only running the job again brings it back."""


def store_of(config: Config, job: Object) -> str:
    """URL of the folder of a job's results: what the job itself says, where it is still there."""
    roles = job.get("spec", {}).get("pytorchReplicaSpecs", {})
    for role in roles.values():
        for container in role["template"]["spec"]["containers"]:
            for one in container.get("env", []):
                if one["name"] == "BIT_STORE" and one.get("value"):
                    return str(one["value"])
    return f"{config.cluster.store}/{job['metadata']['name']}"


def collect(config: Config, pods: list[Object], job: Object, stage: str, tenant: str | None) -> None:
    """The receipt of a job that succeeded, into the stage's folder; checked against the hash that its pod left, if one did.

    The run in MLflow gets the job's uid, which its pods could not know. Raises LostReceipt for a receipt that is not there or not
    what the pod wrote, ClusterError where the store does not answer.
    """
    name, uid = job["metadata"]["name"], job["metadata"].get("uid")
    url, expected = f"{store_of(config, job)}/{receipt.FILE}", None
    for pod in pods:
        for status in pod.get("status", {}).get("containerStatuses") or ():
            message = ((status.get("state") or {}).get("terminated") or {}).get("message") or ""
            if message.startswith('{"receipt"'):
                told = json.loads(message)
                url, expected = told["receipt"], told["sha256"]
    again = "Submit again with --retry."
    try:
        with remote.asking(url):
            fs, path = fsspec.core.url_to_fs(url)
            data = fs.cat_file(path)
    except FileNotFoundError:
        raise LostReceipt(f"{name} succeeded, but its receipt {url} is not there any more. {again}") from None
    except (OSError, ValueError) as error:
        raise ClusterError(f"{name} succeeded, but its receipt {url} cannot be read now: {error}") from error
    if expected not in (None, hashlib.sha256(data).hexdigest()):
        raise LostReceipt(f"{url} is not what the pod wrote: it was damaged or replaced. {again}")
    try:
        made = receipt.Receipt.model_validate_json(data)
    except ValueError:
        raise LostReceipt(f"{url} is no receipt: it was damaged or replaced. {again}") from None
    folder = receipt.folder(stage, tenant)
    folder.mkdir(parents=True, exist_ok=True)
    for small in (found for kind in PLOTS for found in fs.glob(path.replace(receipt.FILE, kind))):
        target = folder / small.rpartition("/")[2]
        temporary = target.with_name(f".{target.name}.tmp")
        temporary.write_bytes(fs.cat_file(small))
        temporary.rename(target)
    details: dict[str, Any] = made.details | {"job": name}
    if uid:
        details["job_uid"] = uid
        if made.run_id:
            from training import tracking  # MLflow takes seconds, which a detached submission should not wait

            if problem := tracking.note(config.tracking_uri, made.run_id, {"k8s.job_uid": uid}):
                print(f"the run in MLflow does not get its job's uid: {problem}", file=sys.stderr)
    made.model_copy(update={"details": details}).write(folder)
