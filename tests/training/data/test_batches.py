"""The stream: a pure function of (dataset, seed, global batch, step), however it is cut."""

import gc
import weakref
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data import area, augment, crops
from training.data.batches import Stream, cut, eval_batches
from training.data.dataset import Dataset, Split
from training.engine.loss import crop_and_flip

VIEW = {"seed": 3, "global_batch": 16, "resize": 20, "crop": 16, "flips": True, "crops": True}


def stream(dataset: Dataset, **changes: object) -> Stream:
    return Stream(dataset.split("train"), **(VIEW | changes))  # type: ignore[arg-type]


# Decoded once and kept; decoded as they come; cropped by area out of the whole picture, as upstream recipes do.
WAYS = pytest.mark.parametrize("way", [{"cache_bytes": 2**30}, {"cache_bytes": 0}, {"by_area": True}], ids=str)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_micro", [1, 2])
@WAYS
def test_ranks_and_micro_batches_see_the_same_stream(
    dataset: Dataset, world_size: int, num_micro: int, way: dict[str, object]
) -> None:
    whole = stream(dataset, **way)
    for step in (0, 2, 7):
        parts = [
            stream(dataset, rank=rank, world_size=world_size, unit=2, **way).batch(step, micro, num_micro)
            for rank in range(world_size)
            for micro in range(num_micro)
        ]
        expected = whole.batch(step)
        np.testing.assert_array_equal(np.concatenate([part.images for part in parts]), expected.images)
        np.testing.assert_array_equal(np.concatenate([part.indices for part in parts]), expected.indices)
        assert {len(part.images) % 2 for part in parts} == {0}


def test_the_device_crops_and_flips_to_the_same_bytes(dataset: Dataset) -> None:
    for step in (0, 5):
        host, device = stream(dataset).batch(step, 1, 2), stream(dataset, on_device=True).batch(step, 1, 2)
        assert device.drawn is not None
        assert device.drawn.flip.any()
        made = crop_and_flip(torch.from_numpy(device.images), device.drawn, device.crop)
        np.testing.assert_array_equal(made.numpy(), host.images)
        np.testing.assert_array_equal(device.targets, host.targets)


@WAYS
def test_a_resumed_stream_continues_where_it_stopped(dataset: Dataset, way: dict[str, object]) -> None:
    straight = list(stream(dataset, **way).prefetch(0, 9, 2))
    resumed = list(stream(dataset, **way).prefetch(5, 9, 2))
    assert len(resumed) == 8
    for a, b in zip(straight[10:], resumed, strict=True):
        np.testing.assert_array_equal(a.images, b.images)


def test_crops_by_area_are_drawn_anew_at_every_step_and_flipped_as_drawn(dataset: Dataset) -> None:
    made, split = stream(dataset, by_area=True), dataset.split("train")
    for step in (0, 3):
        batch = made.batch(step)
        boxes = area.draw(np.random.default_rng((3, step, 0xA4EA)), 16)
        flips = 0
        for row, (image, index) in enumerate(zip(batch.images, batch.indices, strict=True)):
            expected = crops.of(split.read(int(index)), 16, partial(boxes.box, row))
            flipped = np.array_equal(image, expected[:, ::-1])
            assert flipped or np.array_equal(image, expected)
            flips += flipped
        assert 0 < flips < 16
    unflipped = stream(dataset, by_area=True, flips=False).batch(0)
    boxes = area.draw(np.random.default_rng((3, 0, 0xA4EA)), 16)
    expected = crops.of(split.read(int(unflipped.indices[5])), 16, partial(boxes.box, 5))
    assert np.array_equal(unflipped.images[5], expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 50), st.integers(0, 1000))
def test_each_epoch_has_every_example_once(dataset: Dataset, global_batch: int, seed: int) -> None:
    count = len(dataset.split("train"))
    made = stream(dataset, global_batch=global_batch, seed=seed)
    order = np.concatenate([made.indices(step) for step in range(-(-3 * count // global_batch))])
    for epoch in range(3):
        assert sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_a_split_too_large_for_memory_is_read_shard_by_shard(dataset: Dataset) -> None:
    made = stream(dataset, cache_bytes=0, global_batch=len(dataset.split("train")))
    names = dataset.split("train").shards[made.indices(0)]
    assert len(set(names)) > 1
    assert sorted(made.indices(0)) == list(range(len(names)))
    assert list(made.indices(0)) != list(made.indices(1))


def test_flips_and_crops_can_be_forbidden(dataset: Dataset) -> None:
    fixed = stream(dataset, flips=False, crops=False)
    first = {int(i): image for i, image in zip(fixed.batch(0).indices, fixed.batch(0).images, strict=True)}
    for step in range(1, 6):
        batch = fixed.batch(step)
        for index, image in zip(batch.indices, batch.images, strict=True):
            np.testing.assert_array_equal(image, first.setdefault(int(index), image))


def test_crop_and_flip_equal_slicing_one_by_one() -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (5, 12, 12, 3), dtype=np.uint8)
    rows = np.array([4, 0, 2, 2, 1])
    drawn = augment.draw(rng, 5, 12, 8, flips=True)
    made = augment.crop_and_flip(pictures, rows, 8, drawn)
    for k, row in enumerate(rows):
        top, left = drawn.top[k], drawn.left[k]
        expected = pictures[row, top : top + 8, left : left + 8]
        np.testing.assert_array_equal(made[k], expected[:, ::-1] if drawn.flip[k] else expected)


def test_an_error_while_reading_reaches_the_loop(dataset: Dataset) -> None:
    made = stream(dataset)
    made.split = None  # type: ignore[assignment]
    with pytest.raises(TypeError, match="NoneType"):
        next(made.prefetch(0, 1))


def test_evaluation_covers_the_split_in_order_over_all_ranks(dataset: Dataset) -> None:
    split = dataset.split("test")
    seen = [i for rank in range(2) for _, _, indices in eval_batches(split, 16, 5, rank, 2) for i in indices]
    assert sorted(seen) == list(range(len(split)))


def test_a_crop_larger_than_the_picture_is_refused(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match="crop=32 is larger than resize=20"):
        stream(dataset, crop=32)


@given(st.integers(0, 500), st.integers(1, 20), st.sampled_from([1, 2]))
def test_a_cut_keeps_all_in_order_and_evenly(units: int, parts: int, unit: int) -> None:
    made = [cut(units * unit, part, parts, unit) for part in range(parts)]
    assert [start for start, _ in made] == [0, *(stop for _, stop in made[:-1])]
    assert made[-1][1] == units * unit
    sizes = [stop - start for start, stop in made]
    assert max(sizes) - min(sizes) <= unit
    assert not any(size % unit for size in sizes)


class Counted(Split):
    """A split that counts how often each picture is read."""

    def read(self, i: int) -> bytes:
        self.reads = getattr(self, "reads", Counter()) + Counter([i])
        return super().read(i)


def test_the_first_batch_decodes_no_more_than_itself_and_an_epoch_each_picture_once(dataset: Dataset) -> None:
    split = Counted(dataset, "train", dataset.split("train")._table)
    made = Stream(split, **VIEW)  # type: ignore[arg-type]
    made.batch(0)
    assert sum(split.reads.values()) == 16
    for step in range(1, 20):
        made.batch(step)
    assert split.reads == Counter(range(len(split)))


def test_a_stream_that_nobody_holds_is_gone_with_its_pictures(dataset: Dataset) -> None:
    made = stream(dataset)
    list(made.prefetch(0, 5))
    held = weakref.ref(made)
    gc.disable()
    try:
        del made
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory is pinned for a GPU")
def test_batches_made_ahead_for_a_gpu_lie_in_pinned_memory(dataset: Dataset) -> None:
    batch = next(stream(dataset, pinned=True).prefetch(0, 1))
    assert torch.from_numpy(batch.images).is_pinned()
    assert torch.from_numpy(batch.targets).is_pinned()
