"""Training batches as a function of the seed alone.

Which images an iteration sees, and how each of them is augmented, depends neither on the number of
workers or processes nor on earlier iterations. There is no sampler state to restore: a resumed run
starts the same sequence at its iteration.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler


class Draw(NamedTuple):
    """One sampled image."""

    record: int  # index in the dataset
    seed: int  # of the augmentation
    mix: bool = True  # whether other images may be mixed in (mosaic, MixUp, copy-paste)


@dataclass(eq=False)
class TrainingBatches(Sampler[list[Draw]]):
    """Endless batches of one process, beginning with iteration `start`.

    All processes iterate over the same sequence and take their part of each batch. With `groups`,
    all images of a batch come from one group, such as landscape or portrait, to limit padding.

    Attributes:
        order: maps a seed to an endless sequence of record indices.
        batch_size: images of all processes together.
        seed: seed of order and augmentation.
        start: first iteration.
        groups: group of each record; None for a single group.
        rank: rank of this process.
        world_size: number of processes; divides `batch_size`.
        mix_until: iteration from which images are no longer mixed.
    """

    order: Callable[[int], Iterator[int]]
    batch_size: int
    seed: int
    start: int = 0
    groups: Sequence[int] | None = None
    rank: int = 0
    world_size: int = 1
    mix_until: float = math.inf

    def __iter__(self) -> Iterator[list[Draw]]:
        """Yield the batches of this process."""
        for iteration, batch in enumerate(self._global_batches()):
            if iteration >= self.start:
                local = batch[self.rank :: self.world_size]
                mix = iteration < self.mix_until
                yield [Draw(index, derive_seed(self.seed, n), mix) for index, n in local]

    def _global_batches(self) -> Iterator[list[tuple[int, int]]]:
        """Yield batches of all processes: each record with its position in the sequence."""
        pending: dict[int, list[tuple[int, int]]] = {}
        for serial, record in enumerate(self.order(self.seed)):
            group = self.groups[record] if self.groups is not None else 0
            batch = pending.setdefault(group, [])
            batch.append((record, serial))
            if len(batch) == self.batch_size:
                yield pending.pop(group)


def derive_seed(*parts: int) -> int:
    """Hash several integers to one 32-bit seed; similar integers give unrelated seeds."""
    return int(np.random.SeedSequence([abs(p) for p in parts]).generate_state(1)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python, numpy and torch (CPU) for a block, and restore their states afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
