"""The batches of a training run, as a pure function of the seed and the step.

Nothing here depends on what was drawn before: a run that continues at step s, with any number of
workers, sees the same images, cropped in the same way, as one that was never interrupted.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import ceil
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from saft_clip.data import ImageDataset
from saft_clip.errors import UnreadableImageError

Batch = tuple[Tensor, Tensor]
"""Images, float32 [B, 3, H, W], and labels, int64 [B]."""


class Batches(Protocol):
    """Batches that can be counted, and gone through repeatedly."""

    def __iter__(self) -> Iterator[Any]: ...  # noqa: D105
    def __len__(self) -> int: ...  # noqa: D105


class TrainingBatches:
    """All batches of a run: each optimizer step takes up to ``accum_freq`` of up to ``batch_size``.

    Every epoch goes through all images once in a new order; its last step may be short.

    Args:
        dataset: N images.
        batch_size: images per forward pass.
        accum_freq: forward passes per optimizer step.
        epochs: passes over the data.
        min_steps: least number of optimizer steps; epochs are added until there are as many.
        seed: of the order and the augmentation.
        workers: processes that load images; 0 loads them in this one.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        batch_size: int,
        accum_freq: int,
        epochs: int,
        min_steps: int = 0,
        seed: int,
        workers: int = 0,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.step_size = batch_size * accum_freq
        self.seed = seed
        self.workers = workers
        self.steps_per_epoch = ceil(len(dataset) / self.step_size)
        self.epochs = max(epochs, ceil(min_steps / self.steps_per_epoch))
        self.steps = self.epochs * self.steps_per_epoch

    def images_in(self, step: int) -> int:
        """The number of images of one step."""
        begin = step % self.steps_per_epoch * self.step_size
        return min(self.step_size, len(self.dataset) - begin)

    def images_from(self, step: int) -> int:
        """The number of images of this step and all after it."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        return (self.epochs - epoch) * len(self.dataset) - step_of_epoch * self.step_size

    def plan(self, step: int) -> list[list[tuple[int, int]]]:
        """The batches of one step, as (epoch, index of the image) for each image."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        begin = step_of_epoch * self.step_size
        chosen = _order(len(self.dataset), self.seed, epoch)[begin : begin + self.step_size]
        return [[(epoch, i) for i in batch.tolist()] for batch in chosen.split(self.batch_size)]

    def steps_from(self, start: int) -> Iterator[Iterator[Batch]]:
        """The batches of each step from ``start`` on; use them up before asking for the next.

        Raises:
            UnreadableImageError: if a file has become unreadable since it was checked.
        """
        loader = DataLoader(
            _Seeded(self.dataset, self.seed),
            batch_sampler=_BatchPlan(self, start),
            num_workers=self.workers,
            collate_fn=_collate,
            worker_init_fn=ignore_interrupts,
            # Its own, or else each loader would move the global random state.
            generator=torch.Generator().manual_seed(self.seed),
        )
        batches = iter(loader)
        for step in range(start, self.steps):
            count = ceil(self.images_in(step) / self.batch_size)
            yield (_checked(next(batches)) for _ in range(count))


class _BatchPlan:
    """The batches of all steps from ``start`` on, made one by one."""

    def __init__(self, batches: TrainingBatches, start: int) -> None:
        self.batches = batches
        self.start = start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.batches.steps):
            yield from self.batches.plan(step)


@lru_cache(maxsize=2)
def _order(size: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(_mix(seed, epoch)))


def ordered_batches(dataset: ImageDataset, batch_size: int, workers: int = 0) -> DataLoader[Any]:
    """The images in order, for selection; the last batch may be short."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator(),
    )


class _Seeded(Dataset[Any]):
    """Images by (epoch, index), each augmented with random numbers of its own."""

    def __init__(self, dataset: ImageDataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | UnreadableImageError:
        state = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=[]):
            seed = _mix(self.seed, *key)
            # torch.manual_seed() would also format a stack trace for a CUDA that may come up later.
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            try:
                return self.dataset[key[1]]
            except UnreadableImageError as error:
                return error  # raised in a worker, it would come out as another error
            finally:
                random.setstate(state[0])
                np.random.set_state(state[1])


def _collate(items: Sequence[Any]) -> Any:
    errors = [item for item in items if isinstance(item, UnreadableImageError)]
    return errors[0] if errors else default_collate(list(items))


def _checked(batch: Any) -> Batch:
    if isinstance(batch, UnreadableImageError):
        raise batch
    images, labels = batch
    return images, labels


def ignore_interrupts(worker: int) -> None:
    """Begin a process that loads images: Ctrl-C reaches it, too, but is for the main one alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _mix(*numbers: int) -> int:
    """One seed of 63 bits from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
