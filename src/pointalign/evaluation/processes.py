"""Several processes at one evaluation: who does what, on which device, and how they wait for one another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

from pointalign.device import own_accelerator

# A process that waits does nothing else: long enough for any difference between shares of one data set.
LONGEST_WAIT = timedelta(days=2)


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started.

    Args:
        rank: number of this process; 0 writes reports.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that judges and writes reports."""
        return self.rank == 0

    def owns(self, batch: int) -> bool:
        """Whether a batch of objects is this process's."""
        return batch % self.world == self.rank

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.world > 1:
            distributed.barrier()


ALONE = Processes()


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """The processes that torchrun started, joined as long as the block lasts; one alone without torchrun."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE
        return
    ours = not distributed.is_initialized()
    if ours:
        # Only waits go through it, so one backend does on every machine.
        distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
    try:
        yield Processes(distributed.get_rank(), world)
    finally:
        if ours:
            distributed.destroy_process_group()


def evaluation_device() -> torch.device:
    """This process's accelerator, one for each process of a machine; the CPU where there is none."""
    return own_accelerator() or torch.device("cpu")
