"""Following one job to its end, in words: its state, why it waits, what was started again, and the log of rank 0."""

import sys
import threading
import time
from dataclasses import dataclass, field

from training.cluster import explain
from training.cluster.jobs import PATIENCE_S, ClusterError, Jobs, Object


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


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
