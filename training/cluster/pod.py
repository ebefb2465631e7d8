"""A stage inside a pod: the project's files come from the mounted ConfigMap, the results go to the store.

The environment says what to do: BIT_JOB (the job's name: we are in a pod), BIT_STORE (URL of the job's folder); BIT_PROJECT and
BIT_TERMINATION_LOG take the place of the mounted paths where those cannot be.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from training import receipt
from training.cluster.manifests import PROJECT
from training.data import remote

SMALL = ("*.png", "*.csv", "metrics.json")  # results beside the artifacts that a person wants back


def is_pod() -> bool:
    return "BIT_JOB" in os.environ


def prepare() -> None:
    """Copies the project's files into the working directory; several ranks may do so at once."""
    source = Path(os.environ.get("BIT_PROJECT", PROJECT))
    for path in source.rglob("*"):
        name = path.relative_to(source)
        if path.is_file() and not any(part.startswith("..") for part in name.parts):  # Kubernetes' own links
            name.parent.mkdir(parents=True, exist_ok=True)
            temporary = name.with_name(f".{name.name}.{os.getpid()}")
            shutil.copyfile(path, temporary)
            temporary.rename(name)


def deliver(stage: str, tenant: str | None) -> None:
    """Rank 0 uploads what the stage made and leaves the receipt's address and hash as the pod's last word."""
    if int(os.environ.get("RANK", 0)) != 0:
        return
    store, folder = os.environ["BIT_STORE"], receipt.folder(stage, tenant)
    made = receipt.read(stage, tenant)
    outputs = {}
    for name, artifact in made.outputs.items():
        path = Path(artifact.uri)
        outputs[name] = artifact.model_copy(update={"uri": f"{store}/{path.name}"})
        remote.upload(path, outputs[name].uri)
    for pattern in SMALL:
        for path in folder.glob(pattern):
            remote.upload(path, f"{store}/{path.name}")
    data = made.model_copy(update={"outputs": outputs}).model_dump_json(indent=2).encode()
    url = f"{store}/{receipt.FILE}"
    remote.write(data, url)
    told = json.dumps({"receipt": url, "sha256": hashlib.sha256(data).hexdigest()})
    Path(os.environ.get("BIT_TERMINATION_LOG", "/dev/termination-log")).write_text(told)
