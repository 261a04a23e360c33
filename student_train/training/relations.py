"""Whether the vectors of a dump are of the sort that losses of relations compare a student's with. Imports no torch."""

from __future__ import annotations

from knowledge_store import Manifest
from knowledge_store.errors import InputError
from knowledge_store.kinds.vectors import vectors_of
from student_train.losses.table import Loss
from student_train.training.configuration import TrainConfig


def check_vectors(manifest: Manifest, config: TrainConfig, loss: Loss) -> None:
    """Make sure that vectors are the means over the targets, as the student's are.

    Raises:
        InputError: they are not.
    """
    kept = vectors_of(manifest)
    if (kept.pooling, kept.over) != ("mean", "targets"):
        raise InputError(
            f"the loss {config.loss} compares means over the targets, and the vectors of the dump {manifest.dump} are"
            f" --vectors-pooling {kept.pooling} --vectors-over {kept.over}: dump vectors without these options"
        )
