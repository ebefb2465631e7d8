"""docs/operations.md as the commands that it holds, and where the tests run each one that talks to a cluster or a database."""

import re
import subprocess
from pathlib import Path

from tests import clusters

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/operations.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL))
LINES = [line.partition("  #")[0].strip() for block in BLOCKS for line in block.splitlines()] + INLINE

NODE, PLANE = "operations/test_node.py", "operations/test_plane.py"

# Beginning of a command → the test that runs it, below tests/.
WHERE = {
    "kubectl create namespace bit": NODE,
    "kubectl --namespace bit create secret generic inference-tenants": NODE,
    "helm install inference": NODE,
    "helm test inference": NODE,
    "helm upgrade inference": NODE,
    "helm rollback inference --namespace bit": NODE,
    "kubectl --namespace bit describe pod": NODE,
    "kubectl --namespace bit get pods": NODE,
    "kubectl --namespace bit logs --selector": NODE,
    "kubectl --namespace bit get scaledobject,hpa": PLANE,
    "kubectl --namespace bit get secret inference-tenants": PLANE,
    "kubectl --namespace mlflow patch secret mlflow-admin": PLANE,
    "kubectl --namespace mlflow rollout restart deployment/mlflow": PLANE,
    "kubectl --namespace mlflow scale deployment/mlflow --replicas=0": PLANE,
    "kubectl --namespace mlflow get cronjobs,jobs": PLANE,
    "kubectl --namespace mlflow scale deployment/mlflow --replicas=1": PLANE,
    "pg_restore": "charts/test_mlflow_server.py",
    "helm diff upgrade": "nobody: a plugin that is not part of helm",
    "kubectl --namespace bit logs POD --previous": "nobody: POD is yours, and needs a container that has ended",
}
FRAGMENTS = ("helm upgrade", "kubectl --namespace bit logs")  # the text's way to name a command


def operating() -> list[str]:
    """Every command of helm, kubectl and pg_restore, once, in the order of the text."""
    found = [line for line in LINES if line.split()[0] in ("helm", "kubectl", "pg_restore") and line not in FRAGMENTS]
    return list(dict.fromkeys(found))


def command(start: str) -> str:
    """The first command that begins so, as the runbook has it. Raises KeyError for one that WHERE does not name."""
    WHERE[start]
    return next(line for line in operating() if line.startswith(start))


def run(start: str, cluster: clusters.Cluster, folder: Path) -> str:
    """Types a command of the runbook into a shell in `folder`, with the cluster's kubeconfig; what it said."""
    line = ["sh", "-ec", command(start)]
    done = subprocess.run(
        line, env=cluster.environment, cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, f"{command(start)}\n{done.stdout}{done.stderr}"
    return done.stdout
