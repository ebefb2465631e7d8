"""Tiny datasets in their real on-disk layouts. Every picture carries its own label: `carried` reads it back."""

import csv
import gzip
import io
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from scipy.io import savemat

Numbers = tuple[int, int]  # training and test examples per class
PER_CLASS: Numbers = (2, 1)


def gray(label: int) -> np.ndarray:
    """A picture of 16 × 16 pixels whose upper half has one and whose lower half has the other digit of the label, times 8."""
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:8], picture[8:] = 8 * (label // 32), 8 * (label % 32)
    return picture


def carried(pixels: np.ndarray) -> int:
    """The label that a picture carries, after a lossy encoding too. pixels [h, w, 3]"""
    height = len(pixels)
    upper, lower = pixels[2 : height // 2 - 2].mean(), pixels[height // 2 + 2 : -2].mean()
    return round(upper / 8) * 32 + round(lower / 8)


def encoded(label: int, suffix: str = ".jpg") -> bytes:
    return cv2.imencode(suffix, gray(label))[1].tobytes()


def write(path: Path, label: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(label, path.suffix.lower().replace(".jpeg", ".jpg")))


def examples(classes: int) -> list[tuple[str, int]]:
    return [
        (split, label)
        for split, count in zip(("train", "test"), PER_CLASS, strict=True)
        for label in range(classes)
        for _ in range(count)
    ]


def folders(root: Path, classes: int, splits: tuple[str, ...] = ("train", "val"), inner: str = "") -> None:
    """<split>/<class>/<n>.JPEG, or <class>/<n>.JPEG without splits."""
    for split, count in zip(splits or ("",), PER_CLASS, strict=False):
        for label in range(classes):
            for number in range(count):
                write(root / inner / split / f"n{label:08d}" / f"{number}.JPEG", label)


def _chw(label: int) -> np.ndarray:
    return cv2.resize(gray(label), (32, 32), interpolation=cv2.INTER_NEAREST).transpose(2, 0, 1).ravel()


def cifar10_binary(root: Path) -> None:
    place = root / "cifar-10-batches-bin"
    place.mkdir(parents=True)
    (place / "batches.meta.txt").write_text("\n".join(f"name{label}" for label in range(10)) + "\n\n")
    rows = b"".join(bytes([label]) + _chw(label).tobytes() for label in range(10))
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        (place / name).write_bytes(rows)


def cifar10_python(root: Path) -> None:
    place = root / "cifar-10-batches-py"
    place.mkdir(parents=True)
    (place / "batches.meta").write_bytes(
        pickle.dumps({b"label_names": [f"name{label}".encode() for label in range(10)]}, 2)
    )
    told = {b"data": np.stack([_chw(label) for label in range(10)]), b"labels": list(range(10)), b"batch_label": b"one"}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (place / name).write_bytes(pickle.dumps(told, 2))


def cifar100_binary(root: Path) -> None:
    place = root / "cifar-100-binary"
    place.mkdir(parents=True)
    (place / "fine_label_names.txt").write_text("\n".join(f"name{label}" for label in range(100)) + "\n")
    rows = b"".join(bytes([label // 5, label]) + _chw(label).tobytes() for label in range(100))
    for name in ("train.bin", "test.bin"):
        (place / name).write_bytes(rows)


def cifar100_python(root: Path) -> None:
    place = root / "cifar-100-python"
    place.mkdir(parents=True)
    (place / "meta").write_bytes(
        pickle.dumps({b"fine_label_names": [f"name{label}".encode() for label in range(100)]}, 2)
    )
    told = {b"data": np.stack([_chw(label) for label in range(100)]), b"fine_labels": list(range(100))}
    for name in ("train", "test"):
        (place / name).write_bytes(pickle.dumps(told, 2))


def svhn(root: Path, train: int = 20, test: int = 10) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("test", test)):
        labels = np.arange(count) % 10
        pictures = np.stack([_chw(label).reshape(3, 32, 32).transpose(1, 2, 0) for label in labels], axis=3)
        savemat(root / f"{split}_32x32.mat", {"X": pictures, "y": np.where(labels == 0, 10, labels)[:, None]})


def flowers(root: Path) -> None:
    root.mkdir(parents=True)
    labels = np.tile(np.arange(102), 3)
    for number, label in enumerate(labels, 1):
        write(root / "jpg" / f"image_{number:05d}.jpg", label)
    savemat(root / "imagelabels.mat", {"labels": labels[None] + 1})
    numbers = np.arange(1, 307)
    savemat(
        root / "setid.mat",
        {"trnid": numbers[None, :102], "valid": numbers[None, 102:204], "tstid": numbers[None, 204:]},
    )


def pets(root: Path) -> None:
    (root / "annotations").mkdir(parents=True)
    for name, numbers in (("trainval", (1, 2)), ("test", (3,))):
        lines = ["# Image CLASS-ID SPECIES BREED-ID"]
        for label in range(37):
            for number in numbers:
                write(root / "images" / f"some_breed{label}_{number}.jpg", label)
                lines.append(f"some_breed{label}_{number} {label + 1} 1 1")
        (root / "annotations" / f"{name}.txt").write_text("\n".join(lines) + "\n")


def dtd(root: Path) -> None:
    for name in ("train", "val", "test"):
        lines = [f"class{label:02d}/{name}_{label}.jpg" for label in range(47)]
        for label, line in enumerate(lines):
            write(root / "dtd" / "images" / line, label)
        (root / "dtd" / "labels").mkdir(exist_ok=True)
        (root / "dtd" / "labels" / f"{name}1.txt").write_text("\n".join(lines) + "\n")


def objectnet(root: Path, classes: int = 313) -> None:
    """Its first three classes are ILSVRC's classes 5, 6 with 7, and 8."""
    place = root / "objectnet-1.0"
    for label in range(classes):
        path = place / "images" / f"folder{label:03d}" / "0.png"
        path.parent.mkdir(parents=True)
        framed = cv2.copyMakeBorder(gray(label), 2, 2, 2, 2, cv2.BORDER_CONSTANT, value=(0, 0, 255))
        cv2.imwrite(str(path), framed)
    (place / "mappings").mkdir()
    told: dict[str, Any] = {
        "folder_to_objectnet_label": {f"folder{label:03d}": f"Thing {label}" for label in range(classes)},
        "objectnet_to_imagenet_1k": {
            "Thing 0": "described 5",
            "Thing 1": "described 6; described 7",
            "Thing 2": "described 8",
        },
        "pytorch_to_imagenet_2012_id": {str(index): 999 - index for index in range(1000)},
    }
    for name, content in told.items():
        (place / "mappings" / f"{name}.json").write_text(json.dumps(content))
    lines = [f"described {999 - line}" for line in range(1000)]
    (place / "mappings" / "imagenet_to_label_2012_v2").write_text("\n".join(lines) + "\n")


def retinopathy(root: Path) -> None:
    root.mkdir(parents=True)
    with (root / "trainLabels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "level"])
        for label in range(5):
            write(root / "train" / f"{label}_left.jpeg", label)
            rows.writerow([f"{label}_left", label])


def clevr(root: Path) -> None:
    """Scenes of 3 to 10 objects; the nearest of scene n is at 7.9 + n / 2."""
    place = root / "CLEVR_v1.0"
    (place / "scenes").mkdir(parents=True)
    for name in ("train", "val"):
        scenes = []
        for label in range(8):
            file = f"CLEVR_{name}_{label:06d}.png"
            write(place / "images" / name / file, label)
            things = [{"size": "large", "pixel_coords": [1, 2, 7.9 + label / 2 + i]} for i in range(label + 3)]
            scenes.append({"image_filename": file, "objects": things})
        (place / "scenes" / f"CLEVR_{name}_scenes.json").write_text(json.dumps({"scenes": scenes}))


def kitti(root: Path) -> None:
    """The nearest vehicle at 5, 15 and 50 metres, and a picture with none."""
    (root / "training" / "label_2").mkdir(parents=True)
    lines = (
        "Car {} 0 0 0 0 0 0 0 0 0 1.0 2.0 5.0 0",
        "Van 0 0 0 0 0 0 0 0 0 0 1 2 15 0\nCar 0 0 0 0 0 0 0 0 0 0 1 2 30 0",
    )
    lines = (*lines, "Truck 0 0 0 0 0 0 0 0 0 0 1 2 50 0", "Pedestrian 0 0 0 0 0 0 0 0 0 0 1 2 3 0")
    for label, line in enumerate(lines):
        write(root / "training" / "image_2" / f"{label:06d}.png", label)
        (root / "training" / "label_2" / f"{label:06d}.txt").write_text(line.format(0) + "\n")


def dsprites(root: Path, count: int = 640) -> None:
    """Angle n mod 40 and place n mod 32; the picture has so many points: place // 2 + 1 in its first row, angle in its second."""
    root.mkdir(parents=True, exist_ok=True)
    numbers = np.arange(count)
    pictures = np.zeros((count, 64, 64), np.uint8)
    latents = np.zeros((count, 6), np.int64)
    latents[:, 3], latents[:, 4] = numbers % 40, numbers % 32
    for picture, row, number in zip(pictures, latents, numbers, strict=True):
        picture[0, : row[4] // 2 + 1] = 1
        picture[1, : int(row[3] / 2.5) + 1] = 1
        picture[2, number % 64] = picture[3, number // 64 % 64] = 1  # no two pictures alike
    kept = {"imgs": pictures, "latents_classes": latents, "metadata": np.array({"date": "a pickle"}, dtype=object)}
    np.savez(root / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz", **kept)


def smallnorb(root: Path) -> None:
    """18 azimuths (0 to 34 by 2) by 9 elevations; the left picture carries the azimuth, the right one nothing."""
    root.mkdir(parents=True)
    told = np.array([(0, elevation, 2 * azimuth, 0) for azimuth in range(18) for elevation in range(9)], np.int32)
    left = np.stack([cv2.resize(gray(row[2] // 2)[..., 0], (96, 96), interpolation=cv2.INTER_NEAREST) for row in told])
    pictures = np.stack([left, np.zeros_like(left)], 1)
    for split in ("training", "testing"):
        name = root / f"smallnorb-5x46789x9x18x6x2x96x96-{split}"
        with gzip.open(f"{name}-dat.mat.gz", "wb", 1) as file:
            file.write(struct.pack("<6i", 0x1E3D4C55, 4, *pictures.shape) + pictures.tobytes())
        Path(f"{name}-info.mat").write_bytes(struct.pack("<5i", 0x1E3D4C54, 2, *told.shape, 1) + told.tobytes())


def hub(root: Path, classes: int, picture: str = "image", label: str = "label", names: bool = True) -> None:
    """data/<split>-00000-of-00001.parquet as Hugging Face's datasets writes it."""
    (root / "data").mkdir(parents=True)
    for split in ("train", "test"):
        rows = [
            {picture: {"bytes": encoded(number, ".png"), "path": f"{i}.png"}, label: number}
            for i, (own, number) in enumerate(examples(classes))
            if own == split
        ]
        table = pa.Table.from_pylist(rows)
        features = {
            picture: {"_type": "Image"},
            label: {"names": [f"name{i}" for i in range(classes)], "_type": "ClassLabel"},
        }
        if names:
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, root / "data" / f"{split}-00000-of-00001.parquet")


def example_class() -> Any:
    """tf.train.Example by the real protocol buffers library, from its published definition."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tensorflow", syntax="proto3")
    repeated, optional = 3, 1
    for name, kind in (("BytesList", 12), ("FloatList", 2), ("Int64List", 3)):
        file.message_type.add(name=name).field.add(name="value", number=1, label=repeated, type=kind)
    feature = file.message_type.add(name="Feature")
    for number, kind in enumerate(("BytesList", "FloatList", "Int64List"), 1):
        name = ("bytes_list", "float_list", "int64_list")[number - 1]
        feature.field.add(name=name, number=number, label=optional, type=11, type_name=f".tensorflow.{kind}")
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=optional, type=9)
    entry.field.add(name="value", number=2, label=optional, type=11, type_name=".tensorflow.Feature")
    features.field.add(name="feature", number=1, label=repeated, type=11, type_name=".tensorflow.Features.FeatureEntry")
    example = file.message_type.add(name="Example")
    example.field.add(name="features", number=1, label=optional, type=11, type_name=".tensorflow.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


def tfds(
    root: Path,
    name: str,
    classes: int,
    fields_of: Callable[[int], dict[str, list[Any]]],
    label: str = "label",
    test: str = "test",
) -> None:
    """<name>/<version>/: dataset_info.json, features.json, <label>.labels.txt and the tfrecord files of train and test."""
    version, message = root / name / "3.0.0", example_class()
    version.mkdir(parents=True)
    (version / "dataset_info.json").write_text(json.dumps({"name": name, "version": "3.0.0"}))
    (version / "features.json").write_text("{}")
    if "." not in label:
        (version / f"{label}.labels.txt").write_text("".join(f"name{number}\n" for number in range(classes)))
    for split in ("train", test):
        stream = io.BytesIO()
        for own, number in examples(classes):
            if own == split or (own == "test" and split == test):
                example = message()
                for key, values in ({"image": [encoded(number, ".png")]} | fields_of(number)).items():
                    kind = {bytes: "bytes_list", float: "float_list", int: "int64_list"}[type(values[0])]
                    getattr(example.features.feature[key], kind).value.extend(values)
                data = example.SerializeToString()
                stream.write(struct.pack("<Q", len(data)) + b"\0" * 4 + data + b"\0" * 4)
        (version / f"{name}-{split}.tfrecord-00000-of-00001").write_bytes(stream.getvalue())
