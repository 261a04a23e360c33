"""Which of several processes this one is, and who else would divide among them what is already divided."""

from __future__ import annotations

import os

import torch

from knowledge_store.errors import InputError


def rank_and_world_size() -> tuple[int, int]:
    """The rank of this process and the number of processes: as `torch.distributed` has them once it is initialised, before that
    as torchrun and accelerate set RANK and WORLD_SIZE; 0 and 1 where neither says anything.

    Raises:
        InputError: the variables are no such numbers.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    rank, world_size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None or world_size is None:
        return 0, 1
    if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        raise InputError(f"the environment has RANK={rank} and WORLD_SIZE={world_size}, which is no rank of any: unset them")
    return int(rank), int(world_size)


def refuse_another_division(reader: object) -> None:
    """Refuse to be read by what would make batches of batches, or divide among the processes what is one process's share.

    Args:
        reader: the object whose method asked for batches, or said which epoch to read.

    Raises:
        InputError: says what to do instead.
    """
    if getattr(reader, "auto_collation", False):  # torch's fetcher, of a loader that has a batch size
        raise InputError(
            "a DistillationDataset gives whole batches: give its DataLoader batch_size=None, or use DistillationTrainer"
        )
    # Of accelerate, and of transformers. Both give every process a part of what this process reads: a part of its part.
    processes = {
        "IterableDatasetShard": lambda: getattr(reader, "num_processes", 1),
        "DataLoaderDispatcher": lambda: reader.state.num_processes,  # type: ignore[attr-defined]
    }.get(type(reader).__name__, lambda: 1)()
    if processes > 1:
        raise InputError(
            "a DistillationDataset already gives each process its own share, and accelerate would divide that again: leave its"
            " DataLoader out of `accelerator.prepare`, or use DistillationTrainer"
        )
