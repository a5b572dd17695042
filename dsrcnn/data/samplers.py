"""The stream of training batches, a function of the seed alone.

Which images an iteration sees, and how each of them is augmented, depends neither on the number of
loader workers or processes nor on what happened before. A resumed run therefore needs no stored
state: it starts the stream at its iteration.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

__all__ = ["Draw", "SeededDataset", "TrainingBatches", "mixed_seed", "seeded"]


class Draw(NamedTuple):
    """One image drawn from the data set.

    Attributes:
        record: its number in the data set.
        seed: of its augmentation.
        combine: whether it may be combined with other images.
    """

    record: int
    seed: int
    combine: bool = True


class TrainingBatches(Sampler[list[Draw]]):
    """Endless batches of this process, from iteration `start` on.

    All processes walk through the same stream and take their part of each batch. With `groups`, a
    batch holds images of one group only, wide or high ones, so that little of it is padding.

    Attributes:
        seed: of order and augmentation.
        start: first iteration.
    """

    def __init__(
        self,
        order: Callable[[int], Iterator[int]],
        batch_size: int,
        *,
        seed: int,
        start: int = 0,
        groups: Sequence[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
        combine_until: float = math.inf,
    ) -> None:
        """Describe the stream.

        Args:
            order: from a seed to endless indices of records.
            batch_size: images of all processes together.
            seed: see above.
            start: see above.
            groups: group of each record; None for one group.
            rank: of this process.
            world_size: number of processes; divides `batch_size`.
            combine_until: iteration from which images are not combined any more.
        """
        self.order = order
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.groups = groups
        self.rank = rank
        self.world_size = world_size
        self.combine_until = combine_until

    def __iter__(self) -> Iterator[list[Draw]]:
        """Batches of this process."""
        for iteration, batch in enumerate(self._batches()):
            if iteration >= self.start:
                own = batch[self.rank :: self.world_size]
                combine = iteration < self.combine_until
                yield [Draw(index, mixed_seed(self.seed, serial), combine) for index, serial in own]

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        """Batches of all processes: index of the record, and how many were drawn before it."""
        waiting: dict[int, list[tuple[int, int]]] = {}
        for serial, index in enumerate(self.order(self.seed)):
            group = self.groups[index] if self.groups is not None else 0
            batch = waiting.setdefault(group, [])
            batch.append((index, serial))
            if len(batch) == self.batch_size:
                yield waiting.pop(group)


class SeededDataset(Dataset):
    """Records mapped to model inputs, each with the random numbers of its draw."""

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        mapper: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> None:
        """Take what to map, and how."""
        self.records = records
        self.mapper = mapper

    def __len__(self) -> int:
        """Number of records."""
        return len(self.records)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        """Map the drawn record."""
        with seeded(draw.seed):
            return self.mapper(self.records[draw.record])


def mixed_seed(*parts: int) -> int:
    """One seed of 32 bits from several numbers; near ones give seeds that are far apart."""
    return int(np.random.SeedSequence([abs(p) for p in parts]).generate_state(1)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of Python, numpy and torch (CPU) from `seed`, and afterwards as before."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
