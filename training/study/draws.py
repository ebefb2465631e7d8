"""Which examples a run of the benchmark sees: a pure function of (dataset, protocol, seed)."""

import hashlib

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from training.config import ConfigError
from training.data.shards import Dataset, Split

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


def few_shot(data: Dataset, shots: int, seed: int) -> Drawn:
    """`shots` examples per class of the pool, tested on the rest of the dataset: half of all examples, the same for every seed.

    The pool is the other half. Raises ConfigError where a class has fewer examples there.
    """
    labels = labels_of(data)
    held_out = np.random.default_rng(0x7E57).permutation(len(labels))[: len(labels) // 2]
    pool = np.setdiff1d(np.arange(len(labels)), held_out)
    rng = np.random.default_rng((seed, shots))
    chosen = []
    for label in range(data.num_classes):
        of_class = pool[labels[pool] == label]
        if len(of_class) < shots:
            raise ConfigError(
                f"{data.url}: class {data.classes[label]!r} has {len(of_class)} examples to draw {shots} from; fewer shots."
            )
        chosen.append(rng.choice(of_class, shots, replace=False))
    return Drawn(data, {"train": np.sort(np.concatenate(chosen)), "test": np.sort(held_out)})


def vtab(data: Dataset, seed: int) -> Drawn:
    """VTAB-1k: 800 + 200 examples of the split `train`, whole test split. Source: Zhai et al., 2019."""
    splits = np.array(data._examples["split"].to_pylist())
    train = np.flatnonzero(splits == "train")
    if len(train) < VTAB_TRAIN + VTAB_VALIDATION:
        raise ConfigError(f"{data.url}: VTAB-1k draws 1,000 training examples; there are {len(train)}.")
    order = np.random.default_rng(seed).permutation(train)[: VTAB_TRAIN + VTAB_VALIDATION]
    rows = {"train": order[:VTAB_TRAIN], "validation": order[VTAB_TRAIN:], "test": np.flatnonzero(splits == "test")}
    return Drawn(data, {name: np.sort(indices) for name, indices in rows.items()})


def noisy(data: Dataset, share: float, seed: int) -> Drawn:
    """The dataset with `share` of its training labels replaced by another class, drawn evenly. Raises ConfigError."""
    if not 0 <= share <= 1:
        raise ConfigError(f"label noise {share}: a share from 0 to 1 is expected.")
    labels, splits = labels_of(data), np.array(data._examples["split"].to_pylist())
    train = np.flatnonzero(splits == "train")
    rng = np.random.default_rng(seed)
    flipped = rng.permutation(train)[: round(share * len(train))]
    labels[flipped] = (labels[flipped] + rng.integers(1, data.num_classes, len(flipped))) % data.num_classes
    rows = {name: np.flatnonzero(splits == name) for name in data.splits}
    return Drawn(data, rows, [[int(label)] for label in labels])


def part(data: Dataset, share: float, seed: int) -> Drawn:
    """`share` of the training examples, the other splits whole: a smaller upstream."""
    splits = np.array(data._examples["split"].to_pylist())
    rows = {name: np.flatnonzero(splits == name) for name in data.splits}
    count = max(1, round(share * len(rows["train"])))
    rows["train"] = np.sort(np.random.default_rng(seed).permutation(rows["train"])[:count])
    return Drawn(data, rows)


def labels_of(data: Dataset) -> NDArray[np.int64]:
    """The class of every example, int64 [n]. Raises ConfigError where examples have several."""
    if data.multi_label:
        raise ConfigError(f"{data.url} has several labels a picture; the benchmark's protocols need one.")
    return np.array([labels[0] for labels in data._examples["labels"].to_pylist()], np.int64)
