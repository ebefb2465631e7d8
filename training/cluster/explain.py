"""Why a job waits or failed, in plain words with the next step. Pure: objects of the API in, sentences out."""

import re
from typing import Any

Object = dict[str, Any]
OVER = ("Succeeded", "Failed", "Removed")
SIGKILL, SIGTERM = 128 + 9, 128 + 15
KILLED = "Signal 9 (SIGKILL) received"  # torchrun, of a rank that the kernel killed: memory, but for rare exceptions


def condition(job: Object) -> str:
    """The state of a job: Succeeded, Failed, Suspended, Restarting, Running, Created, or Removed where the watch lost it."""
    if job.get("removed"):
        return "Removed"
    told = {row["type"] for row in job.get("status", {}).get("conditions", []) if row["status"] == "True"}
    return next(
        (state for state in ("Succeeded", "Failed", "Suspended", "Restarting", "Running") if state in told), "Created"
    )


def waiting(job: Object, pods: list[Object], events: list[str], workloads: list[Object]) -> str:
    """Why a job does not run yet. workloads: Kueue's, of the job's namespace."""
    if job.get("spec", {}).get("runPolicy", {}).get("suspend"):
        return _queued(job, workloads)
    for pod in pods:
        if told := _pulling(pod):
            return told
    for row in (row for pod in pods for row in pod.get("status", {}).get("conditions", [])):
        if row.get("reason") == "Unschedulable":
            return _unschedulable(row.get("message", ""), pods[0])
    if not pods:
        last = [message for message in events if "forbidden" in message or "exceeded quota" in message]
        return f"no pod could be made: {last[-1]}" if last else "the operator has not made its pods yet"
    running = sum(pod.get("status", {}).get("phase") == "Running" for pod in pods)
    return f"{running} of {len(pods)} pods are running"


def failed(ends: list[Object], words: str | None, job: Object, stage: str, micro_batch: int | None) -> str:
    """Why a job failed: memory, deadline, too many restarts, or the program's own last words.

    ends: how containers ended, as `terminated` found them; words: what the program left in the store; micro_batch: examples per
    forward pass now, None where that is not known.
    """
    if any(end.get("reason") == "OOMKilled" or KILLED in (end.get("message") or "") for end in ends):
        smaller = max(1, micro_batch // 2) if micro_batch else None
        fits = (
            f"--set {stage}.micro_batch={smaller} halves what a forward pass keeps" if smaller else "lower micro_batch"
        )
        return f"killed for memory (OOMKilled): {fits} (the result stays the same), or raise cluster.{stage}.memory"
    row: Object = next((row for row in job.get("status", {}).get("conditions", []) if row["type"] == "Failed"), {})
    if "deadline" in row.get("message", "").lower() or row.get("reason") == "DeadlineExceeded":
        return (
            "its deadline passed (runPolicy.activeDeadlineSeconds): raise it, then --retry goes on from the checkpoint"
        )
    for end in ends:
        if said := (end.get("message") or "").strip() or words:
            return f"the program ended with an error:\n{_last_lines(said)}"
    if words:
        return f"the program ended with an error:\n{_last_lines(words)}"
    return row.get("message") or row.get("reason") or "the operator gives no reason"


def restarts(pods: list[Object]) -> str:
    """How often containers of a job were started again, and after what: "" where none was."""
    count = sum(
        status.get("restartCount", 0) for pod in pods for status in pod.get("status", {}).get("containerStatuses") or ()
    )
    if not count:
        return ""
    told = f"started again {count} time{'s' if count > 1 else ''}"
    for end in terminated(pods):
        if end.get("reason") == "OOMKilled":
            return f"{told}; killed for memory (OOMKilled)"
        if end.get("exitCode") == SIGKILL:
            return f"{told}; killed (SIGKILL)"
        if said := _last_lines(end.get("message") or "", 1):
            return f"{told}; last words: {said}"
    return told


def _queued(job: Object, workloads: list[Object]) -> str:
    queue = job["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
    own = next((one for one in workloads if _job_of(one) == job["metadata"].get("uid")), None)
    if own is None:
        return f"suspended; queue {queue!r} has not admitted it" if queue else "suspended (runPolicy.suspend)"
    if evicted := _condition(own, "Evicted", "True"):
        return f"preempted ({evicted.get('reason')}): {evicted.get('message')}; it resumes from its checkpoint"
    waiting = sorted((one for one in workloads if _waits(one, own)), key=_turn)
    reason = (_condition(own, "QuotaReserved", "False") or {}).get("message") or "no more is told"
    return f"in queue {queue!r}, number {waiting.index(own) + 1} of {len(waiting)} there, waiting for quota: {reason}"


def _job_of(workload: Object) -> str | None:
    uid: str | None = workload["metadata"].get("labels", {}).get("kueue.x-k8s.io/job-uid")
    return uid


def _waits(workload: Object, own: Object) -> bool:
    """Whether a workload waits in the queue of another one, which waits itself."""
    same = _queue_of(workload) == _queue_of(own)
    over = _condition(workload, "QuotaReserved", "True") or _condition(workload, "Finished", "True")
    return workload is own or (same and not over)


def _queue_of(workload: Object) -> tuple[str | None, str | None]:
    """Every namespace may have a queue of the same name."""
    return workload["metadata"].get("namespace"), workload["spec"].get("queueName")


def _turn(workload: Object) -> tuple[int, str]:
    """Kueue takes the highest priority first, then who came first."""
    return -(workload["spec"].get("priority") or 0), workload["metadata"].get("creationTimestamp", "")


def _condition(made: Object, kind: str, status: str) -> Object | None:
    rows = made.get("status", {}).get("conditions", [])
    return next((row for row in rows if row["type"] == kind and row["status"] == status), None)


def _pulling(pod: Object) -> str:
    for status in pod.get("status", {}).get("containerStatuses") or ():
        state = status.get("state", {}).get("waiting") or {}
        if state.get("reason") in ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"):
            why = f"{state['reason']}: {state.get('message', '')}"
            return f"image {status.get('image')} cannot be pulled ({why}). Check cluster.image."
        if state.get("reason") in ("CreateContainerConfigError", "CreateContainerError"):
            return f"the container cannot be made: {state.get('message', '')}"
    return ""


def _unschedulable(message: str, pod: Object) -> str:
    limits = pod["spec"]["containers"][0].get("resources", {}).get("limits", {})
    selector = pod["spec"].get("nodeSelector") or {}
    stage = pod["metadata"].get("labels", {}).get("bit/stage", "pretrain")
    where = ", ".join(f"{key.rpartition('/')[2]}={value}" for key, value in selector.items()) or "any node"
    if short := re.findall(r"Insufficient ([\w./-]+)", message):
        names = dict.fromkeys(name.rstrip(".") for name in short)
        asked = ", ".join(f"{name} (asks for {limits.get(name, '?')})" for name in names)
        return (
            f"no node of the pool {where} has enough {asked} free: wait, ask for less, or another cluster.{stage}.pool"
        )
    if "unbound" in message or "persistentvolumeclaim" in message:
        return f"its volume is not there yet ({message.rstrip('.')}): see k8s/base/storage.yaml"
    if "node affinity/selector" in message:
        return f"no node has the labels of the pool {where}: add one (docs/cluster.md), or take another cluster.{stage}.pool"
    if taints := re.findall(r"untolerated taint \{([^}]*)\}", message):
        told = ", ".join(dict.fromkeys(taint.strip(": ") for taint in taints))
        return (
            f"no node of the pool {where} is open to it, for their taints ({told}): see tolerations in k8s/{stage}.yaml"
        )
    return f"it cannot be placed: {message}"


def terminated(pods: list[Object]) -> list[Object]:
    """How containers ended, this time or last time: all that did not end well and were not asked to end."""
    found = []
    for pod in pods:
        for status in pod.get("status", {}).get("containerStatuses") or ():
            for state in (status.get("state", {}), status.get("lastState", {})):
                ended = (state or {}).get("terminated")
                if ended and ended.get("exitCode") not in (0, SIGTERM):
                    found.append(ended)
    return found


def exit_code(ends: list[Object]) -> int:
    """The exit code of the container that failed first; 1 where none is known any more."""
    return next((end["exitCode"] for end in ends), 1)


def _last_lines(text: str, count: int = 12) -> str:
    return "\n".join(text.strip().splitlines()[-count:])
