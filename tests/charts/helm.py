"""helm of the cluster kit, and what it renders as objects."""

import functools
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.clusters import KIT, ROOT

CHARTS = ROOT / "charts"
Object = dict[str, Any]


@functools.cache
def program() -> str:
    if not (KIT / "cluster").is_file():
        pytest.skip(f"no cluster kit at {KIT}; set BIT_K8S_KIT")
    unpack = [KIT / "cluster", "unpack"]
    return subprocess.run(unpack, check=True, stdout=subprocess.PIPE, text=True).stdout.strip() + "/helm"


def scenarios(chart: str) -> list[Path]:
    return sorted((CHARTS / chart / "ci").glob("*-values.yaml"))


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program(), *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120)


def manifests(chart: str, scenario: str = "default", **values: Any) -> str:
    """The rendered chart as text. values: name with `__` between its parts → value, over the scenario's."""
    given = [f"--set-json={name.replace('__', '.')}={json.dumps(value)}" for name, value in values.items()]
    file = CHARTS / chart / "ci" / f"{scenario}-values.yaml"
    done = helm("template", "bit", CHARTS / chart, "--namespace", "bit", "--values", file, *given)
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(chart: str, scenario: str = "default", **values: Any) -> dict[str, Object]:
    """Every object by `Kind` or, where there are several of it, `Kind/name`."""
    objects = [one for one in yaml.safe_load_all(manifests(chart, scenario, **values)) if one]
    kinds = [one["kind"] for one in objects]
    return {
        one["kind"] if kinds.count(one["kind"]) == 1 else f"{one['kind']}/{one['metadata']['name']}": one
        for one in objects
    }


def pod_of(workload: Object) -> Object:
    """The pod's spec of a Pod, Deployment, Job or CronJob."""
    spec = workload["spec"]
    spec = spec["jobTemplate"]["spec"] if workload["kind"] == "CronJob" else spec
    return spec if workload["kind"] == "Pod" else spec["template"]["spec"]


def environment(pod: Object) -> dict[str, Any]:
    """Variable → value, or where it comes from."""
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in pod["containers"][0]["env"]}
