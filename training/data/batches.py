"""The stream of training batches: a pure function of (dataset, seed, global batch, step).

A rank takes its slice and a micro-batch a slice of that, so a resumed run and a run on another world size see the same
examples, cropped and flipped alike. Small splits are decoded once and kept as uint8; large ones are decoded as they come, in an
order that reads the shards window by window.
"""

import contextlib
import os
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services import preprocess
from training.data import area, augment
from training.data.dataset import Split
from training.errors import UserError

CACHE_BYTES = 2 * 2**30  # decoded splits up to this size stay in memory
WINDOW = 16_384  # examples that are shuffled together where a split is too large for the cache
THREADS = min(16, os.cpu_count() or 1)
PREFETCH = 4  # batches made ahead of the step that needs them


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
    and flips are drawn here but done by the training step.
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
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if crop > resize:
            raise UserError(f"crop={crop} is larger than resize={resize}; choose resize ≥ crop.")
        if len(split) == 0:
            raise UserError(f"the split {split.name!r} is empty; there is nothing to train on.")
        self.split, self.seed, self.global_batch = split, seed, global_batch
        self.resize, self.crop, self.flips = (resize if crops else crop), crop, flips
        self.rank, self.world_size = rank, world_size
        self.targets = split.targets()
        self.by_area, self.on_device = by_area, on_device
        self.cached = not by_area and len(split) * self.resize**2 * 3 <= cache_bytes
        self._pool = ThreadPoolExecutor(THREADS)
        self._pictures: NDArray[np.uint8] | None = None
        self._order = lru_cache(maxsize=2)(self._permutation)

    def batch(self, step: int, micro: int = 0, num_micro: int = 1) -> Batch:
        """Micro-batch `micro` of `num_micro` of this rank's share of the global batch at optimizer step `step`."""
        share = self.global_batch // self.world_size
        size = share // num_micro
        start = self.rank * share + micro * size
        indices = self.indices(step)[start : start + size]
        rng = np.random.default_rng((self.seed, step, 0xC409))
        drawn = augment.draw(rng, self.global_batch, self.resize, self.crop, self.flips).part(start, start + size)
        if self.by_area:
            boxes = area.draw(np.random.default_rng((self.seed, step, 0xA4EA)), self.global_batch)
            images = self._cropped(indices, boxes, start)
            images[drawn.flip] = images[drawn.flip, :, ::-1]
            return Batch(images, self.targets[indices], indices, self.crop)
        pictures, rows = self._decoded(indices)
        if self.on_device:
            return Batch(pictures[rows], self.targets[indices], indices, self.crop, drawn)
        images = augment.crop_and_flip(pictures, rows, self.crop, drawn)
        return Batch(images, self.targets[indices], indices, self.crop)

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
        made: queue.Queue[Batch | BaseException] = queue.Queue(PREFETCH)
        abandoned = threading.Event()

        def put(item: Batch | BaseException) -> None:
            while not abandoned.is_set():
                with contextlib.suppress(queue.Full):
                    made.put(item, timeout=0.1)
                    return

        def work() -> None:
            try:
                for step in range(start_step, stop_step):
                    for micro in range(num_micro):
                        put(self.batch(step, micro, num_micro))
                        if abandoned.is_set():
                            return
            except BaseException as error:  # handed to the consumer, who raises it
                put(error)

        thread = threading.Thread(target=work, name="batches", daemon=True)
        thread.start()
        try:
            for _ in range((stop_step - start_step) * num_micro):
                item = made.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            abandoned.set()
            thread.join()

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        """The order of an epoch: a permutation, or, for a split that isn't cached, shards and then windows shuffled."""
        rng = np.random.default_rng((self.seed, epoch, 0x0E0C))
        if self.cached:
            return rng.permutation(len(self.split))
        names = np.array(self.split.shards)
        shards = rng.permutation(np.unique(names))
        order = np.concatenate([np.flatnonzero(names == name) for name in shards])
        for start in range(0, len(order), WINDOW):
            rng.shuffle(order[start : start + WINDOW])
        return order

    def _cropped(self, indices: NDArray[np.int64], boxes: area.AreaDraw, start: int) -> NDArray[np.uint8]:
        """Crops by area [m, crop, crop, 3]; row i of this part of the batch is row start + i of what was drawn."""
        images = np.empty((len(indices), self.crop, self.crop, 3), np.uint8)

        def one(row: int) -> None:
            images[row] = area.crop(self.split.read(int(indices[row])), boxes, start + row, self.crop)

        for _ in self._pool.map(one, range(len(indices)), chunksize=64):
            pass
        return images

    def _decoded(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Pictures [m, R, R, 3] and the rows among them that `indices` mean."""
        if not self.cached:
            return decode(self.split, indices, self.resize, self._pool), np.arange(len(indices))
        if self._pictures is None:
            self._pictures = decode(self.split, np.arange(len(self.split)), self.resize, self._pool)
        return self._pictures, indices


def decode(split: Split, indices: NDArray[np.int64], size: int, pool: ThreadPoolExecutor) -> NDArray[np.uint8]:
    """The pictures of a split, squashed to uint8 [n, size, size, 3], over the threads of `pool`."""
    pictures = np.empty((len(indices), size, size, 3), np.uint8)

    def one(row: int) -> None:
        pictures[row] = preprocess.pixels(split.read(int(indices[row])), size)

    for _ in pool.map(one, range(len(indices)), chunksize=64):
        pass
    return pictures


def eval_batches(
    split: Split, size: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.int64]]]:
    """(images [n, size, size, 3], targets, indices) in the split's order; rank r takes examples r, r + world_size, …"""
    targets = split.targets()
    mine = np.arange(rank, len(split), world_size)
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(mine), batch_size):
            indices = mine[start : start + batch_size]
            yield decode(split, indices, size, pool), targets[indices], indices
