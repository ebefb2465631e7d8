"""Following jobs to their end, in words: one with the log of rank 0, or a fleet; why they wait, and what was started again."""

import re
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

from training.cluster import explain
from training.cluster.jobs import PATIENCE_S, ClusterError, Jobs, Object

FLEET = "bit/stage=finetune"
LOOK_S = 60.0  # between two looks at why the jobs of a fleet wait: two requests for all of them
TOLD = 5  # reasons of a look that are printed


@dataclass
class Followed:
    """One job under a watch, which says what changes."""

    jobs: Jobs
    name: str
    patience_s: float = PATIENCE_S  # how long it may be refused the sight of the job's pods
    ends: list[Object] = field(default_factory=list)  # of its containers, as last seen: a failed job loses its pods
    seen: dict[str, set[str]] = field(default_factory=dict)  # pod's name → uids that it had
    said: str = ""
    tail: threading.Thread | None = None
    printed: str = ""  # time of the last line of the log
    unread: str = ""  # why the log cannot be read
    answered: float = field(default_factory=time.monotonic)  # when its pods were seen last

    def to_the_end(self) -> Object:
        job: Object = {}
        for news in self.jobs.watch(f"bit/job={self.name}", [self.name]):
            job = news or job
            if not job:
                continue
            state = explain.condition(job)
            over = state in explain.OVER
            try:
                self._look(job, state, over)
                self.answered = time.monotonic()
            except ClusterError as error:  # an outage the watch tells itself, and comes back to
                if error.refused and time.monotonic() - self.answered > self.patience_s:
                    raise
                continue
            if over:
                if self.tail:
                    self.tail.join(timeout=5)
                return job
        raise AssertionError("a watch has no end")

    def _look(self, job: Object, state: str, over: bool) -> None:
        self.pods = pods = self.jobs.pods(self.name)
        self.ends = explain.terminated(pods) or self.ends
        for one in pods:
            self.seen.setdefault(one["metadata"]["name"], set()).add(one["metadata"]["uid"])
        if over:
            return
        running = state == "Running" and any(one["status"].get("phase") == "Running" for one in pods)
        now = "running" if running else "waiting: " + explain.waiting(job, pods, *self._told(job))
        replaced = sum(len(uids) - 1 for uids in self.seen.values())
        notes = [explain.restarts(pods), f"preempted or lost, and resumed {replaced} times" if replaced else ""]
        if noted := "; ".join(note for note in notes if note):
            now += f" ({noted})"
        if now != self.said:
            self.said = now
            say(f"{self.name}: {now}")
        if running and (self.tail is None or not self.tail.is_alive()):
            self.tail = threading.Thread(target=self._print_logs, daemon=True)
            self.tail.start()

    def _told(self, job: Object) -> tuple[list[str], list[Object]]:
        suspended = job.get("spec", {}).get("runPolicy", {}).get("suspend")
        return self.jobs.events(job["metadata"]["name"]), self.jobs.workloads() if suspended else []

    def _print_logs(self) -> None:
        """Until the pod ends or the connection is cut: then the next thread goes on after the last line."""
        try:
            for stamp, line in self.jobs.logs(f"{self.name}-worker-0", follow=True, after=self.printed):
                say(f"  {line}")
                self.printed = stamp
        except ClusterError as error:  # the job is followed without it
            if self.unread != str(error):
                self.unread = str(error)
                say(f"{self.name}: its log cannot be read: {error}")


def follow_all(
    names: set[str], every: Jobs, ended: dict[str, Object], look_s: float = LOOK_S
) -> dict[str, list[Object]]:
    """Watches until all have ended, and says how many are where and, every `look_s` seconds, why those wait that do.

    Returns how containers ended that ended in vain, by job: a job that failed has no pods left to tell it.
    """
    jobs: dict[str, Object] = {}
    ends: dict[str, list[Object]] = {}
    looked: list[str] = []
    counted = ""
    for news in every.watch(FLEET, names - set(ended), pause_s=look_s):
        if news and (name := news["metadata"]["name"]) in names and name not in ended:
            jobs[name] = news
            if explain.condition(news) in explain.OVER:
                ended[name] = jobs.pop(name)
        now = _counts([*jobs.values(), *ended.values()], len(names))
        if now != counted:
            counted = now
            say(f"finetune, {len(names)} tenants: {now}")
        if len(ended) == len(names):
            break
        if news is None:
            told = _look(every, jobs, ends)
            if told and told != looked:
                say("\n".join(told))
            looked = told
    return ends


def _counts(jobs: list[Object], whole: int) -> str:
    states = Counter(explain.condition(job) for job in jobs)
    states["Created"] += whole - len(jobs)  # not seen yet
    return ", ".join(f"{count} {state.lower()}" for state, count in sorted(states.items()) if count)


def _look(every: Jobs, jobs: dict[str, Object], ends: dict[str, list[Object]]) -> list[str]:
    """Why jobs wait, or were started again: each reason once, with the first job that has it and how many more do."""
    try:
        pods: dict[str, list[Object]] = {}
        for pod in every.pods_of(FLEET):
            pods.setdefault(pod["metadata"]["labels"].get("bit/job", ""), []).append(pod)
        suspended = any(explain.condition(job) == "Suspended" for job in jobs.values())
        workloads = every.workloads() if suspended else []
    except ClusterError as error:  # the jobs are followed without it
        return [f"  why they wait cannot be seen: {error}"]
    reasons: dict[str, list[str]] = {}
    for name, job in sorted(jobs.items()):
        own = pods.get(name, [])
        ends[name] = explain.terminated(own) or ends.get(name, [])
        told = explain.restarts(own)
        if explain.condition(job) != "Running":
            told = explain.waiting(job, own, [], workloads) + (f" ({told})" if told else "")
        if told:
            alike = re.sub(r"\d+", "", told)  # places in a queue and counts of nodes differ
            reasons.setdefault(alike, []).append(f"{name}: {told}")
    common = sorted(reasons.values(), key=len, reverse=True)
    lines = [f"  {alike[0]}" + (f"; {len(alike) - 1} more like it" if alike[1:] else "") for alike in common[:TOLD]]
    return lines + (
        [f"  and {len(common) - TOLD} reasons more: `bit attach JOB` tells one job's"] if common[TOLD:] else []
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
