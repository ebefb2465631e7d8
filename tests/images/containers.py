"""A container of one of the images, started by runc alone: read-only root, a user without a name, no capability, no engine."""

import json
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.images.build import buildah

USER = 12345  # neither root nor the image's own: any uid of 10000 or more must do


@contextmanager
def rootfs(image: str) -> Iterator[Path]:
    """The image's file system, mounted; what is written to it goes with it."""
    container = buildah("from", "--pull-never", image)
    try:
        yield Path(buildah("mount", container))
    finally:
        buildah("rm", container)


def configuration(image: str) -> dict[str, Any]:
    """The image's own settings: User, Env, Cmd, Labels, …"""
    return json.loads(buildah("inspect", "--type", "image", image))["Docker"]["config"]


def bundle(folder: Path, root: Path, image: str, command: Sequence[str], mounts: dict[Path, str]) -> Path:
    """An OCI bundle in `folder`. mounts: folder of this machine → its read-only place in the container."""
    config = configuration(image)
    (folder / "hosts").write_text("127.0.0.1 localhost bit\n")  # every engine gives one that knows the container's name
    mounts = mounts | {folder / "hosts": "/etc/hosts"}
    bound = [
        {"destination": to, "source": str(source), "type": "bind", "options": ["rbind", "ro"]}
        for source, to in mounts.items()
    ]
    shared = {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "nodev", "mode=1777"]}  # noqa: S108
    temporary = {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"]}  # noqa: S108
    spec = {
        "ociVersion": "1.0.2",
        "hostname": "bit",
        "process": {
            "user": {"uid": USER, "gid": USER},
            "args": list(command) or config["Cmd"],
            "env": config["Env"],
            "cwd": config["WorkingDir"],
            "capabilities": {name: [] for name in ("bounding", "effective", "inheritable", "permitted", "ambient")},
            "noNewPrivileges": True,
        },
        "root": {"path": str(root), "readonly": True},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            shared,
            temporary,
            *bound,
        ],
        # No network namespace: the test asks it on 127.0.0.1.
        "linux": {"namespaces": [{"type": name} for name in ("pid", "ipc", "uts", "mount")]},
    }
    (folder / "config.json").write_text(json.dumps(spec))
    return folder


def execute(folder: Path, command: Sequence[str]) -> int:
    """Runs a command inside the container that container(…, folder, …) started, as its user; its status."""
    runc = ["runc", "--root", str(folder / "runc")]
    [name] = [path.name for path in (folder / "runc").iterdir()]
    environment = [
        part for one in json.loads((folder / "config.json").read_text())["process"]["env"] for part in ("--env", one)
    ]
    done = subprocess.run([*runc, "exec", *environment, name, *command], capture_output=True, check=False, timeout=60)
    return done.returncode


@contextmanager
def container(
    image: str, folder: Path, *command: str, mounts: dict[Path, str] | None = None, environment: Sequence[str] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """The command (the image's own if none) as process 1 of a container; SIGTERM to the Popen reaches it. Output: folder/log."""
    folder.mkdir(exist_ok=True)
    name = f"bit-{uuid.uuid4().hex[:12]}"
    with rootfs(image) as root, (folder / "log").open("wb") as log:
        bundle(folder, root, image, command, mounts or {})
        spec = json.loads((folder / "config.json").read_text())
        spec["process"]["env"] += environment
        (folder / "config.json").write_text(json.dumps(spec))
        runc = [str(shutil.which("runc")), "--root", str(folder / "runc"), "run", "--bundle", str(folder), name]
        running = subprocess.Popen(runc, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            yield running
        finally:
            if running.poll() is None:
                running.send_signal(signal.SIGTERM)
                try:
                    running.wait(timeout=40)
                except subprocess.TimeoutExpired:
                    subprocess.run([runc[0], *runc[1:3], "kill", name, "KILL"], check=False)
                    running.wait(timeout=20)
