"""A teacher's last hidden states over a corpus, kept on disk: several studies of the same distributions ask the teacher once.

What the head makes of them is made again each time, a slice of positions at a time: whole distributions of a real vocabulary
take a hundred times the room.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from knowledge_store.terminal.progress import progress_bar
from teacher_dump.configuration import DumpConfig
from teacher_dump.corpus.tokenisation import TokenSequence
from teacher_dump.dumping.batches import batch_arrays, length_batches
from teacher_dump.dumping.plan import ShardInput
from teacher_dump.teachers.local import LocalTeacher
from teacher_dump.teachers.prediction import LocalPrediction


def predictions(
    config: DumpConfig, teacher: LocalTeacher, shard: ShardInput, folder: Path
) -> Iterator[tuple[np.ndarray, list[TokenSequence], LocalPrediction]]:
    """What a teacher says of a shard, batch by batch: from the folder, or asked and kept there.

    Args:
        config: how many sequences a batch has.
        teacher: one whose logits are its head's product with its last hidden states.
        shard: what is asked.
        folder: of this teacher's states over this corpus alone; a finished batch has a file of its own.

    Yields:
        which of the shard's sequences, those, and the prediction.
    """
    assert not teacher.whole_logits, "this teacher's logits are more than its head's product"
    folder.mkdir(parents=True, exist_ok=True)
    lengths = [len(sequence.token_ids) for sequence in shard.sequences]
    batches = length_batches(lengths, config.batch_size * config.max_length)
    with progress_bar(f"shard {shard.shard}", sum(lengths), "positions") as advance:
        for number, indices in enumerate(batches):
            sequences = [shard.sequences[index] for index in indices]
            path = folder / f"{shard.shard:05d}-{number:05d}.pt"
            if not path.exists():
                hidden = teacher.predict(*batch_arrays([sequence.token_ids for sequence in sequences])).hidden
                torch.save(hidden, path.with_suffix(".part"))
                path.with_suffix(".part").replace(path)
            yield indices, sequences, LocalPrediction(teacher, torch.load(path, weights_only=True), None)
            advance(sum(len(sequence.token_ids) for sequence in sequences))
