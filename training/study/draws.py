"""Which examples a run of the benchmark sees: a pure function of (dataset, protocol, seed)."""

import hashlib
from functools import lru_cache

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from training.config import ConfigError
from training.data.dataset import Dataset, Split
from training.study.suites import Protocol

VTAB_TRAIN, VTAB_VALIDATION = 800, 200


class Drawn(Dataset):
    """A dataset whose splits are chosen examples of another; labels may be given anew (as noise does)."""

    def __init__(self, base: Dataset, rows: dict[str, NDArray[np.int64]], relabelled: list[list[int]] | None = None):
        digest = hashlib.sha256(base.fingerprint.encode())
        for name in sorted(rows):
            digest.update(name.encode() + rows[name].tobytes())
        digest.update(repr(relabelled).encode())
        super().__init__(base.folder, base.index, digest.hexdigest())
        table = base._examples
        if relabelled is not None:
            column = pa.array(relabelled, table.schema.field("labels").type)
            table = table.set_column(table.schema.get_field_index("labels"), "labels", column)
        self.tables = {name: table.take(indices) for name, indices in rows.items()}

    @property
    def splits(self) -> list[str]:
        return list(self.tables)

    def split(self, name: str) -> Split:
        return Split(self, name, self.tables[name])


def of(protocol: Protocol, data: Dataset, shots: int, seed: int) -> "Drawn":
    """The examples of a protocol: splits `train` and `test`, for VTAB-1k `validation` too."""
    if protocol == "few-shot":
        return few_shot(data, shots, seed)
    return vtab(data, seed) if protocol == "vtab-1k" else whole(data)


def whole(data: Dataset) -> Drawn:
    """Everything that is not for the test is for training, as in the paper's full transfers."""
    pool, test = _parts(data)
    return Drawn(data, {"train": pool, "test": test})


def most_shots(data: Dataset) -> int:
    """Examples that the smallest class has for training."""
    pool, _ = _parts(data)
    return int(np.bincount(labels_of(data)[pool], minlength=data.num_classes).min())


def few_shot(data: Dataset, shots: int, seed: int) -> Drawn:
    """`shots` training examples per class, tested on the whole test split. Raises ConfigError where a class has fewer."""
    labels, (pool, test) = labels_of(data), _parts(data)
    rng = np.random.default_rng((seed, shots))
    chosen = []
    for label in range(data.num_classes):
        of_class = pool[labels[pool] == label]
        if len(of_class) < shots:
            raise ConfigError(
                f"{data.url}: class {data.classes[label]!r} has {len(of_class)} examples to draw {shots} from; fewer shots."
            )
        chosen.append(rng.choice(of_class, shots, replace=False))
    return Drawn(data, {"train": np.sort(np.concatenate(chosen)), "test": test})


def vtab(data: Dataset, seed: int) -> Drawn:
    """VTAB-1k: 800 + 200 examples of those for training, whole test split. Source: Zhai et al., 2019."""
    pool, test = _parts(data)
    if len(pool) < VTAB_TRAIN + VTAB_VALIDATION:
        raise ConfigError(f"{data.url}: VTAB-1k draws 1,000 training examples; there are {len(pool)}.")
    order = np.random.default_rng(seed).permutation(pool)[: VTAB_TRAIN + VTAB_VALIDATION]
    rows = {"train": order[:VTAB_TRAIN], "validation": order[VTAB_TRAIN:]}
    return Drawn(data, {name: np.sort(indices) for name, indices in rows.items()} | {"test": test})


@lru_cache(maxsize=64)
def _parts(data: Dataset) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the examples for training (validation among them) and for the test."""
    if "test" not in data.splits:
        raise ConfigError(
            f"{data.url} has no split `test`, which the benchmark measures on; it has {', '.join(data.splits)}."
        )
    tested = np.array(data._examples["split"].to_pylist()) == "test"
    return np.flatnonzero(~tested), np.flatnonzero(tested)


def upstream(data: Dataset, share: float, noise: float, seed: int) -> Dataset:
    """`share` of the training examples, `noise` of those under another class, drawn evenly; the other splits as they are."""
    if share == 1 and noise == 0:
        return data
    splits = np.array(data._examples["split"].to_pylist())
    rows = {name: np.flatnonzero(splits == name) for name in data.splits}
    count = max(1, round(share * len(rows["train"])))
    order = np.random.default_rng(seed).permutation(rows["train"])[:count]
    rows["train"] = np.sort(order)
    if noise == 0:
        return Drawn(data, rows)
    labels, rng = labels_of(data).copy(), np.random.default_rng((seed, 0x7015E))
    flipped = rng.permutation(order)[: round(noise * count)]
    labels[flipped] = (labels[flipped] + rng.integers(1, data.num_classes, len(flipped))) % data.num_classes
    return Drawn(data, rows, [[int(label)] for label in labels])


@lru_cache(maxsize=64)
def labels_of(data: Dataset) -> NDArray[np.int64]:
    """The class of every example, int64 [n]. Raises ConfigError where examples have several."""
    if data.multi_label:
        raise ConfigError(f"{data.url} has several labels a picture; the benchmark's protocols need one.")
    return np.array([labels[0] for labels in data._examples["labels"].to_pylist()], np.int64)
