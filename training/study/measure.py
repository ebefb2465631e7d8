"""One run of the benchmark: its network, its examples, its method → accuracy. What decided it has a hash."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from training import finetune, receipt
from training.config import Config, ConfigError, FinetuneConfig
from training.data.dataset import Dataset
from training.engine import inference, memory
from training.engine.distributed import World
from training.engine.fit import View, fit
from training.models import npz, zoo
from training.models.resnet import ResNet
from training.study import draws, probe
from training.study.datasets import DATASETS
from training.study.suites import Suite, Unit
from training.study.upstreams import Start

BATCH = 128  # pictures evaluated together


@dataclass(frozen=True)
class Measured:
    accuracy: float
    validation_accuracy: float | None
    seconds: float


class Bench:
    """Measures runs of one suite. work: where the tuned networks are kept that runs out of distribution share."""

    def __init__(self, config: Config, suite: Suite, data: dict[str, Dataset], work: Path, world: World) -> None:
        self.config, self.data, self.steps, self.work, self.world = config, data, suite.steps, work, world
        self.keep = suite.protocol == "out-of-distribution"
        self._kept: tuple[str, NDArray[np.float32]] | None = None  # features of the last test split

    def drawn(self, unit: Unit) -> draws.Drawn:
        """The examples of a run; out of distribution those of the dataset that is tuned on."""
        return draws.of(unit.protocol, self.data[trained_on(unit)], unit.shots, unit.seed)

    def decides(self, unit: Unit, data: Dataset) -> dict[str, Any]:
        """All that decides a run's result beside its examples and its upstream."""
        stage = self._stage(unit)
        rule = finetune.rule_for(stage, data)
        told: dict[str, Any] = {"crop": rule.crop}
        if unit.method == "ridge":
            return told | {"l2": self.config.benchmark.l2}
        if unit.method == "finetune":
            told |= asdict(rule) | stage.decisive() | asdict(self._view(unit, rule.resize, rule.crop))
            told |= {"head_std": self.config.benchmark.head_std}
        return told

    def hashes(self, unit: Unit) -> tuple[str, str]:
        """(config_hash, data_hash) of a run."""
        data = self.drawn(unit)
        asked = self.data[unit.dataset].fingerprint if unit.protocol == "out-of-distribution" else ""
        return receipt.hash_of(str(self.decides(unit, data))), receipt.hash_of(data.fingerprint, asked)

    def measure(self, unit: Unit, start: Start) -> Measured:
        began, data = time.perf_counter(), self.drawn(unit)
        if unit.method == "finetune":
            accuracy, validation = self._finetuned(unit, start, data)
        else:
            accuracy, validation = self._probed(unit, start, data)
        return Measured(accuracy, validation, time.perf_counter() - began)

    def _probed(self, unit: Unit, start: Start, data: draws.Drawn) -> tuple[float, float | None]:
        model = self._network(unit, start, data).to(self.world.device)
        crop = finetune.rule_for(self._stage(unit), data).crop
        train, splits = data.split("train"), ["test", *(["validation"] if "validation" in data.splits else [])]
        fitted, told = probe.features(model, train, crop), {}
        for name in splits:
            split = data.split(name)
            asked = (
                self._test_features(unit, start, model, data, crop)
                if name == "test"
                else probe.features(model, split, crop)
            )
            given = probe.answers(
                unit.method, fitted, train.targets(), asked, data.num_classes, self.config.benchmark.l2
            )
            told[name] = float((given == split.targets()).mean())
        return told["test"], told.get("validation")

    def _test_features(
        self, unit: Unit, start: Start, model: ResNet, data: draws.Drawn, crop: int
    ) -> NDArray[np.float32]:
        """Runs that follow each other share a test split and a network; fresh filters are those of their seed."""
        own = f"{start.sha256} {unit.dataset} {crop} {unit.seed if start.path is None else ''}"
        if self._kept is None or self._kept[0] != own:
            self._kept = own, probe.features(model, data.split("test"), crop)
        return self._kept[1]

    def _finetuned(self, unit: Unit, start: Start, data: draws.Drawn) -> tuple[float, float | None]:
        stage, decides = self._stage(unit), self.decides(unit, data)
        rule = finetune.rule_for(stage, data)
        model = self._network(unit, start, data)
        own = receipt.hash_of(start.sha256, str(decides), data.fingerprint)
        tuned, history = self.work / f"tuned-{own}.npz", None
        if self.keep and tuned.is_file():
            npz.load(model, tuned).to(self.world.device)
        else:
            recipe = finetune.recipe_for(stage, rule, data.multi_label)
            recipe = memory.prepare(model, replace(recipe, evaluate_every=recipe.steps), stage, rule.crop, self.world)
            decides |= {"upstream": start.sha256, "data": data.fingerprint}
            name, view = f"benchmark-{unit.dataset}-{own}", self._view(unit, rule.resize, rule.crop)
            history = fit(model, recipe, data, view, self.world, name=name, decides=decides, record=lambda *_: None)
            if self.keep:
                npz.save(model, tuned)
        if unit.protocol == "out-of-distribution":
            return self._mapped(model, unit, data, rule.crop), None
        accuracy = history["test_accuracy"][-1][1] if history else self._accuracy(model, data, "test", rule.crop)
        validation = self._accuracy(model, data, "validation", rule.crop) if "validation" in data.splits else None
        return accuracy, validation

    def _accuracy(self, model: ResNet, data: Dataset, name: str, crop: int) -> float:
        split = data.split(name)
        answers = inference.predict(model, split, crop, BATCH, data.multi_label)
        return inference.score(answers, split.targets())["accuracy"]

    def _mapped(self, model: ResNet, unit: Unit, tuned_on: Dataset, crop: int) -> float:
        """Share of the other dataset's pictures whose answer, of all classes tuned on, its mapping calls right."""
        data = self.data[unit.dataset]
        right = mapping(data, tuned_on.classes)
        split = data.split("test")
        given = inference.predict(model, split, crop, BATCH, data.multi_label).argmax(1)
        counted = [
            answer in right[label] for answer, label in zip(given, split.targets(), strict=True) if label in right
        ]
        return float(np.mean(counted))

    def _stage(self, unit: Unit) -> FinetuneConfig:
        stage = self.config.finetune
        return stage.model_copy(update={"seed": unit.seed, "steps": self.steps or stage.steps})

    def _view(self, unit: Unit, resize: int, crop: int) -> View:
        row, stage = DATASETS[trained_on(unit)], self.config.finetune
        return View(resize, crop, row.flips and stage.flips, row.crops and stage.crops)

    def _network(self, unit: Unit, start: Start, data: Dataset) -> ResNet:
        """The upstream network under a head of its own, drawn by the seed; fresh filters are drawn by it too."""
        torch.manual_seed(unit.seed)
        model = zoo.create(unit.upstream.arch, data.num_classes)
        if start.path:
            npz.load(model, start.path, head=False)
        if self.config.benchmark.head_std:
            torch.nn.init.normal_(model.head.weight, std=self.config.benchmark.head_std)
        return model


def trained_on(unit: Unit) -> str:
    """The dataset whose examples a run trains on."""
    return DATASETS[unit.dataset].tuned_on if unit.protocol == "out-of-distribution" else unit.dataset


def mapping(data: Dataset, classes: list[str]) -> dict[int, set[int]]:
    """Class of a dataset → the classes tuned on that answer for it. Raises ConfigError where none or an unknown one does."""
    number = {name: index for index, name in enumerate(classes)}
    right: dict[int, set[int]] = {}
    for name, answers in data.index["pack"].get("answers", {}).items():
        for answer in answers:
            if answer not in number and not (isinstance(answer, int) and 0 <= answer < len(classes)):
                raise ConfigError(f"{data.url}: the mapping of {name!r} names {answer!r}, which was not tuned on.")
            right.setdefault(data.classes.index(name), set()).add(number.get(answer, answer))
    if not right:
        raise ConfigError(f"{data.url} maps none of its classes; give a mapping.csv with the columns class and answer.")
    return right
