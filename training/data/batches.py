"""The stream of training batches: a pure function of (dataset, seed, global batch, step).

A rank takes its slice and a micro-batch a slice of that, so a resumed run and a run on another world size see the same
examples, cropped and flipped alike. Pictures of small splits are decoded as they are first needed and kept as uint8; those of
large ones are decoded each time, only the crop resized (data/crops.py), in an order that reads the shards window by window.
"""

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from services import preprocess
from training.data import area, augment, crops
from training.data.dataset import Split
from training.errors import UserError

CACHE_BYTES = 2 * 2**30  # decoded splits up to this size stay in memory
WINDOW = 16_384  # examples that are shuffled together where a split is too large for the cache
THREADS = min(16, os.cpu_count() or 1)
PREFETCH = 4  # batches made ahead of the step that needs them
CHUNK = 8  # pictures that a thread takes at once


@dataclass(frozen=True)
class Batch:
    """images uint8 [n, crop, crop, 3]; targets int64 [n] or float32 [n, C]; indices int64 [n] into the split.

    drawn: where the device is to crop and flip; then images are [n, resize, resize, 3].
    """

    images: NDArray[np.uint8]
    targets: NDArray[Any]
    indices: NDArray[np.int64]
    crop: int
    drawn: augment.Draw | None = None


class Stream:
    """An endless, deterministic stream over a split.

    resize, crop: pictures are squashed to resize × resize, then cropped at random to crop × crop; with `crops` false they are
    squashed to crop × crop at once. by_area: crops by area instead (data/area.py), out of the picture as it is. on_device: crops
    and flips are drawn here but done by the training step. unit: so many neighbours stay together (2: mixup pairs them).
    pinned: batches made ahead lie in memory that a GPU copies from while it computes.
    """

    def __init__(
        self,
        split: Split,
        *,
        seed: int,
        global_batch: int,
        resize: int,
        crop: int,
        flips: bool,
        crops: bool,
        by_area: bool = False,
        on_device: bool = False,
        rank: int = 0,
        world_size: int = 1,
        unit: int = 1,
        pinned: bool = False,
        cache_bytes: int = CACHE_BYTES,
        threads: int = THREADS,
    ) -> None:
        if crop > resize:
            raise UserError(f"crop={crop} is larger than resize={resize}; choose resize ≥ crop.")
        if len(split) == 0:
            raise UserError(f"the split {split.name!r} is empty; there is nothing to train on.")
        self.split, self.seed, self.global_batch = split, seed, global_batch
        self.resize, self.crop, self.flips = (resize if crops else crop), crop, flips
        self.rank, self.world_size, self.unit, self.pinned = rank, world_size, unit, pinned
        self.by_area, self.on_device = by_area, on_device
        self.cached = not by_area and len(split) * self.resize**2 * 3 <= cache_bytes
        self._pool = ThreadPoolExecutor(threads)
        self._pictures: NDArray[np.uint8] | None = None
        self._known = np.zeros(len(split) if self.cached else 0, np.bool_)
        self._orders: dict[int, NDArray[np.int64]] = {}  # of an epoch and the one before: a batch may reach over both

    def batch(self, step: int, micro: int = 0, num_micro: int = 1) -> Batch:
        """Micro-batch `micro` of `num_micro` of this rank's share of the global batch at optimizer step `step`."""
        first, last = cut(self.global_batch, self.rank, self.world_size, self.unit)
        start, stop = (first + place for place in cut(last - first, micro, num_micro, self.unit))
        indices = self.indices(step)[start:stop]
        targets = self.split.targets(indices)
        rng = np.random.default_rng((self.seed, step, 0xC409))
        drawn = augment.draw(rng, self.global_batch, self.resize, self.crop, self.flips).part(start, stop)
        if self.cached:
            pictures, rows = self._kept(indices), indices
        elif self.on_device and not self.by_area:
            pictures, rows = self._read(indices, self.resize, lambda row: crops.whole), np.arange(len(indices))
        else:
            images = self._read(indices, self.crop, self._boxes(drawn, step, start))
            augment.flip(images, drawn.flip)
            return Batch(images, targets, indices, self.crop)
        if self.on_device:
            return Batch(pictures[rows], targets, indices, self.crop, drawn)
        return Batch(augment.crop_and_flip(pictures, rows, self.crop, drawn), targets, indices, self.crop)

    def indices(self, step: int) -> NDArray[np.int64]:
        """The examples of the global batch at `step`, int64 [global_batch]: each once per epoch, epochs back to back."""
        places = np.arange(step * self.global_batch, (step + 1) * self.global_batch)
        epochs, offsets = np.divmod(places, len(self.split))
        chosen = np.empty(self.global_batch, np.int64)
        for epoch in np.unique(epochs):
            mask = epochs == epoch
            chosen[mask] = self._order(int(epoch))[offsets[mask]]
        return chosen

    def prefetch(self, start_step: int, stop_step: int, num_micro: int = 1) -> Iterator[Batch]:
        """All micro-batches of the steps [start_step, stop_step), made by a thread ahead of their use."""
        ready: queue.Queue[Batch | BaseException] = queue.Queue(PREFETCH)
        abandoned = threading.Event()

        def put(item: Batch | BaseException) -> None:
            while not abandoned.is_set():
                with contextlib.suppress(queue.Full):
                    ready.put(item, timeout=0.1)
                    return

        def work() -> None:
            try:
                for step in range(start_step, stop_step):
                    for micro in range(num_micro):
                        made = self.batch(step, micro, num_micro)
                        put(in_pinned_memory(made) if self.pinned else made)
                        if abandoned.is_set():
                            return
            except BaseException as error:  # handed to the consumer, who raises it
                put(error)

        thread = threading.Thread(target=work, name="batches", daemon=True)
        thread.start()
        try:
            for _ in range((stop_step - start_step) * num_micro):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            abandoned.set()
            thread.join()

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            self._orders = {kept: order for kept, order in self._orders.items() if kept == epoch - 1}
            self._orders[epoch] = self._permutation(epoch)
        return self._orders[epoch]

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        """The order of an epoch: a permutation, or, for a split that isn't cached, shards and then windows shuffled."""
        rng = np.random.default_rng((self.seed, epoch, 0x0E0C))
        if self.cached:
            return rng.permutation(len(self.split))
        places = np.argsort(rng.permutation(len(self.split.shard_names)))
        order = np.argsort(places[self.split.shards], kind="stable")
        for start in range(0, len(order), WINDOW):
            rng.shuffle(order[start : start + WINDOW])
        return order

    def _boxes(self, drawn: augment.Draw, step: int, start: int) -> Callable[[int], crops.BoxOf]:
        """Row of this part of the batch, which starts at `start` of the global one → the box of its crop."""
        if not self.by_area:
            return lambda row: partial(drawn.box, row, self.resize, self.crop)
        boxes = area.draw(np.random.default_rng((self.seed, step, 0xA4EA)), self.global_batch)
        return lambda row: partial(boxes.box, start + row)

    def _read(self, indices: NDArray[np.int64], size: int, box_of: Callable[[int], crops.BoxOf]) -> NDArray[np.uint8]:
        """Parts of pictures straight out of their files [m, size, size, 3]."""
        images = np.empty((len(indices), size, size, 3), np.uint8)

        def one(row: int) -> None:
            images[row] = crops.of(self.split.read(int(indices[row])), size, box_of(row))

        each(self._pool, one, len(indices))
        return images

    def _kept(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The split's pictures [n, R, R, 3], those of `indices` decoded."""
        if self._pictures is None:
            self._pictures = np.empty((len(self.split), self.resize, self.resize, 3), np.uint8)
        missing = np.unique(indices[~self._known[indices]])
        self._pictures[missing] = decode(self.split, missing, self.resize, self._pool)
        self._known[missing] = True
        return self._pictures


def cut(count: int, part: int, parts: int, unit: int = 1) -> tuple[int, int]:
    """[start, stop) of one of `parts` of `count` examples, `unit` neighbours together; sizes differ by a unit at most."""
    units = count // unit
    return units * part // parts * unit, units * (part + 1) // parts * unit


def in_pinned_memory(batch: Batch) -> Batch:
    images, targets = (torch.from_numpy(array).pin_memory().numpy() for array in (batch.images, batch.targets))
    return replace(batch, images=images, targets=targets)


def each(pool: ThreadPoolExecutor, work: Callable[[int], None], count: int) -> None:
    """`work` on 0 to count - 1 over the threads of `pool`, several a task."""

    def some(start: int) -> None:
        for row in range(start, min(start + CHUNK, count)):
            work(row)

    for _ in pool.map(some, range(0, count, CHUNK)):
        pass


def decode(split: Split, indices: NDArray[np.int64], size: int, pool: ThreadPoolExecutor) -> NDArray[np.uint8]:
    """The pictures of a split, squashed to uint8 [n, size, size, 3], over the threads of `pool`."""
    pictures = np.empty((len(indices), size, size, 3), np.uint8)

    def one(row: int) -> None:
        pictures[row] = preprocess.pixels(split.read(int(indices[row])), size)

    each(pool, one, len(indices))
    return pictures


def eval_batches(
    split: Split, size: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.int64]]]:
    """(images [n, size, size, 3], targets, indices) in the split's order; rank r takes examples r, r + world_size, …"""
    mine = np.arange(rank, len(split), world_size)
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(mine), batch_size):
            indices = mine[start : start + batch_size]
            yield decode(split, indices, size, pool), split.targets(indices), indices
