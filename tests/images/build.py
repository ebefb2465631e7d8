"""The project's images, built without a Docker engine: buildah on a base made by debootstrap, wheels collected beforehand.

    python -m tests.images.build inference image.tar        (as root; inference, training-cpu or mlflow)

Base and images are kept in ${XDG_CACHE_HOME:-~/.cache}/bit-images; a target is built again when what it copies changed.
"""

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bit-images"
BASE = "localhost/bit-base:12"
TOOLS = ("buildah", "debootstrap", "runc")
COPIED = ("Dockerfile", ".dockerignore", "docker", "pyproject.toml", "README.md", "LICENSE", "services", "training")
REQUIREMENTS = ROOT / "docker" / "requirements"
LOCKS = {"inference": ("build", "services"), "training-cpu": ("build", "training"), "mlflow": ("build", "mlflow")}
TORCH = "torch==2.13.0"


def lacking() -> list[str]:
    """What this machine lacks to build and run images."""
    return [tool for tool in TOOLS if shutil.which(tool) is None] + ([] if os.geteuid() == 0 else ["root"])


@functools.cache
def storage() -> tuple[str, ...]:
    """buildah's options for where images are kept: by overlay where this machine can (a container is made at once, an image
    keeps what differs), else as plain folders, of which each is a whole copy.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as probe:
        lower, upper, work, merged = folders = [Path(probe, name) for name in ("lower", "upper", "work", "merged")]
        for folder in folders:
            folder.mkdir()
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        mount = ["mount", "-t", "overlay", "overlay", "-o", options, str(merged)]
        overlay = subprocess.run(mount, capture_output=True, check=False).returncode == 0
        if overlay:
            subprocess.run(["umount", str(merged)], check=True)
    driver = "overlay" if overlay else "vfs"
    return ("--root", str(CACHE / driver), "--runroot", str(CACHE / f"run-{driver}"), "--storage-driver", driver)


def buildah(*arguments: str) -> str:
    """Runs buildah on the storage of this module; its standard output."""
    done = subprocess.run(["buildah", *storage(), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"buildah {arguments[0]} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}"
        )
    return done.stdout.strip()


def exists(image: str) -> bool:
    command = ["buildah", *storage(), "inspect", "--type", "image", "--format", "{{.FromImageID}}", image]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@contextmanager
def alone() -> Iterator[None]:
    """One build at a time on this machine: each copies whole trees, and they share what is kept."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def base() -> str:
    """Debian 12 with python3 and venv, as an image."""
    if not exists(BASE):
        root = CACHE / "debian"
        shutil.rmtree(root, ignore_errors=True)
        packages = "--include=python3,python3-venv,ca-certificates"
        subprocess.run(
            ["debootstrap", "--variant=minbase", packages, "bookworm", str(root)], check=True, stdout=sys.stderr
        )
        for rubbish in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale"):
            shutil.rmtree(root / rubbish)
        container = buildah("from", "scratch")
        buildah("add", "--quiet", container, str(root), "/")
        buildah("commit", "--quiet", "--rm", container, BASE)
        shutil.rmtree(root)
    return BASE


def wheels(target: str) -> Path:
    """A folder with what the target's lock files name, as this machine's pip gets it. torch is the build that pip takes here.

    One folder for all: each file is told from others by version and hash, and what is there is not fetched again.
    """
    folder = CACHE / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    for lock in (REQUIREMENTS / f"{name}.txt" for name in LOCKS[target]):
        complete = folder / f".{lock.stem}-{digest_of([lock], TORCH)}"
        if complete.exists():
            continue
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--prefer-binary"]
        download += ["--no-build-isolation", "--dest", str(folder)]
        subprocess.run([*download, "--require-hashes", f"-r{lock}"], check=True, stdout=sys.stderr)
        if lock.stem == "training":
            subprocess.run([*download, TORCH], check=True, stdout=sys.stderr)
        complete.touch()
    return folder


def build(target: str, context: Path = ROOT, revision: str = "test") -> str:
    """Builds a target of the Dockerfile in `context`, unless an image of the same sources is there; the image's name."""
    image = f"localhost/bit-{target}:{digest_of([context / name for name in COPIED], revision, below=context)}"
    with alone():
        if exists(image):
            return image
        with ThreadPoolExecutor() as both:  # one waits for the network, the other for the processor
            ground, wheelhouse = both.submit(base), both.submit(wheels, target)
        arguments = [
            "bud", "--quiet", "--layers", "--isolation", "chroot", "--format", "docker", "--target", target,
            "--tag", image, "--build-arg", f"BASE={ground.result()}", "--build-arg", "PIP_NO_INDEX=1",
            "--build-arg", f"REVISION={revision}", "--build-arg", f"TORCH={TORCH}",
            "--build-context", f"wheels={wheelhouse.result()}", str(context),
        ]  # fmt: skip
        buildah(*arguments)
        return image


def save(image: str, archive: Path) -> Path:
    """The image as a docker archive, for a cluster's node or `docker load`."""
    buildah("push", "--quiet", image, f"docker-archive:{archive}:{image}")
    return archive


def digest_of(paths: Iterable[Path], *texts: str, below: Path = ROOT) -> str:
    """Hash of strings and of files and folders with their names below a folder."""
    digest = hashlib.sha256("\0".join(texts).encode())
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(below)}\0".encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    print(save(build(sys.argv[1]), Path(sys.argv[2])))
