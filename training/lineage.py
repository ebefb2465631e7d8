"""Where a result comes from: commit, job and pod, hash of the data."""

import os
import subprocess
from pathlib import Path

import yaml


def git_commit() -> str:
    """The commit that the code is of. Pods have no .git: there BIT_GIT_COMMIT says it."""
    if commit := os.environ.get("BIT_GIT_COMMIT"):
        return commit
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def cluster_tags() -> dict[str, str]:
    """Which job, pod, node, pool and image a run comes from; the pod's manifest sets these (BIT_JOB, …). Empty anywhere else."""
    names = ("job", "pod", "pod_uid", "node", "pool", "image")
    return {f"k8s.{name}": os.environ[key] for name in names if (key := f"BIT_{name.upper()}") in os.environ}


def dvc_md5(path: Path) -> str:
    """DVC's hash of a tracked file or folder, read from its .dvc file; "untracked" where there is none."""
    pointer = path.with_name(f"{path.name}.dvc")
    if not pointer.is_file():
        return os.environ.get("BIT_DVC_MD5", "untracked")
    return str(yaml.safe_load(pointer.read_text())["outs"][0]["md5"])
