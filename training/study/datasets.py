"""The table of datasets that transfer is measured on: one row each. Any source becomes shards once, below `benchmark.root`.

A dataset lies in <root>/<folder>, as its authors, torchvision, TFDS or Hugging Face lay it out, in class folders, or packed; a
.dvc file beside it may track it. Nothing is downloaded: absent data says what to get and where to put it.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from services import preprocess
from training.config import ConfigError
from training.data import shards
from training.data.dataset import Dataset
from training.data.shards import Example
from training.pack import read_bytes, split_of
from training.study import arrays, authors, demo, folders, hub, labels, tfds
from training.study.source import Label, Reader, Source, Task, png

Group = Literal["natural", "specialized", "structured", "demo"]
FRESH = {"train": 0.8, "test": 0.2}  # by content, where a source has no test split
SHARD_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Row:
    """One dataset.

    get: what to download; flips, crops: whether the label survives them; folder: below the root, the name where empty;
    native: reader of the authors' own files; tfds: its name there; label: the field of the label, or how it follows from an
    example's fields; test: the split that is tested on; tuned_on: the dataset whose classes its own map to.
    """

    classes: int
    group: Group
    get: str
    flips: bool = True
    crops: bool = True
    folder: str = ""
    native: Reader | None = None
    tfds: str = ""
    label: Label = "label"
    test: str = "test"
    tuned_on: str = ""
    black_and_white: bool = False  # pictures of 0 and 1


# Datasets of two tasks each, whose labels no crop survives.
CLEVR = partial(
    Row,
    group="structured",
    get="CLEVR_v1.0.zip from cs.stanford.edu/people/jcjohns/clevr",
    crops=False,
    folder="clevr",
    native=authors.clevr,
    tfds="clevr",
    test="validation",
)
DSPRITES = partial(
    Row,
    16,
    "structured",
    "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz from github.com/google-deepmind/dsprites-dataset",
    flips=False,  # the place in the picture is the label, or part of it
    crops=False,
    folder="dsprites",
    native=arrays.dsprites,
    tfds="dsprites",
    black_and_white=True,
)
NORB = partial(
    Row,
    group="structured",
    get="the .mat.gz files of smallNORB from cs.nyu.edu/~ylclab/data/norb-v1.0-small",
    crops=False,
    folder="smallnorb",
    native=arrays.smallnorb,
    tfds="smallnorb",
)
DATASETS: dict[str, Row] = {
    "digits": Row(10, "demo", "scikit-learn, which brings it", flips=False, native=demo.digits),
    "textures": Row(3, "demo", "scikit-image, which brings it", native=demo.textures),
    "ilsvrc": Row(
        1000,
        "natural",
        "ILSVRC-2012 from image-net.org as train/<wnid>/ and val/<wnid>/",
        tfds="imagenet2012",
        test="validation",
    ),
    "objectnet": Row(
        313, "natural", "objectnet-1.0.zip from objectnet.dev", native=authors.objectnet, tuned_on="ilsvrc"
    ),
    "cifar10": Row(
        10,
        "natural",
        "cifar-10-binary.tar.gz from cs.toronto.edu/~kriz/cifar.html",
        native=arrays.cifar10,
        tfds="cifar10",
    ),
    "cifar100": Row(
        100,
        "natural",
        "cifar-100-binary.tar.gz from cs.toronto.edu/~kriz/cifar.html",
        native=arrays.cifar100,
        tfds="cifar100",
    ),
    "caltech101": Row(102, "natural", "caltech-101.zip from data.caltech.edu/records/mzrjq-6wc02", tfds="caltech101"),
    "dtd": Row(47, "natural", "dtd-r1.0.1.tar.gz from robots.ox.ac.uk/~vgg/data/dtd", native=authors.dtd, tfds="dtd"),
    "flowers": Row(
        102,
        "natural",
        "102flowers.tgz, imagelabels.mat and setid.mat from robots.ox.ac.uk/~vgg/data/flowers/102",
        native=authors.flowers,
        tfds="oxford_flowers102",
    ),
    "pets": Row(
        37,
        "natural",
        "images.tar.gz and annotations.tar.gz from robots.ox.ac.uk/~vgg/data/pets",
        native=authors.pets,
        tfds="oxford_iiit_pet",
    ),
    "sun397": Row(
        397, "natural", "SUN397 from vision.princeton.edu/projects/2010/SUN, as TFDS lays it out", tfds="sun397"
    ),
    "svhn": Row(
        10,
        "natural",
        "train_32x32.mat and test_32x32.mat from ufldl.stanford.edu/housenumbers",
        flips=False,
        native=arrays.svhn,
        tfds="svhn_cropped",
    ),
    "camelyon": Row(2, "specialized", "PatchCamelyon, as TFDS or Hugging Face lay it out", tfds="patch_camelyon"),
    "eurosat": Row(10, "specialized", "EuroSAT.zip (RGB) from zenodo.org/records/7711810", tfds="eurosat"),
    "resisc45": Row(45, "specialized", "NWPU-RESISC45.rar, unpacked", tfds="resisc45"),
    "retinopathy": Row(
        5,
        "specialized",
        "train/ and trainLabels.csv from kaggle.com/c/diabetic-retinopathy-detection",
        native=authors.retinopathy,
        tfds="diabetic_retinopathy_detection",
    ),
    "clevr-count": CLEVR(8, label=labels.clevr_count),
    "clevr-distance": CLEVR(6, label=labels.clevr_distance),
    "dmlab": Row(6, "structured", "dmlab, as TFDS lays it out", tfds="dmlab"),
    "kitti-distance": Row(
        4,
        "structured",
        "data_object_image_2.zip and data_object_label_2.zip from cvlibs.net/datasets/kitti",
        crops=False,
        folder="kitti",
        native=authors.kitti,
        tfds="kitti",
        label=labels.kitti_distance,
    ),
    "dsprites-location": DSPRITES(label=labels.dsprites_location),
    "dsprites-orientation": DSPRITES(label=labels.dsprites_orientation),
    "smallnorb-azimuth": NORB(18, label="label_azimuth", flips=False),
    "smallnorb-elevation": NORB(9, label="label_elevation"),
}
# The 19 tasks of VTAB, in its own order. Source: Zhai et al., 2019, table 2.
VTAB = (
    *("caltech101", "cifar100", "dtd", "flowers", "pets", "sun397", "svhn"),
    *("camelyon", "eurosat", "resisc45", "retinopathy"),
    *("clevr-count", "clevr-distance", "dmlab", "dsprites-location", "dsprites-orientation"),
    *("kitti-distance", "smallnorb-azimuth", "smallnorb-elevation"),
)


def opened(name: str, root: Path) -> Dataset:
    """The dataset of a row, packed first where it is not yet.

    Raises ConfigError for a name that the table lacks, and for absent data with what to download and where to put it.
    """
    if name not in DATASETS:
        raise ConfigError(f"dataset {name!r} is not in the benchmark's table. Choices: {', '.join(DATASETS)}.")
    row, packed = DATASETS[name], root / "packed" / name
    if (packed / shards.INDEX).is_file():
        return Dataset.open(packed)
    folder = root / (row.folder or name)
    if (folder / shards.INDEX).is_file():
        return Dataset.open(folder)
    source = found(row, folder)
    if source is None:
        raise ConfigError(absent(name, row, folder))
    if len(source.classes) != row.classes:
        raise ConfigError(
            f"{folder} holds {len(source.classes)} classes, {name} has {row.classes}. Is it complete? Get {row.get}."
        )
    partial = packed.with_name(f"{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shards.write(
        partial, examples(source, row), source.classes, False, SHARD_BYTES, {"source": name, "answers": source.answers}
    )
    partial.rename(packed)
    return Dataset.open(packed)


def found(row: Row, folder: Path) -> Source | None:
    """The source of a row in the first layout that its folder has."""
    task = Task(row.label, row.classes)
    if row.native and (source := row.native(folder, task)):
        return source
    for reader in (tfds.read, hub.read, folders.read):
        if source := reader(folder, task):
            return source
    return None


def absent(name: str, row: Row, folder: Path) -> str:
    """What a person must do to have the dataset."""
    if Path(f"{folder}.dvc").is_file():
        return f"{folder} is tracked by DVC and not here: run `dvc pull {folder}.dvc`."
    kinds = [f"TFDS's {row.tfds}/ with its tfrecord files"] if row.tfds else []
    kinds += ["Hugging Face's parquet files", "<split>/<class>/ folders", "shards of `bit pack`"]
    return f"{folder} does not hold {name}. Put there what {row.get} unpacks to; also read: {', '.join(kinds)}."


def examples(source: Source, row: Row) -> Iterator[tuple[str, Example]]:
    """(split, example) of a source. Splits are train, validation and test; without a test split the content decides."""
    for number, (split, label, data) in enumerate(source.samples):
        read = read_bytes(data, f"example {number}")
        if row.black_and_white and not read.error:
            read = read_bytes(png(np.minimum(preprocess.decode(data)[..., 0], 1) * 255), read.path)
        if read.error:
            raise ConfigError(f"{source.place}: {read.path} cannot be read: {read.error}. Get the dataset again.")
        if split is None:
            split = split_of(read.sha256, FRESH)
        elif row.test != "test":
            if split == "test":  # its labels were never published
                continue
            split = "test" if split == row.test else split
        yield split, Example(f"{number:08d}", read.data, read.suffix, (label,), read.width, read.height, read.sha256)
