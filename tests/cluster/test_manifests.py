"""The files in k8s/ on a real API server and the operator's webhook, under Pod Security `restricted`, on simulated pools."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from kubernetes.utils.quantity import parse_quantity

from tests.cluster.conftest import K8S
from tests.clusters import Cluster, wait_for
from tests.conftest import draw_folder
from training import receipt
from training.cluster.manifests import ManifestError, Object, Order, check, read, render
from training.cluster.orders import order
from training.config import ClusterConfig, Config, FinetuneConfig, NodesConfig
from training.data.dataset import Dataset

ROOT = K8S.parent
IMAGE = f"x@sha256:{'1' * 64}"
JOBS = ("pretrain", "pretrain-tpu", "pretrain-tpu-multihost", "finetune")
POOL_OF = {"pretrain": "gpu", "pretrain-tpu": "tpu", "pretrain-tpu-multihost": "tpu-slice", "finetune": "gpu"}


def slice_host(number: int) -> Object:
    """One host of a TPU slice 4x4, as GKE labels it; simulated like the kit's own nodes."""
    name, chips = f"tpu-slice-{number}", {"cpu": "112", "memory": "192Gi", "pods": "110", "google.com/tpu": "4"}
    labels = {
        "kubernetes.io/hostname": name,
        "topology.kubernetes.io/zone": "europe-west4-b",
        "cloud.google.com/gke-nodepool": "tpu-slice",
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    metadata = {"name": name, "annotations": {"kwok.x-k8s.io/node": "fake"}, "labels": labels}
    taints = [{"key": "google.com/tpu", "value": "present", "effect": "NoSchedule"}]
    status = {"capacity": chips, "allocatable": chips}
    return {"apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": {"taints": taints}, "status": status}


@pytest.fixture(scope="module", autouse=True)
def tpu_slice(prepared: Cluster) -> None:
    hosts = yaml.safe_dump_all([slice_host(number) for number in range(4)])
    prepared.kubectl("apply", "--server-side", "-f", "-", stdin=hosts)


def test_every_host_of_a_slice_knows_its_number_and_all_names() -> None:
    _, made = read(K8S / "pretrain-tpu-multihost.yaml")
    worker = made["spec"]["pytorchReplicaSpecs"]["Worker"]
    [container] = worker["template"]["spec"]["containers"]
    env = {one["name"]: one.get("value", one.get("valueFrom")) for one in container["env"]}
    names = [f"{made['metadata']['name']}-worker-{number}" for number in range(worker["replicas"])]
    assert env["TPU_WORKER_HOSTNAMES"].split(",") == names
    assert env["TPU_WORKER_ID"]["fieldRef"]["fieldPath"] == "metadata.labels['training.kubeflow.org/replica-index']"
    policy = made["spec"]["elasticPolicy"]
    assert policy["minReplicas"] == policy["maxReplicas"] == worker["replicas"]


@pytest.mark.parametrize("job", JOBS)
def test_a_job_is_admitted_and_lands_on_its_pool(prepared: Cluster, job: str) -> None:
    said = prepared.kubectl("apply", "--server-side", "-n", "bit", "-f", str(K8S / f"{job}.yaml"))
    assert "violate PodSecurity" not in said
    [name] = [made["metadata"]["name"] for made in read(K8S / f"{job}.yaml") if made["kind"] == "PyTorchJob"]

    def pods() -> list[Object]:
        selector = f"training.kubeflow.org/job-name={name}"
        return prepared.get("pods", "-n", "bit", "-l", selector)["items"]

    wait_for(lambda: bool(pods()) and all(pod["spec"].get("nodeName") for pod in pods()))
    assert {pod["spec"]["nodeName"].rpartition("-")[0] for pod in pods()} == {POOL_OF[job]}
    prepared.kubectl("delete", "-n", "bit", "pytorchjob", name)
    selector = f"training.kubeflow.org/job-name={name}"
    prepared.kubectl("delete", "-n", "bit", "pods", "-l", selector, "--force", "--grace-period=0")


@pytest.mark.parametrize(
    ("pool", "labels"), [("gpu-spot", "gke"), ("gpu", "gke"), ("tpu", "gke"), ("gpu", "bit"), ("cpu", "bit")]
)
def test_what_is_rendered_for_a_pool_lands_there(prepared: Cluster, pool: str, labels: str) -> None:
    place = {"cpu": "cpu-1", "gpu": "gpu-1"}.get(pool, pool)
    if labels == "bit":
        prepared.kubectl("label", "node", place, f"bit/pool={pool}", "--overwrite")
    other = {"cloud.google.com/gke-nodepool": "cpu"} if pool == "cpu" else {}
    chips = 8 if pool == "tpu" else 1
    nodes = NodesConfig(pool=pool, devices=chips, cpu="1", memory="1Gi", node_selector=other)
    given = ClusterConfig(image=IMAGE, store="s3://b", pretrain=nodes, labels=labels, queue=None)
    name = f"bit-pretrain-{pool}-{labels}"
    objects = render(Order(name, "pretrain", None, {"params.yaml": "{}"}), given, ROOT)
    prepared.kubectl("apply", "--server-side", "-n", "bit", "-f", "-", stdin=yaml.safe_dump_all(objects))

    def place_of() -> list[str]:
        pods = prepared.get("pods", "-n", "bit", "-l", f"bit/job={name}")["items"]
        return [pod["spec"]["nodeName"] for pod in pods if pod["spec"].get("nodeName")]

    [found] = wait_for(place_of)
    assert found.startswith(place if labels == "bit" and pool != "cpu" else f"{pool}-")
    prepared.kubectl("delete", "-n", "bit", "pytorchjob", name)


@pytest.mark.parametrize("folder", ["overlays/kind", "overlays/gke", "overlays/generic", "tenant"])
def test_every_overlay_applies(prepared: Cluster, folder: str) -> None:
    objects = list(yaml.safe_load_all(prepared.kubectl("kustomize", str(K8S / folder))))
    own = f"bit-{folder.rpartition('/')[2]}"  # a claim cannot be changed in place: a namespace of its own
    for made in objects:
        if made["kind"] == "Namespace":
            made["metadata"]["name"] = own
            assert made["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
            prepared.kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump(made))
        elif "namespace" in made["metadata"]:
            made["metadata"]["namespace"] = own
    whole = yaml.safe_dump_all(objects)
    prepared.kubectl("apply", "--server-side", "--dry-run=server", "--force-conflicts", "-f", "-", stdin=whole)


def test_serving_goes_before_finetuning_before_pretraining(prepared: Cluster) -> None:
    values = {row["metadata"]["name"]: row["value"] for row in prepared.get("priorityclass")["items"]}
    no_class = 0
    assert values["bit-serving"] > no_class > values["bit-finetune"] > values["bit-pretrain"]
    assert values["bit-pretrain"] >= -10, "cluster autoscalers make no nodes for pods below their cutoff"


def wanted(job: str) -> tuple[Object, int]:
    """The pod template of a job that goes through a queue, and how many pods it has."""
    [made] = [one for one in yaml.safe_load_all((K8S / f"{job}.yaml").read_text()) if one["kind"].endswith("Job")]
    if made["kind"] == "Job":
        return made["spec"]["template"]["spec"], made["spec"]["parallelism"]
    worker = made["spec"]["pytorchReplicaSpecs"]["Worker"]
    return worker["template"]["spec"], worker["replicas"]


@pytest.mark.parametrize("job", [*JOBS, "pack", "predict"])
def test_some_flavor_of_the_queue_can_take_the_job_whole(job: str) -> None:
    """As Kueue assigns flavors: taints tolerated, node selectors not against it, quota for all pods together."""
    objects = list(yaml.safe_load_all((K8S / "queues" / "queues.yaml").read_text()))
    flavors = {one["metadata"]["name"]: one.get("spec", {}) for one in objects if one["kind"] == "ResourceFlavor"}
    [queue] = [one for one in objects if one["kind"] == "ClusterQueue"]
    pod, count = wanted(job)
    tolerated = {row["key"] for row in pod.get("tolerations", [])}
    [container] = pod["containers"]
    asked = container["resources"]["limits"] | container["resources"]["requests"]
    sums = {name: count * parse_quantity(value) for name, value in asked.items()}

    def fits(flavor: Object) -> bool:
        spec = flavors[flavor["name"]]
        labels, selector = spec.get("nodeLabels", {}), pod.get("nodeSelector", {})
        quota = {row["name"]: parse_quantity(row["nominalQuota"]) for row in flavor["resources"]}
        return (
            {taint["key"] for taint in spec.get("nodeTaints", [])} <= tolerated
            and all(selector.get(key, value) == value for key, value in labels.items())
            and all(value <= quota.get(name, 0) for name, value in sums.items())
        )

    assert any(fits(flavor) for flavor in queue["spec"]["resourceGroups"][0]["flavors"])


def test_files_applied_by_hand_share_no_name_and_no_folder_and_lead_to_each_other() -> None:
    jobs = {job: read(K8S / f"{job}.yaml") for job in JOBS}
    names = {made["metadata"]["name"] for _, made in jobs.values()}
    assert len(names) == len(JOBS)
    env = {}
    for job, (config_map, made) in jobs.items():
        [container] = made["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
        env[job] = {one["name"]: one.get("value") for one in container["env"]}
        name = made["metadata"]["name"]
        assert env[job]["BIT_JOB"] == config_map["metadata"]["name"] == name
        assert config_map["metadata"]["namespace"] == made["metadata"]["namespace"] == "bit"
        assert config_map["data"]["store"].endswith(f"/{name}")
        assert env[job]["BIT_CHECKPOINTS"] == f".checkpoints/{name}"
    upstream = json.loads(jobs["finetune"][0]["data"]["pretrain.json"])["outputs"]["weights"]["uri"]
    assert upstream == f"{jobs['pretrain'][0]['data']['store']}/weights.npz"


def test_a_pool_of_single_hosts_takes_one_worker() -> None:
    given = ClusterConfig(image=IMAGE, store="s3://b", pretrain=NodesConfig(pool="tpu", workers=4, devices=8))
    with pytest.raises(ManifestError, match=r"workers=4: pool 'tpu' is one host.*pretrain-tpu-multihost.yaml"):
        render(Order("bit-pretrain-1", "pretrain", None, {}), given, ROOT)


@pytest.mark.parametrize("job", JOBS)
def test_every_training_pod_is_hardened(job: str) -> None:
    _, made = read(K8S / f"{job}.yaml")
    pod = made["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    [container] = pod["containers"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert "@sha256:" in container["image"]
    assert {"name": "BIT_IMAGE", "value": container["image"]} in container["env"]
    assert {"cpu", "memory"} <= set(container["resources"]["limits"])
    assert pod["terminationGracePeriodSeconds"] >= 60
    [memory] = [volume["name"] for volume in pod["volumes"] if volume.get("emptyDir", {}).get("medium") == "Memory"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts[memory] == "/dev/shm"  # noqa: S108
    assert not [one for one in container["env"] if "secretKeyRef" in str(one.get("value", ""))]


def test_torchrun_leaves_ranks_time_for_a_checkpoint_and_finds_new_pods_at_once() -> None:
    for name in JOBS:
        _, made = read(K8S / f"{name}.yaml")
        pod = made["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
        env = {one["name"]: one.get("value") for one in pod["containers"][0]["env"]}
        assert 60 <= int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] or 0) < pod["terminationGracePeriodSeconds"]
        assert "elasticPolicy" not in made["spec"] or env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def misspelt(job: Object) -> None:
    pod = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    pod["tolerationz"] = pod.pop("tolerations")


def two_masters(job: Object) -> None:
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    job["spec"]["pytorchReplicaSpecs"]["Master"] = worker | {"replicas": 2}


def renamed(job: Object) -> None:
    job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["name"] = "train"


def wrong_resource(job: Object) -> None:
    pod = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    pod["containers"][0]["resources"]["limits"]["nvidia.com/gpus"] = "1"


def nameless(job: Object) -> None:
    del job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["name"]


def misspelt_env(job: Object) -> None:
    container = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    container["environment"] = container.pop("env")


def wrong_type(job: Object) -> None:
    job["spec"]["nprocPerNode"] = 8


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (misspelt, "did you mean 'tolerations'"),
        (two_masters, "there can be only 1"),
        (renamed, "no container named pytorch, only train"),
        (nameless, "no container named pytorch, only one without a name"),
        (misspelt_env, "'environment' is not a key here: did you mean"),
        (wrong_resource, "did you mean 'nvidia.com/gpu'"),
        (wrong_type, "nprocPerNode must be of type str"),
    ],
)
def test_an_invalid_edit_is_refused_before_it_reaches_the_cluster(
    edit: Callable[[Object], None], said: str, tmp_path: Path
) -> None:
    config_map, job = read(K8S / "pretrain.yaml")
    check(job, "pretrain.yaml")
    edit(job)
    (tmp_path / "k8s").mkdir()
    (tmp_path / "k8s" / "pretrain.yaml").write_text(yaml.safe_dump_all([config_map, job]))
    with pytest.raises(ManifestError, match=said):
        render(Order("bit-pretrain-1", "pretrain", None, {}), ClusterConfig(image=IMAGE, store="s3://b"), tmp_path)


def test_what_is_rendered_says_what_the_order_and_the_cluster_say() -> None:
    order = Order("bit-finetune-digits-1", "finetune", "digits", {"runs/pack/digits/receipt.json": "{}"})
    nodes = NodesConfig(pool="gpu-spot", devices=2, memory="9Gi")
    given = ClusterConfig(image=IMAGE, store="s3://b/s", finetune=nodes, queue=None)
    config_map, job = render(order, given, ROOT)
    pod = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    [container] = pod["containers"]
    assert config_map["data"] == {"runs.pack.digits.receipt.json": "{}"}
    [project] = [volume["configMap"] for volume in pod["volumes"] if "configMap" in volume]
    assert project["items"] == [{"key": "runs.pack.digits.receipt.json", "path": "runs/pack/digits/receipt.json"}]
    assert container["command"] == ["torchrun", "-m", "training", "finetune", "digits"]
    assert container["resources"]["limits"] == {"cpu": "8", "memory": "9Gi", "nvidia.com/gpu": "2"}
    assert {row["key"] for row in pod["tolerations"]} == {"nvidia.com/gpu", "cloud.google.com/gke-spot"}
    assert "kueue.x-k8s.io/queue-name" not in job["metadata"]["labels"]


def test_labels_of_nodes_that_are_given_take_the_place_of_the_pools_own() -> None:
    nodes = NodesConfig(pool="gpu", node_selector={"bit/pool": "gpu"})
    given = ClusterConfig(image=IMAGE, store="s3://b", pretrain=nodes)
    _, job = render(Order("a", "pretrain", None, {}), given, ROOT)
    assert job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["nodeSelector"] == {"bit/pool": "gpu"}


def test_trainings_of_one_tenant_share_checkpoints_only_where_they_lead_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = receipt.Artifact(uri="s3://b/weights.npz", sha256="1", size_bytes=0)
    inputs = {"config_hash": "", "inputs": {}, "run_id": "", "outputs": {"made": weights}}
    receipt.Receipt(stage="pack", tenant="digits", **inputs).write(receipt.folder("pack", "digits"))
    receipt.Receipt(stage="pretrain", tenant=None, **inputs).write(receipt.folder("pretrain"))

    def place(**values: object) -> tuple[str, str]:
        given = ClusterConfig(image=IMAGE, store="s3://b")
        config = Config(finetune=FinetuneConfig(**values), cluster=given)
        wanted = order(config, "finetune", "digits")
        _, job = render(wanted, given, ROOT)
        [container] = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
        [url] = [one["value"] for one in container["env"] if one["name"] == "BIT_CHECKPOINTS"]
        assert Path(url).parent == Path(".checkpoints")
        return wanted.name, url

    name, url = place(lr=0.1)
    assert place(lr=0.2)[1] != url
    smaller_name, smaller_url = place(lr=0.1, micro_batch=2)
    assert smaller_name != name
    assert smaller_url == url


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"store": "s3://b"}, "cluster.image is not set"),
        ({"image": "localhost/x:latest", "store": "s3://b"}, "cluster.image='localhost/x:latest' is not named"),
        (
            {"image": "registry.example.com/x:1.0", "store": "s3://b"},
            "cluster.image='registry.example.com/x:1.0' is not named",
        ),
        ({"image": IMAGE}, "cluster.store is not set"),
    ],
)
def test_what_the_cluster_needs_is_asked_for_by_name(given: dict[str, str], said: str) -> None:
    with pytest.raises(ManifestError, match=said):
        render(Order("a", "pretrain", None, {}), ClusterConfig(**given), ROOT)


def test_a_name_that_services_could_not_carry_is_refused() -> None:
    given = ClusterConfig(image=IMAGE, store="s3://b")
    with pytest.raises(ManifestError, match="at most 50"):
        render(Order("a" * 56, "pretrain", None, {}), given, ROOT)


@pytest.mark.parametrize("job", ["pack", "predict"])
def test_one_part_that_failed_for_good_ends_the_whole_job(job: str) -> None:
    [made] = [one for one in yaml.safe_load_all((K8S / f"{job}.yaml").read_text()) if one["kind"] == "Job"]
    assert made["spec"]["maxFailedIndexes"] == 0


@pytest.mark.parametrize("path", sorted(K8S.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_command_at_a_files_head_names_the_namespace(path: Path) -> None:
    commands = [line for line in path.read_text().splitlines() if f"-f k8s/{path.name}" in line]
    assert [line.lstrip("# ") for line in commands] == [
        f"kubectl apply --server-side -n bit -f k8s/{path.name}" for _ in commands
    ]
    assert commands or path.name == "kustomization.yaml"


def test_packing_runs_as_an_indexed_job_and_its_command_packs(prepared: Cluster, tmp_path: Path) -> None:
    [claim, config_map, job] = yaml.safe_load_all((K8S / "pack.yaml").read_text())
    pictures = claim | {"metadata": {"name": "bit-pictures", "namespace": "bit"}}
    volumes = [
        {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": {
            "accessModes": claim["spec"]["accessModes"], "capacity": claim["spec"]["resources"]["requests"],
            "hostPath": {"path": "/nowhere"}, "claimRef": {"namespace": "bit", "name": f"bit-{name}"},
        }} for name in ("pictures", "packed")
    ]  # fmt: skip
    prepared.kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all([pictures, *volumes]))
    said = prepared.kubectl("apply", "--server-side", "-n", "bit", "-f", str(K8S / "pack.yaml"))
    assert "violate PodSecurity" not in said

    def pods() -> list[Object]:
        return prepared.get("pods", "-n", "bit", "-l", "batch.kubernetes.io/job-name=bit-pack")["items"]

    wait_for(lambda: len(pods()) == 16 and all(pod["spec"].get("nodeName") for pod in pods()))
    [container] = job["spec"]["template"]["spec"]["containers"]
    draw_folder(tmp_path / "pictures")
    values = yaml.safe_load(config_map["data"]["params.yaml"]) | {"tracking_uri": "sqlite:///.mlflow/mlflow.db"}
    values["pack"]["source"] = str(tmp_path / "pictures")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "BIT_PARTS": "2"}
    environment["BIT_REMOTE"] = f"file://{tmp_path}/remote"
    for index in ("0", "1"):
        given = environment | {"JOB_COMPLETION_INDEX": index}
        subprocess.run(container["command"], cwd=tmp_path, env=given, check=True, timeout=120)
    made = receipt.Receipt.model_validate_json((tmp_path / "runs" / "pack" / "upstream" / receipt.FILE).read_text())
    assert made.outputs["dataset"].uri.startswith(environment["BIT_REMOTE"])
    assert Dataset.open(made.outputs["dataset"].uri).fingerprint == made.outputs["dataset"].sha256
    prepared.kubectl("delete", "-n", "bit", "job", "bit-pack")
