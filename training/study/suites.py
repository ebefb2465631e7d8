"""What is measured: the table of suites, and the runs that one comes to. A new suite is a row."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from training.config import BenchmarkConfig, Config, ConfigError, Method
from training.study.datasets import DATASETS, VTAB

Protocol = Literal["few-shot", "full", "vtab-1k", "out-of-distribution"]
Axis = Literal["shots", "share", "noise", "dataset"]  # what the columns of a suite's table are


@dataclass(frozen=True)
class Upstream:
    """Where transfer starts: a network that saw `share` of upstream's pictures, `noise` of them under a wrong label.

    share 0: fresh filters; published: the name of weights in `benchmark.published`, empty for a network of our own.
    """

    arch: str
    share: float = 1.0
    noise: float = 0.0
    published: str = ""

    @property
    def label(self) -> str:
        if self.published:
            return self.published
        size = "fresh filters" if self.share == 0 else f"{self.share:.3g} of upstream" if self.share < 1 else "upstream"
        return f"{size}, {self.noise:.0%} wrong labels" if self.noise else size


@dataclass(frozen=True)
class Unit:
    """One run: a method on a draw of a dataset from an upstream. shots: examples per class, 0 where all are used."""

    protocol: Protocol
    dataset: str
    method: Method
    upstream: Upstream
    shots: int
    seed: int


@dataclass(frozen=True)
class Suite:
    """A table and its plots. steps: of fine-tuning, None for the HyperRule's; upstream_steps: likewise, for pretrain's."""

    about: str
    protocol: Protocol
    axis: Axis
    datasets: tuple[str, ...]
    shots: tuple[int, ...] = (0,)
    methods: tuple[Method, ...] = ("ridge", "linear", "finetune")
    archs: tuple[str, ...] = ()
    shares: tuple[float, ...] = (1.0,)
    noises: tuple[float, ...] = (0.0,)
    seeds: int = 3
    steps: int | None = None
    upstream_steps: int | None = None


SLIDES = ("ilsvrc", "cifar10", "cifar100", "pets", "flowers")
SHOTS = (1, 5, 10, 25, 100)
SUITES = {
    "demo": Suite(
        "few-shot transfer on the demo's data, from three sizes of upstream",
        "few-shot",
        "shots",
        ("digits", "textures"),
        (1, 5, 10, 25),
        shares=(0.02, 0.2, 1.0),
        steps=100,
    ),
    "full": Suite("all training examples", "full", "dataset", SLIDES, methods=("finetune",)),
    "few-shot": Suite("1 to 100 examples per class", "few-shot", "shots", SLIDES, SHOTS),
    "vtab": Suite("VTAB-1k: 19 tasks of 1,000 examples", "vtab-1k", "dataset", VTAB),
    "ood": Suite(
        "a network tuned on one dataset, asked about another",
        "out-of-distribution",
        "dataset",
        ("objectnet",),
        methods=("finetune",),
    ),
    "scaling": Suite(
        "sizes of upstream × architectures",
        "few-shot",
        "share",
        SLIDES,
        (10,),
        archs=("R50x1", "R50x3", "R101x1", "R101x3", "R152x4"),
        shares=(0.01, 0.1, 1.0),
    ),
    "noise": Suite("wrong labels upstream", "few-shot", "noise", SLIDES, (10,), noises=(0.0, 0.1, 0.2, 0.3, 0.4)),
}


def chosen(name: str, config: Config) -> Suite:
    """The suite of a name, with what `benchmark` in params.yaml sets in its place. Raises ConfigError."""
    if name not in SUITES:
        near = difflib.get_close_matches(name, SUITES, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"suite={name!r} is not known.{hint} Choices: {', '.join(SUITES)}.")
    stage: BenchmarkConfig = config.benchmark
    suite = SUITES[name]
    keys = ("datasets", "methods", "shots", "archs", "shares", "noises", "steps", "upstream_steps", "seeds")
    stated = {key: getattr(stage, key) for key in keys if getattr(stage, key) is not None}
    if suite.protocol != "few-shot" and "shots" in stated:
        raise ConfigError(f"benchmark.shots: the suite {name!r} uses all examples of its draw; few-shot takes shots.")
    if unknown := set(stated.get("datasets", ())) - set(DATASETS):
        raise ConfigError(f"benchmark.datasets: {unknown.pop()!r} is not a row. Choices: {', '.join(DATASETS)}.")
    suite = replace(suite, **stated)
    if suite.protocol == "out-of-distribution":
        _can_be_mapped(suite)
    return suite if suite.archs else replace(suite, archs=(config.upstream.arch,))


def _can_be_mapped(suite: Suite) -> None:
    if suite.methods != ("finetune",):
        raise ConfigError(
            f"benchmark.methods: {', '.join(suite.methods)}; out of distribution a tuned network is asked: finetune."
        )
    if alone := [name for name in suite.datasets if not DATASETS[name].tuned_on]:
        mapped = ", ".join(name for name, row in DATASETS.items() if row.tuned_on)
        raise ConfigError(f"benchmark.datasets: {alone[0]!r} maps to no other dataset's classes. Choices: {mapped}.")


def upstreams(suite: Suite, config: Config) -> list[Upstream]:
    """Every network that the suite starts from; published weights take the place of the project's own."""
    if config.benchmark.published:
        return [Upstream(row.arch, published=row.name) for row in config.benchmark.published]
    own = [Upstream(arch, share, noise) for arch in suite.archs for share in suite.shares for noise in suite.noises]
    return list(dict.fromkeys(replace(row, noise=0.0) if row.share == 0 else row for row in own))


def units(suite: Suite, config: Config) -> Iterator[Unit]:
    """All runs of a suite, those that share a network and a dataset together."""
    for upstream in upstreams(suite, config):
        for dataset in suite.datasets:
            tuned_on = DATASETS[dataset].tuned_on
            for shots in suite.shots:
                for method in suite.methods:
                    for seed in range(suite.seeds):
                        if suite.protocol == "out-of-distribution" and tuned_on:
                            yield Unit("full", tuned_on, method, upstream, 0, seed)
                        yield Unit(suite.protocol, dataset, method, upstream, shots, seed)
