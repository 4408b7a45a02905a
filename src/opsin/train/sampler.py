"""Which samples make which batch, and the randomness of each step: both functions of the seed and the step alone.

That is what makes a run go on after a kill as if nothing had happened: step 731 sees the same images in the same order
with the same random numbers, whether the 730 steps before it ran in this process or in another.
"""

import os
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import DataLoader, Dataset, Sampler

from opsin.data import Split
from opsin.data.batches import collate


def mix(seed: int, *parts: int | str) -> int:
    """A 63-bit seed that is a function of its arguments and looks unrelated for neighbouring ones."""
    return int.from_bytes(blake2b(repr((seed, *parts)).encode(), digest_size=8).digest(), "big") >> 1


class Batch(NamedTuple):
    """What the loader reads at once: sample indices, the epoch, and the seed of whatever the split draws."""

    indices: list[int]
    epoch: int
    seed: int


def seed_generators(seed: int, device: torch.device) -> None:
    """Seeds the processor's random numbers and those of the device in use.

    `torch.manual_seed` would seed every kind of device there is; without them it takes half a millisecond to note down
    that it would.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)


def world() -> tuple[int, int]:
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class TrainBatches(Sampler[Batch]):
    """Shuffled full batches; the order of epoch e is a permutation drawn from (seed, e).

    Each global batch is dealt to the processes in turn, so that two processes train on the batches that one would.
    `resume(step)` makes the epoch that contains this step start in its middle.
    """

    def __init__(self, count: int, batch_size: int, seed: int):
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.epoch, self.resumed = 0, (0, 0)

    def __len__(self) -> int:
        return self.count // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def resume(self, step: int) -> None:
        """Starts behind `step`. At the end of an epoch that epoch is still current, with no batch left."""
        self.epoch = max(step - 1, 0) // len(self)
        self.resumed = (self.epoch, step - self.epoch * len(self))

    def __iter__(self) -> Iterator[Batch]:
        rank, processes = world()
        generator = torch.Generator().manual_seed(mix(self.seed, "order", self.epoch))
        order = torch.randperm(self.count, generator=generator).tolist()
        for batch in range(self.resumed[1] if self.epoch == self.resumed[0] else 0, len(self)):
            indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield Batch(indices[rank::processes], self.epoch, mix(self.seed, "read", self.epoch, batch, rank))


class EvalBatches(Sampler[Batch]):
    """Every sample once, in order, in batches of nearly equal size; each batch is dealt to the processes in turn."""

    def __init__(self, count: int, batch_size: int, seed: int = 0):
        self.count, self.seed = count, seed
        self.batches = max(1, -(-count // batch_size))

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        rank, processes = world()
        for batch in range(self.batches):
            start, stop = (self.count * b // self.batches for b in (batch, batch + 1))
            yield Batch(list(range(start + rank, stop, processes)), 0, mix(self.seed, "evaluate", batch))


class Reader(Dataset[tuple[Tensor, Any]]):
    """A split read batch by batch, at the batch's epoch and with its random numbers.

    A split in memory has `batch(indices)` and gathers all samples at once; one that changes over the epochs (random
    crops) has `set_epoch`.
    """

    def __init__(self, split: Split, task: str):
        self.split, self.collate = split, collate(task)
        self.gather = getattr(split, "batch", None)
        self.set_epoch = getattr(split, "set_epoch", None)

    def __getitem__(self, batch: Batch) -> tuple[Tensor, Any]:
        if self.set_epoch is not None:
            self.set_epoch(batch.epoch)
        if self.gather is not None:
            return self.gather(torch.tensor(batch.indices))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(batch.seed)
            return self.collate([self.split[i] for i in batch.indices])


def workers_for(split: Split) -> int:
    """Processes that read ahead for a GPU; none for data in memory, or where they would compete with the training."""
    return 0 if hasattr(split, "batch") or not torch.cuda.is_available() else min(8, (os.cpu_count() or 1) - 1)


def loader(
    split: Split, task: str, batches: Sampler[Batch], workers: int | None = None
) -> DataLoader[tuple[Tensor, Any]]:
    """A loader that draws nothing from the global random numbers."""
    workers = workers_for(split) if workers is None else workers
    return DataLoader(
        Reader(split, task), sampler=batches, batch_size=None, num_workers=workers, persistent_workers=workers > 0,
        generator=torch.Generator(), pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
