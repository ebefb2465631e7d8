"""Datasets that their authors publish as picture files beside tables, from Pets to KITTI."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from training.data.sources import SourceError
from training.study.source import Sample, Source, Task, png

BORDER = 2  # ObjectNet's pictures have a red frame of so many pixels, which marks them as for tests only
KITTI_TYPES = ("Car", "Van", "Truck")  # the others are no vehicles


def pets(folder: Path, task: Task) -> Source | None:
    """images/<breed>_<n>.jpg, annotations/{trainval,test}.txt with the lines: picture, class from 1, species, breed."""
    lists = {"train": folder / "annotations" / "trainval.txt", "test": folder / "annotations" / "test.txt"}
    if not all(path.is_file() for path in lists.values()):
        return None
    rows = [
        (split, line.split()[0], int(line.split()[1]) - 1)
        for split, path in lists.items()
        for line in path.read_text().splitlines()
        if line and not line.startswith("#")
    ]
    names = {label: name.rpartition("_")[0] for _, name, label in rows}
    samples = ((split, label, (folder / "images" / f"{name}.jpg").read_bytes()) for split, name, label in rows)
    return Source(folder, [names[label] for label in sorted(names)], samples)


def flowers(folder: Path, task: Task) -> Source | None:
    """jpg/image_00001.jpg, imagelabels.mat (classes from 1), setid.mat (numbers of each split)."""
    if not (folder / "setid.mat").is_file() or not (folder / "imagelabels.mat").is_file():
        return None

    def samples() -> Iterator[Sample]:
        from scipy.io import loadmat

        labels, sets = loadmat(folder / "imagelabels.mat")["labels"].ravel(), loadmat(folder / "setid.mat")
        for split, key in (("train", "trnid"), ("validation", "valid"), ("test", "tstid")):
            for number in sets[key].ravel():
                yield split, int(labels[number - 1]) - 1, (folder / "jpg" / f"image_{number:05d}.jpg").read_bytes()

    return Source(folder, task.numbers, samples())


def dtd(folder: Path, task: Task) -> Source | None:
    """images/<class>/…, labels/{train,val,test}1.txt: the first of its ten partitions, as VTAB takes it."""
    place = next((place for place in (folder / "dtd", folder) if (place / "labels" / "test1.txt").is_file()), None)
    if place is None:
        return None
    lists = {
        split: (place / "labels" / f"{name}1.txt").read_text().split()
        for split, name in (("train", "train"), ("validation", "val"), ("test", "test"))
    }
    classes = sorted({line.split("/")[0] for lines in lists.values() for line in lines})
    number = {name: index for index, name in enumerate(classes)}
    samples = (
        (split, number[line.split("/")[0]], (place / "images" / line).read_bytes())
        for split, lines in lists.items()
        for line in lines
    )
    return Source(place, classes, samples)


def objectnet(folder: Path, task: Task) -> Source | None:
    """images/<class folder>/…, mappings/*.json: which ILSVRC classes answer for which of its own. The frame is cut off."""
    place = next((place for place in (folder / "objectnet-1.0", folder) if (place / "mappings").is_dir()), None)
    if place is None:
        return None
    told = {
        name: json.loads((place / "mappings" / f"{name}.json").read_text())
        for name in ("folder_to_objectnet_label", "objectnet_to_imagenet_1k", "pytorch_to_imagenet_2012_id")
    }
    lines = [line.strip() for line in (place / "mappings" / "imagenet_to_label_2012_v2").read_text().splitlines()]
    # A line of that file is a class; the third table says its place among ILSVRC's sorted class folders.
    place_of = {lines[int(line)]: int(index) for index, line in told["pytorch_to_imagenet_2012_id"].items()}
    classes = sorted(path.name for path in (place / "images").iterdir() if path.is_dir())
    answers: dict[str, list[int | str]] = {}
    for name in classes:
        described = told["objectnet_to_imagenet_1k"].get(told["folder_to_objectnet_label"].get(name, name))
        if described:
            answers[name] = [place_of[part.strip()] for part in described.split(";")]

    def samples() -> Iterator[Sample]:
        for number, name in enumerate(classes):
            for path in sorted((place / "images" / name).glob("*.png")):
                image = cv2.imread(str(path))
                if image is None:
                    raise SourceError(f"{path} cannot be read; unpack the dataset again.")
                yield "test", number, png(np.ascontiguousarray(image[BORDER:-BORDER, BORDER:-BORDER, ::-1]))

    return Source(place, classes, samples(), answers)


def clevr(folder: Path, task: Task) -> Source | None:
    """images/{train,val}/…, scenes/CLEVR_{train,val}_scenes.json. The pictures of `test` have no published answers."""
    place = next(
        (p for p in (folder / "CLEVR_v1.0", folder) if (p / "scenes" / "CLEVR_val_scenes.json").is_file()), None
    )
    if place is None:
        return None

    def samples() -> Iterator[Sample]:
        for split, name in (("train", "train"), ("validation", "val")):
            for scene in json.loads((place / "scenes" / f"CLEVR_{name}_scenes.json").read_text())["scenes"]:
                fields: dict[str, Any] = {
                    "objects/size": [thing["size"] for thing in scene["objects"]],
                    "objects/pixel_coords": [thing["pixel_coords"] for thing in scene["objects"]],
                }
                yield split, task.of(fields), (place / "images" / name / scene["image_filename"]).read_bytes()

    return Source(place, task.numbers, samples())


def kitti(folder: Path, task: Task) -> Source | None:
    """training/image_2/<n>.png, training/label_2/<n>.txt: type, …, location x, y, z at 11 to 13. No splits."""
    place = folder / "training"
    if not (place / "label_2").is_dir():
        return None

    def samples() -> Iterator[Sample]:
        for path in sorted((place / "label_2").glob("*.txt")):
            rows = [line.split() for line in path.read_text().splitlines()]
            fields = {
                "objects/type": [KITTI_TYPES.index(row[0]) if row[0] in KITTI_TYPES else 3 for row in rows],
                "objects/location": [[float(x) for x in row[11:14]] for row in rows],
            }
            yield None, task.of(fields), (place / "image_2" / f"{path.stem}.png").read_bytes()

    return Source(place, task.numbers, samples())


def retinopathy(folder: Path, task: Task) -> Source | None:
    """train/<name>.jpeg, trainLabels.csv with the columns image and level (0 to 4). No splits."""
    table = folder / "trainLabels.csv"
    if not table.is_file():
        return None

    def samples() -> Iterator[Sample]:
        with table.open(newline="") as file:
            for row in csv.DictReader(file):
                yield None, int(row["level"]), (folder / "train" / f"{row['image']}.jpeg").read_bytes()

    return Source(folder, task.numbers, samples())
