"""Which autoscaling settings serve a day and a stormy afternoon best: simulated against the measured service.

    make bench-autoscaling      (2 minutes; writes benchmarks/results/autoscaling-DATE.json and docs/images/autoscaling.png)

One instance is a queue before its cores; requests go to a random one, as kube-proxy sends them. What is simulated of the cluster:
Prometheus' scrapes (a gauge is a sample, not a mean), the HPA's look every 15 s with its 10 % tolerance, its policies and its
window, and the time until a new pod answers. Cost is instance hours. The instance's figures are those of INSTANCE.
"""

import argparse
import json
import math
import platform
from collections import deque
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from numpy.typing import NDArray

RESULTS = Path(__file__).with_name("results")
PICTURE = Path(__file__).parents[1] / "docs/images/autoscaling.png"
STEP_S, SYNC_S, TOLERANCE = 0.25, 15.0, 0.1  # the HPA's own defaults
SLOW_S = 0.5  # an answer that took longer counts as slow
SWAPS_PER_HOUR = 12.0  # of all tenants together


@dataclass(frozen=True)
class Instance:
    """Measured by benchmarks/service_model.py (R50x1 at 224 pixels, one worker, as the chart's default has it, on an EPYC core,
    November 2026): 23.0 answers/s when busy, 44 ms alone, 2.8 s from process to ready, 2.3 s for a swap on an idle core.

    pod_s: before the process starts (assumed: scheduling, an image that the node has, probes); swap_share: of the core that
    loading takes beside a busy worker, by their niceness (15 and 5: the kernel's weights 36 and 335): a swap lasts longer there.
    """

    workers: int = 1
    capacity: float = 23.0
    start_s: float = 2.8
    pod_s: float = 12.2
    max_queue_s: float = 2.0
    swap_s: float = 2.3
    swap_share: float = 36 / (36 + 335)

    @property
    def cost_s(self) -> float:
        """A worker's time for one picture."""
        return self.workers / self.capacity


INSTANCE = Instance()


@dataclass(frozen=True)
class Settings:
    """The chart's autoscaling values; None: not asked. Defaults are the chart's."""

    in_flight: float | None = 1.5
    queue_ms: float | None = 100.0
    average_s: float = 30.0
    scrape_s: float = 10.0
    min_replicas: int = 2
    max_replicas: int = 10
    down_window_s: float = 300.0

    def wanted(self, in_flight: float, queue_s: float) -> float:
        """Instances that the load warrants, not rounded: the larger of the two triggers, as the HPA takes it."""
        by_flight = in_flight / self.in_flight if self.in_flight else 0.0
        return max(by_flight, queue_s * 1000 / self.queue_ms if self.queue_ms else 0.0)


@dataclass
class Trace:
    """What happened, per simulated step; latencies are those of the requests that came in the step."""

    rate: NDArray[np.float64]
    latency_s: NDArray[np.float64]
    arrived: NDArray[np.float64]
    refused: NDArray[np.float64]
    replicas: NDArray[np.float64]

    def figures(self) -> dict[str, float]:
        answered = self.arrived - self.refused
        order = np.argsort(self.latency_s)
        share = np.cumsum(answered[order]) / answered.sum()
        p50, p99 = (self.latency_s[order][np.searchsorted(share, q)] for q in (0.5, 0.99))
        return {
            "p50_ms": round(1000 * float(p50), 1),
            "p99_ms": round(1000 * float(p99), 1),
            "slow_share": round(float(answered[self.latency_s > SLOW_S].sum() / self.arrived.sum()), 5),
            "refused_share": round(float(self.refused.sum() / self.arrived.sum()), 5),
            "instance_hours": round(float(self.replicas.sum() * STEP_S / 3600), 2),
            "changes": float(np.count_nonzero(np.diff(self.replicas))),
        }


def daily(hours: float = 24, low: float = 4, high: float = 120, seed: int = 0) -> NDArray[np.float64]:
    """Requests/s over a day: night, morning rise, evening peak, and slow noise of 10 %."""
    t = np.arange(0, hours * 3600, STEP_S)
    wave = 0.5 - 0.5 * np.cos(2 * np.pi * t / 86_400) * (1 + 0.3 * np.sin(4 * np.pi * t / 86_400))
    points = np.random.default_rng(seed).normal(0, 0.1, int(hours * 60) + 2)
    noise = np.interp(t, np.arange(len(points)) * 60.0, points)
    return np.clip((low + (high - low) * np.clip(wave, 0, 1)) * (1 + noise), 0.5, None)


def bursty(hours: float = 4, base: float = 12, factor: float = 6, seed: int = 0) -> NDArray[np.float64]:
    """A low load with bursts of five minutes, every quarter of an hour on average, that rise within ten seconds."""
    random, t = np.random.default_rng(seed), np.arange(0, hours * 3600, STEP_S)
    rate, at = np.full(len(t), base, float), 0.0
    while (at := at + random.exponential(900) + 60) < hours * 3600:
        height = base * random.uniform(2, factor)
        shape = np.clip(np.minimum((t - at) / 10, (at + 300 - t) / 10), 0, 1)
        rate = np.maximum(rate, base + (height - base) * shape)
        at += 300
    return rate


def simulate(
    rate: NDArray[np.float64],
    settings: Settings,
    instance: Instance = INSTANCE,
    seed: int = 1,
    swaps_per_hour: float = SWAPS_PER_HOUR,
) -> Trace:
    """Plays the requests against the instances that the settings lead to.

    swaps_per_hour: promotions, which every instance follows.
    """
    random, steps = np.random.default_rng(seed), len(rate)
    latency, arrived, refused, counts = (np.zeros(steps) for _ in range(4))
    backlog = np.zeros(max(settings.min_replicas, math.ceil(rate[0] / instance.capacity)))  # seconds of work at each
    starting: list[float] = []  # when each further pod will be ready
    samples: deque[tuple[float, float]] = deque(maxlen=max(1, round(settings.average_s / settings.scrape_s)))
    wishes: deque[int] = deque(maxlen=max(1, round(settings.down_window_s / SYNC_S)))
    in_flight, last_down = 0.0, -math.inf
    swap_every_s = 3600 / swaps_per_hour if swaps_per_hour else math.inf
    every_scrape, every_sync = round(settings.scrape_s / STEP_S), round(SYNC_S / STEP_S)
    for step in range(steps):
        now = step * STEP_S
        swapping = now % swap_every_s < instance.swap_s / instance.swap_share
        per_step = instance.workers * STEP_S * (1 - instance.swap_share * swapping)
        while starting and starting[0] <= now:
            starting.pop(0)
            backlog = np.append(backlog, 0.0)
        count = random.poisson(rate[step] * STEP_S / len(backlog), len(backlog))
        full = backlog / instance.workers > instance.max_queue_s
        accepted = np.where(full, 0, count)
        waits = np.maximum(backlog + (accepted - 1) / 2 * instance.cost_s - per_step / 2, 0) / instance.workers
        arrived[step], refused[step] = count.sum(), (count - accepted).sum()
        if total := accepted.sum():
            latency[step] = float((waits * accepted).sum() / total) + instance.cost_s
        backlog = backlog + accepted * instance.cost_s
        served = np.minimum(backlog, per_step)
        backlog -= served
        in_flight = float(served.sum() / STEP_S + backlog.sum() / instance.cost_s)
        counts[step] = len(backlog) + len(starting)
        if step % every_scrape == 0:
            samples.append((in_flight, float(backlog.sum() / instance.workers)))
        if step % every_sync == 0:
            current = len(backlog) + len(starting)
            raw = settings.wanted(*np.mean(samples, axis=0))
            wish = current if abs(raw / current - 1) <= TOLERANCE else math.ceil(raw)
            wishes.append(min(settings.max_replicas, max(settings.min_replicas, wish)))
            if wishes[-1] > current:  # +100 % or +4, whichever is more, per 15 s
                more = min(wishes[-1], max(2 * current, current + 4)) - current
                starting += [now + instance.pod_s + instance.start_s] * more
            elif max(wishes) < current and now - last_down >= 60 and not starting:  # −1 per minute
                last_down, backlog = now, np.delete(backlog, int(np.argmin(backlog)))
    return Trace(rate, latency, arrived, refused, counts)


DEFAULT = Settings()
ALTERNATIVES = {
    "default": DEFAULT,
    "in flight 1 each": replace(DEFAULT, in_flight=1.0),
    "in flight 2 each": replace(DEFAULT, in_flight=2.0),
    "in flight 4 each": replace(DEFAULT, in_flight=4.0),
    "in flight 8 each": replace(DEFAULT, in_flight=8.0),
    "in flight alone": replace(DEFAULT, queue_ms=None),
    "queue alone": replace(DEFAULT, in_flight=None),
    "queue 30 ms": replace(DEFAULT, queue_ms=30.0),
    "queue 500 ms": replace(DEFAULT, queue_ms=500.0),
    "averaged 2 min": replace(DEFAULT, average_s=120.0),
    "scraped every 5 s": replace(DEFAULT, scrape_s=5.0),
    "scraped every 30 s": replace(DEFAULT, scrape_s=30.0),
    "down window 60 s": replace(DEFAULT, down_window_s=60.0),
    "at least 1": replace(DEFAULT, min_replicas=1),
    "at most 20": replace(DEFAULT, max_replicas=20),
    "fixed at 10": replace(DEFAULT, min_replicas=10),
}


SHOWN = ("default", "averaged 2 min", "queue alone")


def draw(traces: dict[tuple[str, str], Trace], path: Path) -> None:
    """Load, instances, latency and cost over time, one column per traffic, for the default and two alternatives."""
    mpl.use("Agg")
    figure, axes = plt.subplots(4, 2, figsize=(12, 10), sharex="col", constrained_layout=True)
    for column, traffic in enumerate(("daily", "bursty")):
        for name in SHOWN:
            trace = traces[traffic, name]
            every = round((300 if traffic == "daily" else 30) / STEP_S)
            length = len(trace.rate) // every * every
            hours = np.arange(0, length, every) * STEP_S / 3600
            answered = np.maximum((trace.arrived - trace.refused)[:length].reshape(-1, every), 1e-9)
            mean = (trace.latency_s[:length].reshape(-1, every) * answered).sum(1) / answered.sum(1)
            axes[1, column].step(hours, trace.replicas[:length:every], label=name)
            axes[2, column].plot(hours, 1000 * mean, label=name)
            axes[3, column].plot(hours, np.cumsum(trace.replicas)[:length:every] * STEP_S / 3600, label=name)
        axes[0, column].plot(hours, trace.rate[:length:every], color="black")
        axes[0, column].set_title(f"{traffic}: requests per second")
        axes[1, column].set_title("instances")
        axes[2, column].set_title("latency, mean in ms")
        axes[2, column].set_yscale("log")
        axes[3, column].set_title("cost so far, instance hours")
        axes[3, column].set_xlabel("hours")
        axes[1, column].legend(loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--day", type=float, default=24, help="hours of the daily traffic")
    parser.add_argument("--storm", type=float, default=8, help="hours of the bursty traffic")
    arguments = parser.parse_args()
    traffics = {"daily": daily(arguments.day), "bursty": bursty(arguments.storm)}
    traces, figures = {}, {}
    for traffic, rate in traffics.items():
        print(f"{traffic:20} {'p50 ms':>8} {'p99 ms':>8} {'slow':>8} {'refused':>8} {'hours':>8} {'changes':>8}")
        for name, settings in ALTERNATIVES.items():
            trace = traces[traffic, name] = simulate(rate, settings)
            found = figures[f"{traffic}: {name}"] = trace.figures()
            slow, refused = f"{found['slow_share']:.2%}", f"{found['refused_share']:.2%}"
            print(
                f"  {name:18} {found['p50_ms']:8.0f} {found['p99_ms']:8.0f} {slow:>8} {refused:>8}"
                f" {found['instance_hours']:8.1f} {found['changes']:8.0f}",
                flush=True,
            )
    draw(traces, PICTURE)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"autoscaling-{datetime.now(UTC):%Y-%m-%d}.json"
    told = {"instance": asdict(INSTANCE), "default": asdict(DEFAULT), "machine": platform.machine(), "figures": figures}
    path.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
