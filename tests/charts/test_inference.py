"""charts/inference: what it renders, as objects, and what a real API server says to it."""

import json
import re
from pathlib import Path

import pytest

from services.inference import openapi
from services.inference.settings import Settings
from services.inference.tenants import FILE
from tests.charts.helm import CHARTS, environment, helm, pod_of, render

CHART = CHARTS / "inference"


def settings(**values: object) -> Settings:
    """The settings that the service would read from the chart's environment; what the cluster fills in is one core."""
    given = environment(pod_of(render("inference", **values)["Deployment"]))  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in given.items():
            if name.startswith("BIT_SERVE_"):
                patch.setenv(name, value if isinstance(value, str) else "1")
        return Settings()


@pytest.mark.parametrize("scenario", ["default", "keda", "hpa", "tenant", "idle", "folder"])
def test_every_variable_is_a_setting_of_the_service(scenario: str) -> None:
    given = environment(pod_of(render("inference", scenario)["Deployment"]))
    named = {name.removeprefix("BIT_SERVE_").lower() for name in given if name.startswith("BIT_SERVE_")}
    assert named <= set(Settings.model_fields)
    assert len(named) > 6
    assert settings(scenario=scenario)  # and the service takes the values


def test_the_schema_knows_the_settings_that_the_chart_leaves_free() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    free = set(schema["properties"]["settings"]["properties"])
    deployment = (CHART / "templates" / "deployment.yaml").read_text()
    own = {name for name in Settings.model_fields if f"BIT_SERVE_{name.upper()}," in deployment}
    own |= {"workers"}
    assert free == set(Settings.model_fields) - own


def test_settings_reach_the_service_as_they_are() -> None:
    read = settings(scenario="tenant", settings__max_pixels=50_000_000, settings__poll_interval_s=0.5)
    assert read.only == ["acme"]
    assert read.pinned == ["acme"]
    assert read.max_pixels == 50_000_000
    assert read.poll_interval_s == 0.5
    assert read.cold == "refuse"
    assert read.host == "0.0.0.0"  # noqa: S104


def test_a_pod_is_given_the_time_that_the_service_takes_to_leave() -> None:
    values = {"shutdown__preStopSeconds": 7, "shutdown__drainSeconds": 11, "requestTimeoutSeconds": 40}
    pod = pod_of(render("inference", **values)["Deployment"])
    read = settings(**values)
    assert pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"] == 7
    assert read.drain_s == 11
    assert read.grace_s >= read.timeout_ms / 1000 == 40
    assert pod["terminationGracePeriodSeconds"] > 7 + read.drain_s + read.grace_s


def test_pods_have_no_rights_and_no_cpu_limit() -> None:
    pod = pod_of(render("inference")["Deployment"])
    container = pod["containers"][0]
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert pod["securityContext"]["runAsUser"] >= 10_000
    assert "memory" in container["resources"]["limits"]
    assert "cpu" not in container["resources"]["limits"]
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {"/tmp", environment(pod)["BIT_SERVE_CACHE_DIR"]} <= mounted  # noqa: S108


def test_models_fit_into_the_memory_limit() -> None:
    pod = pod_of(render("inference")["Deployment"])
    limit = pod["containers"][0]["resources"]["limits"]["memory"]
    assert limit == "2Gi"
    assert settings().memory_mb + 512 <= 2048


@pytest.mark.parametrize(
    ("size", "room_mb"), [("4Gi", 3_686), ("512Mi", 460), ("1.5Gi", 1_382), ("10G", 8_583), ("1Ti", 943_718)]
)
def test_exports_fit_into_the_caches_volume(size: str, room_mb: int) -> None:
    """Over an emptyDir's limit the kubelet evicts the pod."""
    assert settings(cache__size=size).cache_mb == room_mb
    volumes = pod_of(render("inference", cache__size=size)["Deployment"])["volumes"]
    assert {"name": "cache", "emptyDir": {"sizeLimit": size}} in volumes


def test_the_probes_ask_for_pages_that_exist_and_a_missing_registry_restarts_nothing() -> None:
    container = pod_of(render("inference")["Deployment"])["containers"][0]
    asked = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert asked == {
        "startupProbe": "/v2/health/live",
        "readinessProbe": "/v2/health/ready",
        "livenessProbe": "/v2/health/live",
    }


def test_the_service_leads_to_the_pods_and_to_nothing_else() -> None:
    objects = render("inference", "keda")
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selector = objects["Service"]["spec"]["selector"]
    assert selector.items() <= labels.items()
    assert not selector.items() <= objects["Pod"]["metadata"]["labels"].items()  # the test's pod is no server
    port = objects["Service"]["spec"]["ports"][0]
    ports = objects["Deployment"]["spec"]["template"]["spec"]["containers"][0]["ports"]
    assert port["targetPort"] in {one["name"] for one in ports}
    backend = objects["Ingress"]["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    assert backend == {"name": objects["Service"]["metadata"]["name"], "port": {"name": port["name"]}}
    assert objects["ServiceMonitor"]["spec"]["endpoints"][0]["port"] == port["name"]
    monitored = objects["ServiceMonitor"]["spec"]["selector"]["matchLabels"]
    assert monitored.items() <= objects["Service"]["metadata"]["labels"].items()


def test_one_autoscaler_at_most_and_it_owns_the_number_of_replicas() -> None:
    assert render("inference")["Deployment"]["spec"]["replicas"] == 2
    for scenario, kind in (("keda", "ScaledObject"), ("hpa", "HorizontalPodAutoscaler")):
        objects = render("inference", scenario)
        assert {"ScaledObject", "HorizontalPodAutoscaler"} & set(objects) == {kind}
        assert "replicas" not in objects["Deployment"]["spec"]
        target = objects[kind]["spec"]["scaleTargetRef"]["name"]
        assert target == objects["Deployment"]["metadata"]["name"]


def test_keda_asks_for_the_series_of_this_release_under_the_job_that_the_monitor_writes() -> None:
    objects = render("inference", "keda")
    job = objects["ServiceMonitor"]["spec"]["endpoints"][0]["relabelings"][0]["replacement"]
    queries = [one["metadata"]["query"] for one in objects["ScaledObject"]["spec"]["triggers"]]
    assert all(f'namespace="bit",job="{job}"' in query for query in queries)
    rules = json.dumps(objects["PrometheusRule"]["spec"])
    assert 'job=\\"bit-serve\\"' not in rules
    assert f'job=\\"{job}\\"' in rules


def test_no_instance_is_no_alert_where_it_is_meant() -> None:
    def alerts(scenario: str, **values: object) -> set[str]:
        rules = render("inference", scenario, metrics__rules__enabled=True, **values)["PrometheusRule"]["spec"]
        return {rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule}

    everything = alerts("keda")
    assert "BitServeGone" in everything
    assert alerts("idle") == alerts("default", replicas=0) == everything - {"BitServeGone"}


def test_zero_replicas_are_opted_in_with_what_wakes_them() -> None:
    assert render("inference", "keda")["ScaledObject"]["spec"]["minReplicaCount"] == 2
    idle = render("inference", "idle")["ScaledObject"]["spec"]
    assert idle["minReplicaCount"] == 0
    assert any("ingress" in one["metadata"]["query"] for one in idle["triggers"])


def test_a_disruption_budget_where_a_pod_can_be_spared() -> None:
    assert render("inference")["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1
    assert "PodDisruptionBudget" not in render("inference", replicas=1)
    assert "PodDisruptionBudget" not in render("inference", "idle")


def test_keys_come_from_the_named_secret_or_one_that_is_made() -> None:
    def secret(scenario: str) -> str:
        pod = pod_of(render("inference", scenario)["Deployment"])
        return next(one["secret"]["secretName"] for one in pod["volumes"] if one["name"] == "keys")

    assert secret("keda") == "bit-tenants"
    assert "Secret" not in render("inference", "keda")
    made = render("inference", "tenant")["Secret"]
    assert secret("tenant") == made["metadata"]["name"]
    assert set(FILE.validate_json(made["stringData"]["tenants.json"])) == {"acme", "*"}
    pod = pod_of(render("inference", "tenant")["Deployment"])
    folder = next(one["mountPath"] for one in pod["containers"][0]["volumeMounts"] if one["name"] == "keys")
    assert str(Path(environment(pod)["BIT_SERVE_TENANTS"]).parent) == folder


def test_an_account_that_may_only_read_is_not_asked_to_write() -> None:
    reader = render("mlflow", "postgres")["Job"]
    made = environment(pod_of(reader))["SERVICE_USERNAME"]
    given = environment(pod_of(render("inference", "keda")["Deployment"]))
    assert given["MLFLOW_TRACKING_USERNAME"] == made
    assert given["BIT_SERVE_WRITE_BACK"] == "false"


def test_traffic_is_denied_but_for_the_few_flows() -> None:
    policy = render("inference", "keda")["NetworkPolicy"]["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    [ingress] = policy["ingress"]
    namespaces = [one["namespaceSelector"]["matchLabels"] for one in ingress["from"] if "namespaceSelector" in one]
    assert [one["kubernetes.io/metadata.name"] for one in namespaces] == ["ingress-nginx", "monitoring"]
    assert [[one["port"] for one in flow["ports"]] for flow in policy["egress"]] == [[53, 53], ["http"], [443, 5000]]
    assert "NetworkPolicy" not in render("inference", "folder")


@pytest.mark.parametrize(
    ("uri", "values", "ports"),
    [
        ("http://mlflow:5000", {}, [5000]),
        ("http://mlflow", {}, [80, 5000]),
        ("https://mlflow.example.test/registry", {"networkPolicy__registryPort": 8443}, [443, 8443]),
    ],
)
def test_the_registry_is_reached_on_its_address_port_and_on_its_pods(
    uri: str, values: dict[str, int], ports: list[int]
) -> None:
    flow = render("inference", registry__trackingUri=uri, **values)["NetworkPolicy"]["spec"]["egress"][-1]
    assert flow["ports"] == [{"port": port, "protocol": "TCP"} for port in ports]


def test_the_registrys_port_is_what_the_chart_mlflow_listens_on() -> None:
    [flow] = render("inference", registry__trackingUri="http://mlflow")["NetworkPolicy"]["spec"]["egress"][-1:]
    [listens] = pod_of(render("mlflow")["Deployment"])["containers"][0]["ports"]
    assert listens["containerPort"] in {one["port"] for one in flow["ports"]}


@pytest.mark.parametrize("scenario", ["keda", "hpa", "idle"])
def test_who_is_led_to_the_service_is_let_in(scenario: str) -> None:
    objects = render("inference", scenario)
    assert {"Ingress", "HTTPRoute"} & set(objects)
    assert {"ServiceMonitor", "PodMonitor"} & set(objects)
    [flow] = objects["NetworkPolicy"]["spec"]["ingress"]
    named = [one["namespaceSelector"]["matchLabels"] for one in flow["from"] if "namespaceSelector" in one]
    assert len(named) == 2
    assert {"kubernetes.io/metadata.name": "monitoring"} in named


@pytest.mark.parametrize(("scenario", "way"), [("keda", "ingress"), ("hpa", "httpRoute")])
def test_a_way_in_that_the_policy_would_shut_is_refused(scenario: str, way: str) -> None:
    given = ["--values", CHART / "ci" / f"{scenario}-values.yaml", "--set-json", "networkPolicy.clients=[]"]
    done = helm("template", "bit", CHART, *given)
    assert done.returncode != 0
    assert f"networkPolicy.clients is empty while {way}.enabled" in done.stderr
    assert helm("template", "bit", CHART, *given, "--set", "networkPolicy.enabled=false").returncode == 0


def test_series_that_are_gone_are_no_zero_load_unless_there_may_be_no_pod() -> None:
    def ignored(scenario: str) -> dict[str, str]:
        triggers = render("inference", scenario)["ScaledObject"]["spec"]["triggers"]
        return {one["name"]: one["metadata"].get("ignoreNullValues", "true") for one in triggers}

    assert ignored("keda") == {"queue": "false", "in-flight": "false"}
    assert ignored("idle") == {"queue": "true", "in-flight": "true", "waiting": "true"}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("replcas=3", "replcas"),
        ("autoscaling.keda.queueMiliseconds=3", "queueMiliseconds"),
        ("settings.max_bacth=3", "max_bacth"),
        ("autoscaling.by=both", "autoscaling"),
        ("autoscaling.keda.zero.enabled=true", "zero"),
        ("models.existingClaim=exports", "path"),
        ("registry.trackingUri=mlflow", "trackingUri"),
        ("keys.tenants.acme.keys[0]=secret", "acme"),
        ("image.digest=latest", "digest"),
        ("cache.size=4", "size"),
        ("shutdown.preStopSeconds=0", "preStopSeconds"),
        ("ingress.enabled=true", "hosts"),
    ],
)
def test_a_wrong_value_is_refused_and_named(wrong: str, named: str) -> None:
    done = helm("template", "bit", CHART, "--set", wrong)
    assert done.returncode != 0
    assert named in done.stderr


@pytest.mark.parametrize("by", ["keda", "hpa"])
def test_fewest_replicas_above_the_most_are_refused(by: str) -> None:
    given = [f"--set=autoscaling.{value}" for value in (f"by={by}", "minReplicas=5", "maxReplicas=4")]
    done = helm("template", "bit", CHART, *given, "--set=podDisruptionBudget.enabled=false")
    assert done.returncode != 0
    assert "autoscaling.minReplicas is 5, above autoscaling.maxReplicas, 4" in done.stderr


def test_an_hpa_cannot_be_asked_for_zero() -> None:
    zero = ["--set", "autoscaling.keda.zero.enabled=true", "--set", "autoscaling.keda.zero.query=up"]
    assert helm("template", "bit", CHART, *zero, "--set", "autoscaling.by=keda").returncode == 0
    done = helm("template", "bit", CHART, *zero, "--set", "autoscaling.by=hpa")
    assert "enabled" in done.stderr


def test_what_leads_in_from_outside_leads_to_every_path_but_the_metrics() -> None:
    """Which need no key, so that Prometheus is easily set up inside."""
    [rule] = render("inference", "keda")["Ingress"]["spec"]["rules"]
    led = {(path["path"], path["pathType"]) for path in rule["http"]["paths"]}
    [route] = render("inference", "hpa")["HTTPRoute"]["spec"]["rules"]
    kinds = {"Exact": "Exact", "PathPrefix": "Prefix"}
    assert led == {(one["path"]["value"], kinds[one["path"]["type"]]) for one in route["matches"]}
    served = {re.sub(r"\{.*", "", path).rstrip("/") or "/" for path in openapi.document("0")["paths"]} | {
        "/",
        "/static/x",
    }
    for path in served - {"/metrics"}:
        assert any(path == to or (kind == "Prefix" and path.startswith(f"{to}/")) for to, kind in led), path
    assert not any(to in ("/", "/metrics") and kind == "Prefix" for to, kind in led)
