"""The files in k8s/ as templates: YAML in, patched objects out. Never text: what is patched is an object, and it is checked.

Every key of a manifest is held against the types of the Kubernetes and Kubeflow clients, so that a misspelt one is refused here,
by name, and not pruned silently by the cluster.
"""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from training.config import ClusterConfig, NodesConfig
from training.engine import store
from training.errors import UserError

Object = dict[str, Any]
FOLDER = Path("k8s")
MAX_NAME = 50  # pods and Services are called {job}-worker-{i}, and a Service's name ends at 63 characters
PROJECT = "/etc/bit"  # where pods find the files of the project


class ManifestError(UserError):
    """A manifest that the cluster would refuse or misunderstand; the message names the key and the choices."""


@dataclass(frozen=True)
class Pool:
    """A kind of node: how its pods find it, what counts its devices (None: the processor), how many a pod takes (None: any)."""

    node_selector: Mapping[str, str]
    tolerations: tuple[str, ...]
    resource: str | None
    template: str
    devices: int | None = None


# A new pool is a row; labels and taints are those of k8s/queues/queues.yaml.
POOLS = {
    "gpu": Pool({"cloud.google.com/gke-nodepool": "gpu"}, ("nvidia.com/gpu",), "nvidia.com/gpu", ""),
    "gpu-spot": Pool(
        {"cloud.google.com/gke-nodepool": "gpu-spot"},
        ("nvidia.com/gpu", "cloud.google.com/gke-spot"),
        "nvidia.com/gpu",
        "",
    ),
    "tpu": Pool(
        {
            "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
            "cloud.google.com/gke-tpu-topology": "2x4",
        },
        ("google.com/tpu",),
        "google.com/tpu",
        "-tpu",
        8,
    ),
    "cpu": Pool({}, (), None, ""),
}


@dataclass(frozen=True)
class Order:
    """What one job is to do: stage, tenant, the files that it reads (path from the project's root → text) and its name.

    checkpoints: the folder of its checkpoints, of which jobs share one that lead to the same result; default: the job's own.
    """

    name: str
    stage: str
    tenant: str | None
    files: Mapping[str, str]
    checkpoints: str = ""

    @property
    def training(self) -> str:
        """The name of the training that the job goes on with: that of its folder of checkpoints."""
        return self.checkpoints or self.name


def render(order: Order, cluster: ClusterConfig, root: Path = Path()) -> list[Object]:
    """The ConfigMap and the PyTorchJob of an order, from the stage's file in k8s/. Raises ManifestError."""
    if cluster.image is None or cluster.store is None:
        lacking = "image" if cluster.image is None else "store"
        raise ManifestError(f"cluster.{lacking} is not set: add it to params.yaml, section cluster.")
    if not re.search(r"^localhost/[^@:]+:(?!latest$)|@sha256:[0-9a-f]{64}$", cluster.image):
        raise ManifestError(
            f"cluster.image={cluster.image!r} is not named by its digest, and a tag may be other code when a pod is made anew: "
            "NAME@sha256:…, as `docker push` prints it; localhost/NAME:TAG for an image that only the nodes have."
        )
    if len(order.name) > MAX_NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", order.name):
        raise ManifestError(f"job name {order.name!r}: at most {MAX_NAME} of a-z, 0-9 and -, beginning with a letter.")
    nodes = cluster.nodes(order.stage)
    pool = POOLS[nodes.pool]
    if pool.devices not in (None, nodes.devices):
        raise ManifestError(
            f"cluster.{order.stage}.devices={nodes.devices}: a host of the pool {nodes.pool} has {pool.devices}, all of one pod. "
            f"Set {pool.devices}."
        )
    suffix = pool.template if order.stage == "pretrain" else ""
    path = root / FOLDER / f"{order.stage}{suffix}.yaml"
    config_map, job = read(path)
    for template in (config_map, job):
        check(template, str(path))
    _fill_config_map(config_map, order)
    _fill_job(job, order, cluster, nodes)
    for made in (config_map, job):
        check(made, str(path))
    return [config_map, job]


def read(path: Path) -> list[Object]:
    """The ConfigMap and the PyTorchJob of a file in k8s/."""
    try:
        found = {made["kind"]: made for made in yaml.safe_load_all(path.read_text())}
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise ManifestError(f"{path} is not a file of Kubernetes objects: {error}") from None
    if set(found) != {"ConfigMap", "PyTorchJob"}:
        raise ManifestError(f"{path} must hold one ConfigMap and one PyTorchJob; it holds {', '.join(sorted(found))}.")
    return [found["ConfigMap"], found["PyTorchJob"]]


def _fill_config_map(config_map: Object, order: Order) -> None:
    config_map["metadata"]["name"] = order.name
    config_map["metadata"].pop("namespace", None)  # the file's own; where the order goes is the cluster's matter
    config_map["metadata"].setdefault("labels", {})["bit/stage"] = order.stage
    config_map["data"] = {_key(path): text for path, text in order.files.items()}


def _fill_job(job: Object, order: Order, cluster: ClusterConfig, nodes: NodesConfig) -> None:
    pool = POOLS[nodes.pool]
    labels = {"bit/stage": order.stage, "bit/tenant": order.tenant or "upstream", "bit/job": order.name}
    labels |= {"bit/training": order.training}
    by_hand = job["metadata"]["name"]
    job["metadata"]["name"] = order.name
    job["metadata"].pop("namespace", None)
    job["metadata"].setdefault("labels", {}).update(labels)
    if cluster.queue is None:
        job["metadata"]["labels"].pop("kueue.x-k8s.io/queue-name", None)
    else:
        job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = cluster.queue
    spec = job["spec"]
    spec["nprocPerNode"] = str(nodes.devices)
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    worker["replicas"] = nodes.workers
    if "elasticPolicy" in spec:
        spec["elasticPolicy"]["maxReplicas"] = nodes.workers
    elif nodes.workers > 1:
        raise ManifestError(
            f"cluster.{order.stage}.workers={nodes.workers}: pool {nodes.pool!r} is one host, so workers must be 1. For "
            "slices of several hosts edit and apply k8s/pretrain-tpu-multihost.yaml."
        )
    template = worker["template"]
    template.setdefault("metadata", {}).setdefault("labels", {}).update(labels)
    pod = template["spec"]
    selector = dict(pool.node_selector) if cluster.labels == "gke" or not pool.resource else {"bit/pool": nodes.pool}
    pod["nodeSelector"] = dict(nodes.node_selector) or selector
    pod["tolerations"] = [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in pool.tolerations]
    container = next(one for one in pod["containers"] if one["name"] == "pytorch")
    container["image"] = cluster.image
    command = container.get("command") or []
    if "training" not in command:
        raise ManifestError(f"the container's command is {command}; it must start a stage, as torchrun -m training …")
    at = command.index("training") + 1
    container["command"] = [*command[:at], order.stage, *([order.tenant] if order.tenant else [])]
    given = next((one.get("value") for one in container.get("env", []) if one["name"] == store.ENV), None)
    values = {
        store.ENV: f"{(given or store.DEFAULT).removesuffix(f'/{by_hand}')}/{order.training}",
        "BIT_JOB": order.name,
        "BIT_STORE": f"{cluster.store}/{order.name}",
        "BIT_IMAGE": cluster.image,
        "BIT_POOL": nodes.pool,
    }
    container["env"] = [one for one in container.get("env", []) if one["name"] not in values] + [
        {"name": name, "value": value} for name, value in values.items()
    ]
    _fill_resources(container.setdefault("resources", {}), nodes, pool)
    for volume in pod.get("volumes", []):
        if "configMap" in volume:
            volume["configMap"]["name"] = order.name
            volume["configMap"]["items"] = [{"key": _key(path), "path": path} for path in order.files]


def _fill_resources(resources: Object, nodes: NodesConfig, pool: Pool) -> None:
    for kind in ("requests", "limits"):
        given = resources.setdefault(kind, {})
        for device in {row.resource for row in POOLS.values() if row.resource}:
            given.pop(device, None)
        given |= {"cpu": nodes.cpu, "memory": nodes.memory}
    if pool.resource:
        resources["limits"][pool.resource] = str(nodes.devices)


def _key(path: str) -> str:
    """A ConfigMap's key cannot hold a slash: runs/pack/upstream/receipt.json → runs.pack.upstream.receipt.json."""
    return path.replace("/", ".")


def check(made: Object, where: str) -> None:
    """Raises ManifestError at the first key that the object's type does not have, or value that is not of its type."""
    kinds = {"ConfigMap": "V1ConfigMap", "PyTorchJob": "KubeflowOrgV1PyTorchJob"}
    if made.get("kind") not in kinds:
        raise ManifestError(f"{where}: kind {made.get('kind')!r} is not one of {', '.join(kinds)}.")
    _check_type(made, kinds[made["kind"]], f"{where}: {made['kind']}")
    if made["kind"] == "PyTorchJob":
        roles = made.get("spec", {}).get("pytorchReplicaSpecs") or {}
        if unknown := set(roles) - {"Master", "Worker"}:
            raise ManifestError(f"{where}: role {min(unknown)!r} is not one of Master, Worker.")
        if "Worker" not in roles:
            raise ManifestError(f"{where}: spec.pytorchReplicaSpecs has no Worker.")
        if roles.get("Master", {}).get("replicas", 1) != 1:
            raise ManifestError(f"{where}: Master has {roles['Master']['replicas']} replicas; there can be only 1.")
        for role, told in roles.items():
            containers = told.get("template", {}).get("spec", {}).get("containers") or []
            names = [container.get("name", "one without a name") for container in containers]
            if "pytorch" not in names:
                raise ManifestError(
                    f"{where}: {role} has no container named pytorch, only {', '.join(names) or 'none'}; "
                    "the operator looks for this name."
                )
            for container in containers:
                _check_resources(container.get("resources", {}), f"{where}: {role}")


def _check_resources(resources: Object, where: str) -> None:
    known = ("cpu", "memory", "ephemeral-storage", *sorted({row.resource for row in POOLS.values() if row.resource}))
    for given in resources.values():
        for name in given if isinstance(given, dict) else ():
            if name not in known:
                raise ManifestError(f"{where} asks for resource {name!r}: {_choices(name, known)}")


def _check_type(value: Any, kind: str, where: str) -> None:
    """kind: a type as the clients' models spell it: str, int, list[V1Container], dict(str, str), V1PodSpec, …"""
    if value is None or kind in ("object", "datetime"):
        return
    if inner := re.fullmatch(r"[Ll]ist\[(.*)\]", kind):
        if not isinstance(value, list):
            raise ManifestError(f"{where} must be a list; it is {json.dumps(value)}.")
        for index, item in enumerate(value):
            _check_type(item, inner[1], f"{where}[{index}]")
    elif inner := re.fullmatch(r"[Dd]ict\(str, (.*)\)", kind):
        if not isinstance(value, dict):
            raise ManifestError(f"{where} must be a mapping; it is {json.dumps(value)}.")
        for key, item in value.items():
            _check_type(item, inner[1], f"{where}.{key}")
    elif kind in ("str", "int", "bool", "float"):
        types: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "bool": (bool,), "float": (int, float)}
        if not isinstance(value, types[kind]):
            raise ManifestError(f"{where} must be of type {kind}; it is {json.dumps(value)}.")
    else:
        model = _model(kind)
        keys = {json_key: model.openapi_types[name] for name, json_key in model.attribute_map.items()}
        if not isinstance(value, dict):
            raise ManifestError(f"{where} must be a mapping; it is {json.dumps(value)}.")
        for key, item in value.items():
            if key not in keys:
                raise ManifestError(f"{where}: {key!r} is not a key here: {_choices(key, keys)}")
            _check_type(item, keys[key], f"{where}.{key}")


def _model(kind: str) -> Any:
    for package in ("kubernetes.client", "kubeflow.training.models"):
        if found := getattr(import_module(package), kind, None):
            return found
    raise ManifestError(f"type {kind} is in neither client")


def _choices(given: str, known: Any) -> str:
    near = difflib.get_close_matches(given, list(known), 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}Choices: {', '.join(sorted(known))}."
