"""PyTorchJobs on a cluster: applied, watched, read and removed. The one importer of the Kubernetes client.

The watch outlives what happens to API servers and networks in the days that a job takes: a lost connection is tried again, and a
history that is gone (410) is listed anew.
"""

import copy
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import urllib3
from kubernetes import client, config, watch
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException

from training.cluster.manifests import Object
from training.config import ClusterConfig
from training.errors import UserError

GROUP, VERSION, PLURAL = "kubeflow.org", "v1", "pytorchjobs"
MANAGER = "bit"  # the field manager of server-side apply
ALL = "app.kubernetes.io/part-of=bit"  # also jobs that kubectl made from k8s/
EVERYWHERE = ""  # all namespaces
CONNECT_S, READ_S = 5, 90  # longer than any watch
LONGEST_PAUSE_S = 15.0
PATIENCE_S = 120.0  # an API server that starts again refuses rights and kinds that it has not read yet


class ClusterError(UserError):
    """The cluster cannot be reached, or refuses; the message says what, and what to do. refused: rights or credentials lack."""

    refused = False


class Counted(client.ApiClient):
    """The client's connection, which counts its requests: a fleet must not be a burden to the API server."""

    calls = 0

    def call_api(self, *arguments: Any, **named: Any) -> Any:
        self.calls += 1
        return super().call_api(*arguments, **named)


class Jobs:
    """The jobs of one namespace: upstream's, or a tenant's. Raises ClusterError for a context that is not there."""

    def __init__(self, cluster: ClusterConfig, tenant: str | None = None) -> None:
        try:
            settings = client.Configuration()
            file = os.environ.get("KUBECONFIG")  # the client reads it when it is imported, and not again
            config.load_kube_config(file, context=cluster.context, client_configuration=settings)
        except ConfigException as error:
            raise ClusterError(f"no cluster to submit to ({error}): set KUBECONFIG or cluster.context.") from None
        self.api = api = Counted(settings)
        self.namespace, self.host = cluster.namespace_of(tenant), api.configuration.host
        api.configuration.retries = False  # the client's own retries would hide what we report
        self.custom, self.core = client.CustomObjectsApi(api), client.CoreV1Api(api)

    def of(self, namespace: str) -> "Jobs":
        """The jobs of another namespace (EVERYWHERE: of all), by the same connection."""
        other = copy.copy(self)
        other.namespace = namespace
        return other

    @property
    def calls(self) -> int:
        """Requests to the API server so far."""
        return self.api.calls

    def apply(self, objects: list[Object], dry_run: bool = False) -> None:
        """Applies a ConfigMap and a PyTorchJob on the server's side: twice the same is once."""
        query = [("fieldManager", MANAGER), ("force", "true"), ("fieldValidation", "Strict")]
        query += [("dryRun", "All")] if dry_run else []
        for made in objects:
            kind, name = made["kind"], made["metadata"]["name"]
            base = f"/apis/{GROUP}/{VERSION}" if kind == "PyTorchJob" else "/api/v1"
            with self._asked(f"apply {kind} {name}"):
                # The client's own patch methods cannot send the content type of server-side apply.
                self.core.api_client.call_api(
                    f"{base}/namespaces/{self.namespace}/{kind.lower()}s/{name}",
                    "PATCH",
                    query_params=query,
                    header_params={"Content-Type": "application/apply-patch+yaml", "Accept": "application/json"},
                    body=made,
                    auth_settings=["BearerToken"],
                    response_type="object",
                    _request_timeout=(CONNECT_S, READ_S),
                )

    def get(self, name: str) -> Object | None:
        with self._asked(f"get pytorchjob {name}"):
            try:
                return self.custom.get_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, name)
            except ApiException as error:
                if error.status == 404 and "page not found" not in str(error.body):
                    return None
                raise

    def find(self, selector: str = ALL) -> list[Object]:
        with self._asked("list pytorchjobs"):
            return self._list(label_selector=selector)["items"]

    def delete(self, name: str, uid: str | None = None) -> bool:
        """Removes a job with its pods, and its ConfigMap. What is not there is removed already.

        uid: the job that is meant; False where it is gone, or another one has its name, whose ConfigMap must stay.
        """
        meant = client.V1DeleteOptions(preconditions=client.V1Preconditions(uid=uid))
        with self._asked(f"delete {name}"):
            try:
                self.custom.delete_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, name, body=meant)
            except ApiException as error:
                if uid and error.status in (404, 409):
                    return False
                if error.status != 404:
                    raise
            try:
                self.core.delete_namespaced_config_map(name, self.namespace)
            except ApiException as error:
                if error.status != 404:
                    raise
        return True

    def pods(self, name: str, patience_s: float = 0.0) -> list[Object]:
        """The pods of a job, as plain objects. patience_s: how long refusals and cut connections are tried again."""
        until = time.monotonic() + patience_s
        while True:
            try:
                return self.pods_of(f"bit/job={name}")
            except ClusterError:
                if time.monotonic() > until:
                    raise
                time.sleep(2)

    def pods_of(self, selector: str) -> list[Object]:
        """The pods that a selector of labels chooses, as plain objects."""
        with self._asked("list pods"):
            if self.namespace == EVERYWHERE:
                found = self.core.list_pod_for_all_namespaces(label_selector=selector)
            else:
                found = self.core.list_namespaced_pod(self.namespace, label_selector=selector)
        return [self.core.api_client.sanitize_for_serialization(pod) for pod in found.items]

    def events(self, about: str) -> list[str]:
        """Messages of the events about an object, oldest first."""
        with self._asked("list events"):
            found = self.core.list_namespaced_event(self.namespace, field_selector=f"involvedObject.name={about}")
        return [event.message for event in found.items if event.message]

    def workloads(self) -> list[Object]:
        """Kueue's view of all jobs of the namespace; none where there is no Kueue."""
        kind = ("kueue.x-k8s.io", "v1beta2")
        with self._asked("list workloads"):
            try:
                if self.namespace == EVERYWHERE:
                    found = self.custom.list_cluster_custom_object(*kind, "workloads")
                else:
                    found = self.custom.list_namespaced_custom_object(*kind, self.namespace, "workloads")
            except ApiException as error:
                if error.status in (403, 404):
                    return []
                raise
        return list(found["items"])

    def logs(self, pod: str, follow: bool, after: str = "") -> Iterator[tuple[str, str]]:
        """(time, line) of a pod's lines later than `after`; ends where there are none (yet).

        Raises ClusterError where they are refused or cut off.
        """
        with self._asked(f"read the log of pod {pod}"):
            try:
                answer = self.core.read_namespaced_pod_log(
                    pod, self.namespace, container="pytorch", follow=follow, timestamps=True, _preload_content=False
                )
            except ApiException as error:
                if error.status in (400, 404):  # its container waits; there is no such pod
                    return
                raise
            for line in answer:
                stamp, _, text = line.decode(errors="replace").rstrip("\n").partition(" ")
                if stamp > after:
                    yield stamp, text

    def watch(self, selector: str, expected: Iterable[str] = (), pause_s: float = 5.0) -> Iterator[Object | None]:
        """Every state of the selected jobs as it comes, for ever; None about every `pause_s` seconds in which nothing came.

        A job that is removed comes once more, with the key `removed`; so does one that is `expected` by name and not there.
        """
        failures, answered = 0, -PATIENCE_S
        known: dict[str, Object] = {}
        missing = set(expected)
        while True:
            try:
                listed = self._list(label_selector=selector, _request_timeout=(CONNECT_S, READ_S))
                failures = 0
                present = {job["metadata"]["uid"]: job for job in listed["items"]}
                missing -= {job["metadata"]["name"] for job in listed["items"]}
                yield from ({"metadata": {"name": name}, "removed": True} for name in sorted(missing))
                missing.clear()
                yield from (job | {"removed": True} for uid, job in known.items() if uid not in present)
                yield from listed["items"]
                known, version = present, listed["metadata"]["resourceVersion"]
                while True:
                    answered = time.monotonic()
                    stream = watch.Watch().stream(
                        self._list,
                        label_selector=selector,
                        resource_version=version,
                        timeout_seconds=max(1, int(pause_s)),
                        _request_timeout=(CONNECT_S, READ_S),
                    )
                    for event in stream:
                        job = event["object"]
                        version, known[job["metadata"]["uid"]] = job["metadata"]["resourceVersion"], job
                        if event["type"] == "DELETED":
                            del known[job["metadata"]["uid"]]
                        yield job | {"removed": True} if event["type"] == "DELETED" else job
                    yield None
            except (ApiException, urllib3.exceptions.HTTPError, OSError) as error:
                refused = isinstance(error, ApiException) and error.status in (401, 403, 404)
                if refused and time.monotonic() - answered > PATIENCE_S:
                    raise ClusterError(self._explained(error, "watch pytorchjobs")) from None
                if not refused:  # 410: the history is gone; 5xx, 429, no connection: not now
                    answered = time.monotonic()
                failures = self._rest(failures, error)
            if failures:
                yield None

    def _rest(self, failures: int, error: Exception) -> int:
        status = getattr(error, "status", None)
        if status == 410:
            return 0
        if failures == 1:
            print(f"{self.host} does not answer; the job goes on, and so does the watch", file=sys.stderr)
        time.sleep(pause_s(failures))
        return failures + 1

    def _list(self, **how: Any) -> Any:
        """The client documents the kind of its answers by these lines, which Watch reads.

        :return: object
        """
        if self.namespace == EVERYWHERE:
            return self.custom.list_cluster_custom_object(GROUP, VERSION, PLURAL, **how)
        return self.custom.list_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, **how)

    @contextmanager
    def _asked(self, what: str) -> Iterator[None]:
        try:
            yield
        except ApiException as error:
            told = ClusterError(self._explained(error, what))
            told.refused = error.status in (401, 403)
            raise told from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ClusterError(
                f"{self.host} cannot be reached ({type(error).__name__}): is cluster.context the right one, and the cluster up?"
            ) from None

    def _explained(self, error: ApiException, what: str) -> str:
        said = str(error.body or error.reason)
        if error.status == 403 and self.namespace == EVERYWHERE:
            return (
                f"forbidden: you may not {what} in all namespaces, which cluster.tenant_namespace needs. Ask for the "
                f"ClusterRole `bit-watcher` of k8s/base/access.yaml. The cluster says: {said}"
            )
        if error.status == 403:
            return (
                f"forbidden: you may not {what} in namespace {self.namespace!r}. Ask for the Role `submitter` of "
                f"k8s/base/access.yaml. The cluster says: {said}"
            )
        if error.status == 404 and ("page not found" in said or "could not find the requested resource" in said):
            return (
                f"the cluster at {self.host} does not know PyTorchJobs: install the Kubeflow training operator "
                "(docs/cluster.md), or choose another cluster.context."
            )
        if error.status == 404:
            return f"cannot {what}: {said}. Is the namespace {self.namespace!r} there? kubectl apply -k k8s/ makes it."
        if error.status == 401:
            return f"{self.host} does not accept your credentials: log in again, or choose another cluster.context."
        return f"cannot {what}: {said}"


def pause_s(failures: int) -> float:
    """Seconds to rest after so many failures in a row, however many."""
    return min(LONGEST_PAUSE_S, 0.5 * 2 ** min(failures, 5))
