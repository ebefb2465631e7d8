"""Why a job waits or failed, in plain words: on objects as the API gives them."""

import re
from typing import Any

import pytest

from training.cluster import explain
from training.cluster.explain import Object

JOB: Object = {
    "metadata": {"name": "bit-pretrain-1", "uid": "u1", "labels": {"kueue.x-k8s.io/queue-name": "training"}},
    "spec": {},
}
SUSPENDED: Object = JOB | {"spec": {"runPolicy": {"suspend": True}}}


def pod(**status: Any) -> Object:
    labels = {"bit/stage": "finetune"}
    container = {"name": "pytorch", "resources": {"limits": {"cpu": "8", "nvidia.com/gpu": "4"}}}
    spec = {"containers": [container], "nodeSelector": {"cloud.google.com/gke-nodepool": "gpu"}}
    return {"metadata": {"name": "p", "uid": "1", "labels": labels}, "spec": spec, "status": status}


def waits(reason: str, message: str) -> Object:
    return pod(
        containerStatuses=[{"image": "x@sha256:1", "state": {"waiting": {"reason": reason, "message": message}}}]
    )


def unplaced(message: str) -> Object:
    return pod(conditions=[{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}])


def workload(
    *conditions: Object, uid: str = "u1", came: str = "2026-01-01", priority: int = 0, namespace: str = "bit"
) -> Object:
    labels = {"kueue.x-k8s.io/job-uid": uid}
    spec = {"queueName": "training", "priority": priority}
    return {
        "metadata": {"labels": labels, "creationTimestamp": came, "namespace": namespace},
        "spec": spec,
        "status": {"conditions": list(conditions)},
    }


QUOTA = {
    "type": "QuotaReserved",
    "status": "False",
    "message": "insufficient unused quota for nvidia.com/gpu, 2 more needed",
}
EVICTED = {"type": "Evicted", "status": "True", "reason": "Preempted", "message": "to make room for another workload"}


@pytest.mark.parametrize(
    ("job", "pods", "events", "queued", "said"),
    [
        (SUSPENDED, [], [], [workload(QUOTA)], "queue 'training', number 1 of 1 there, waiting for quota: insufficient unused"),
        (SUSPENDED, [], [], [workload(QUOTA, EVICTED)], "preempted .Preempted.: to make room .*; it resumes from its checkpoint"),
        (SUSPENDED, [], [], [], "queue 'training' has not admitted it"),
        (JOB, [unplaced("0/9 nodes: 4 Insufficient nvidia.com/gpu.")], [], [], "enough nvidia.com/gpu .asks for 4. free"),
        (JOB, [unplaced("9 node(s) didn't match node affinity/selector.")], [], [], "labels of the pool .*nodepool=gpu"),
        (JOB, [unplaced("2 node(s) had untolerated taint {team: a}.")], [], [], "open to it, for their taints .team: a."),
        (JOB, [unplaced("pod has unbound immediate PersistentVolumeClaims.")], [], [], "volume is not there yet"),
        (JOB, [waits("ImagePullBackOff", "not found")], [], [], "x@sha256:1 cannot be pulled .*Check cluster.image"),
        (JOB, [waits("CreateContainerConfigError", "secret missing")], [], [], "cannot be made: secret missing"),
        (JOB, [], ["pods are forbidden: violates PodSecurity"], [], "no pod could be made: pods are forbidden"),
        (JOB, [], [], [], "the operator has not made its pods yet"),
    ],
)  # fmt: skip
def test_why_a_job_waits(job: Object, pods: list[Object], events: list[str], queued: list[Object], said: str) -> None:
    told = explain.waiting(job, pods, events, queued)
    assert re.search(said, told), told


def test_the_place_in_the_queue_counts_who_waits_and_goes_ahead() -> None:
    own = workload(QUOTA, came="2026-01-03")
    earlier, later = workload(QUOTA, uid="u2", came="2026-01-02"), workload(QUOTA, uid="u3", came="2026-01-04")
    urgent = workload(QUOTA, uid="u4", came="2026-01-05", priority=100)
    admitted = workload({"type": "QuotaReserved", "status": "True"}, uid="u5", came="2026-01-01")
    elsewhere = workload(QUOTA, uid="u6", came="2026-01-01", namespace="bit-acme")  # its queue has the same name
    queue = [admitted, later, own, urgent, earlier, elsewhere]
    assert "number 3 of 4 there" in explain.waiting(SUSPENDED, [], [], queue)


FAILED = {"type": "Failed", "status": "True", "reason": "PyTorchJobFailed", "message": "the specified backoff limit"}
LATE = {
    "type": "Failed",
    "status": "True",
    "reason": "DeadlineExceeded",
    "message": "active longer than specified deadline",
}
OOM = {"exitCode": 137, "reason": "OOMKilled"}
RANK_KILLED = {
    "exitCode": 1,
    "reason": "Error",
    "message": "exitcode: -9\ntraceback : Signal 9 (SIGKILL) received by PID 44",
}
BUG = {"exitCode": 1, "reason": "Error", "message": "Traceback\nKeyError: 'head'"}


@pytest.mark.parametrize(
    ("ends", "words", "condition", "micro_batch", "said"),
    [
        (
            [OOM],
            None,
            FAILED,
            64,
            "killed for memory .*--set finetune.micro_batch=32 .* or raise cluster.finetune.memory",
        ),
        ([RANK_KILLED], None, FAILED, None, "killed for memory .*lower micro_batch"),
        ([BUG], None, FAILED, None, "ended with an error:\nTraceback\nKeyError: 'head'"),
        ([], "crop=32 is larger", FAILED, None, "ended with an error:\ncrop=32 is larger"),
        ([], None, FAILED, None, "the specified backoff limit"),
        ([], None, LATE, None, "its deadline passed"),
    ],
)
def test_why_a_job_failed(
    ends: list[Object], words: str | None, condition: Object, micro_batch: int | None, said: str
) -> None:
    job = JOB | {"status": {"conditions": [condition]}}
    told = explain.failed(ends, words, job, "finetune", micro_batch)
    assert re.search(said, told), told


def test_the_exit_code_is_the_failed_containers() -> None:
    assert explain.exit_code([OOM, BUG]) == 137
    assert explain.exit_code([]) == 1


def test_what_was_started_again_is_counted_with_its_last_words() -> None:
    again = pod(containerStatuses=[{"restartCount": 2, "state": {"running": {}}, "lastState": {"terminated": BUG}}])
    assert explain.restarts([again]) == "started again 2 times; last words: KeyError: 'head'"
    assert explain.restarts([pod()]) == ""
