"""The chart as helm renders it, and what the Prometheus operator makes of its monitor and rules."""

import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests import clusters

CHART = Path(__file__).parents[2] / "charts/inference"
Objects = dict[str, dict[str, Any]]


def render(bin_folder: Path, release: str, namespace: str, *values: str) -> Objects:
    """kind → object. values: as for `helm --set`."""
    command = [bin_folder / "helm", "template", release, CHART, "--namespace", namespace]
    command += [part for value in values for part in ("--set", value)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {one["kind"]: one for one in yaml.safe_load_all(text) if one}


def unpacked() -> Path:
    """The kit's programs: helm among them."""
    done = subprocess.run([clusters.KIT / "cluster", "unpack"], check=True, capture_output=True, text=True)
    return Path(done.stdout.strip())


def scrape(objects: Objects, namespace: str, target: str) -> dict[str, Any]:
    """The ServiceMonitor as an entry of scrape_configs, for one pod at `target`, with the labels that the operator adds."""
    [endpoint] = objects["ServiceMonitor"]["spec"]["endpoints"]
    service = objects["Service"]["metadata"]["name"]
    relabelings = [
        {"action": r["action"], "target_label": r["targetLabel"], "replacement": r["replacement"]}
        for r in endpoint.get("relabelings", [])
    ]
    labels = {"namespace": namespace, "service": service, "pod": f"{service}-0"}
    return {
        "job_name": f"serviceMonitor/{namespace}/{service}/0",
        "metrics_path": endpoint["path"],
        "scrape_interval": endpoint["interval"],
        "static_configs": [{"targets": [target], "labels": labels}],
        "relabel_configs": relabelings,
    }


def rules(objects: Objects, path: Path) -> Path:
    """The PrometheusRule as a file of rules."""
    path.write_text(yaml.safe_dump(objects["PrometheusRule"]["spec"]))
    return path


def triggers(objects: Objects) -> dict[str, tuple[str, float]]:
    """Name of each trigger → (query, threshold per replica)."""
    found = objects["ScaledObject"]["spec"]["triggers"]
    return {one["name"]: (one["metadata"]["query"], float(one["metadata"]["threshold"])) for one in found}
