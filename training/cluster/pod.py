"""A stage inside a pod: the project's files come from the mounted ConfigMap, the results go to the store.

The environment says what to do: BIT_JOB (the job's name: we are in a pod), BIT_STORE (URL of the job's folder); BIT_PROJECT and
BIT_TERMINATION_LOG take the place of the mounted paths where those cannot be.

Who starts again what failed: torchrun the ranks that lost another one, at once; the kubelet the container, for every other error,
after growing pauses and `backoffLimit` times at most; the operator a pod that was deleted or whose node is gone, always.
"""

import atexit
import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training import receipt
from training.cluster.manifests import PROJECT
from training.data import remote
from training.errors import UserError

PLOTS = ("*.png", "*.csv")  # results beside the artifacts that a person wants back
PROJECT_HASH = "project"  # key of a receipt's details: the files that the job was given
WORDS = "error.txt"  # in the job's folder of the store: why it failed, for those who come when its pods are gone


def is_pod() -> bool:
    return "BIT_JOB" in os.environ


def prepare() -> None:
    """Copies the project's files into the working directory; several ranks may do so at once."""
    for name, data in _project().items():
        name.parent.mkdir(parents=True, exist_ok=True)
        temporary = name.with_name(f".{name.name}.{os.getpid()}")
        temporary.write_bytes(data)
        temporary.rename(name)


def delivered() -> bool:
    """Whether this job's receipt is in the store: a pod that is made anew after the end has nothing left to do.

    Not where the job was edited and applied again under its old name.
    """
    url, found = _delivered()
    if not found:
        return False
    print(f"{url} is there: this job has ended well before")
    _say(json.dumps({"receipt": url, "sha256": hashlib.sha256(found.encode()).hexdigest()}))
    return True


def wait_for_delivery() -> None:
    """All other ranks wait for rank 0: the operator ends a job, and its other pods, with the first one that ends well."""
    while int(os.environ.get("RANK", 0)) != 0 and not _delivered()[1]:
        time.sleep(5)


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
    for pattern in (*PLOTS, "metrics.json"):
        for path in folder.glob(pattern):
            remote.upload(path, f"{store}/{path.name}")
    details = made.details | {PROJECT_HASH: _project_hash()}
    data = made.model_copy(update={"outputs": outputs, "details": details}).model_dump_json(indent=2).encode()
    url = f"{store}/{receipt.FILE}"
    remote.write(data, url)
    told = json.dumps({"receipt": url, "sha256": hashlib.sha256(data).hexdigest()})
    _say(told)


@contextmanager
def last_words() -> Iterator[None]:
    """An error that ends the program becomes the pod's last word. torchrun, which would start it again at once, is ended too."""
    try:
        yield
    except Exception as error:
        from training.engine.distributed import RankError  # torch takes seconds, which no other command should wait

        if isinstance(error, RankError):
            raise
        words = str(error) if isinstance(error, UserError) else "".join(traceback.format_exception(error)[-8:])
        _say(words)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            atexit.register(os.kill, os.getppid(), signal.SIGTERM)  # when the error is printed
        try:
            remote.write(words.encode(), f"{os.environ['BIT_STORE']}/{WORDS}")
        except (OSError, ValueError) as unreachable:  # the store may be what failed; the pod's status has the words
            print(f"{os.environ['BIT_STORE']} does not take the error: {unreachable}", file=sys.stderr)
        raise


def _delivered() -> tuple[str, str]:
    """Address and text of this job's receipt; no text where there is none, or none of the same files."""
    url = f"{os.environ['BIT_STORE']}/{receipt.FILE}"
    found = remote.text(url) or ""
    try:
        made = receipt.Receipt.model_validate_json(found)
    except ValueError:  # none, or a damaged one, in whose place a new one comes
        return url, ""
    return url, found if made.details.get(PROJECT_HASH) == _project_hash() else ""


def _project() -> dict[Path, bytes]:
    """The project's files as they are mounted, by their names below its root."""
    # A mounted ConfigMap is a folder of links, to files and to folders, into the folder `..data`.
    source = Path(os.environ.get("BIT_PROJECT", PROJECT)) / "..data"
    return {path.relative_to(source): path.read_bytes() for path in sorted(source.rglob("*")) if path.is_file()}


def _project_hash() -> str:
    return receipt.hash_of(*(f"{name}\0{data.hex()}" for name, data in _project().items()))


def _say(words: str) -> None:
    """The container's termination message, of which the API keeps 4096 bytes."""
    path = Path(os.environ.get("BIT_TERMINATION_LOG", "/dev/termination-log"))
    path.write_bytes(words.encode()[-4096:])
