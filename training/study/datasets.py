"""The table of datasets that transfer is measured on. A new one is a row; it must be packed before it is measured."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from training.config import ConfigError
from training.data.shards import Dataset

Group = Literal["natural", "specialized", "structured", "demo"]


@dataclass(frozen=True)
class Row:
    """folder: where the packed shards are; get: what to download; flips, crops: whether the label survives them."""

    folder: str
    classes: int
    group: Group
    get: str
    flips: bool = True
    crops: bool = True


def _row(name: str, classes: int, group: Group, get: str, flips: bool = True, crops: bool = True) -> tuple[str, Row]:
    return name, Row(f"data/benchmark/{name}", classes, group, get, flips, crops)


DATASETS: dict[str, Row] = dict(
    [
        ("digits", Row("runs/pack/digits", 10, "demo", "`bit demo data`, then `bit pack digits`", flips=False)),
        ("textures", Row("runs/pack/textures", 3, "demo", "`bit demo data`, then `bit pack textures`")),
        _row("ilsvrc", 1000, "natural", "ILSVRC-2012 from image-net.org"),
        _row("objectnet", 313, "natural", "ObjectNet from objectnet.dev"),
        _row("cifar10", 10, "natural", "CIFAR-10 as folders of pictures"),
        _row("cifar100", 100, "natural", "CIFAR-100 as folders of pictures"),
        _row("caltech101", 102, "natural", "Caltech-101"),
        _row("dtd", 47, "natural", "Describable Textures"),
        _row("flowers", 102, "natural", "Oxford Flowers-102"),
        _row("pets", 37, "natural", "Oxford-IIIT Pets"),
        _row("sun397", 397, "natural", "SUN397"),
        _row("svhn", 10, "natural", "SVHN, cropped digits", flips=False),
        _row("camelyon", 2, "specialized", "PatchCamelyon"),
        _row("eurosat", 10, "specialized", "EuroSAT, RGB"),
        _row("resisc45", 45, "specialized", "NWPU-RESISC45"),
        _row("retinopathy", 5, "specialized", "Kaggle Diabetic Retinopathy"),
        _row("clevr-count", 8, "structured", "CLEVR, number of objects", crops=False),
        _row("clevr-distance", 6, "structured", "CLEVR, distance of the nearest object", crops=False),
        _row("dmlab", 6, "structured", "DMLab frames"),
        _row("kitti-distance", 4, "structured", "KITTI, distance of the nearest vehicle", crops=False),
        _row("dsprites-location", 16, "structured", "dSprites, x position", flips=False, crops=False),
        _row("dsprites-orientation", 16, "structured", "dSprites, orientation", flips=False, crops=False),
        _row("smallnorb-azimuth", 18, "structured", "smallNORB, azimuth", flips=False, crops=False),
        _row("smallnorb-elevation", 9, "structured", "smallNORB, elevation", crops=False),
    ]
)


def opened(name: str) -> Dataset:
    """The packed dataset of a row. Raises ConfigError with what to download and where to put it."""
    if name not in DATASETS:
        raise ConfigError(f"dataset {name!r} is not in the benchmark's table. Choices: {', '.join(DATASETS)}.")
    row = DATASETS[name]
    if not Path(row.folder, "index.json").is_file():
        raise ConfigError(
            f"{row.folder} is not there. Get {row.get}; pictures in <split>/<class>/ folders or a labels.csv are packed by "
            f"`training.pack.pack` into {row.folder}."
        )
    return Dataset.open(row.folder)
