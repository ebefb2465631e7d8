"""What holds for both charts: documents, scenarios, and the API server's word on every object."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from charts.readme import documented, leaves, readme
from tests.charts.helm import CHARTS, helm, manifests, pod_of, scenarios
from tests.clusters import Cluster

NAMES = sorted(chart.parent.name for chart in CHARTS.glob("*/Chart.yaml"))
CASES = [pytest.param(name, case, id=f"{name}-{case.stem}") for name in NAMES for case in scenarios(name)]


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_is_what_the_values_say(name: str) -> None:
    written = (CHARTS / name / "README.md").read_text()
    assert written == readme(CHARTS / name), f"python -m charts.readme charts/{name}"


@pytest.mark.parametrize("name", NAMES)
def test_every_value_says_what_it_does(name: str) -> None:
    text = (CHARTS / name / "values.yaml").read_text()
    told = documented(text)
    assert [path for path, _ in leaves(yaml.safe_load(text), told) if path not in told] == []


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_scenario_passes_lint(name: str, case: Path) -> None:
    done = helm("lint", "--strict", CHARTS / name, "--values", case)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("name", "case"), CASES)
def test_the_api_server_takes_every_object(name: str, case: Path, cluster: Cluster) -> None:
    rendered = manifests(name, case.name.removesuffix("-values.yaml"))
    said = cluster.kubectl(
        "apply", "--namespace", "bit", "--dry-run=server", "--validate=strict", "-f", "-", stdin=rendered
    )
    objects = [one for one in yaml.safe_load_all(rendered) if one]
    assert said.count("(server dry run)") == len(objects)
    assert "Warning" not in said  # of Pod Security restricted, or of a field that is going away
    for one in objects:
        if one["kind"] in ("Deployment", "StatefulSet", "Job", "CronJob"):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "asked"}, "spec": pod_of(one)}
            pod["spec"] = {**pod_of(one), "serviceAccountName": "default"}
            cluster.kubectl("create", "--namespace", "bit", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump(pod))


def test_the_readmes_command_writes_the_readme(tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", CHARTS / "inference", tmp_path / "chart"], check=True)
    (tmp_path / "chart" / "README.md").unlink()
    command = [sys.executable, "-m", "charts.readme", str(tmp_path / "chart")]
    subprocess.run(command, check=True, cwd=CHARTS.parent)
    assert (tmp_path / "chart" / "README.md").read_text() == (CHARTS / "inference" / "README.md").read_text()
