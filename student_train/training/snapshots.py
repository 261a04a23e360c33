"""What a trainer's checkpoints remember of a store: which sequences its dumps had."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from knowledge_store.errors import InputError
from student_train.training.dataset import DistillationDataset


class DumpSnapshots(TrainerCallback, ExportableState):
    """Keeps in checkpoints which sequences the dump has and by which seed they are shuffled, and refuses to resume where either
    is another: sequences would come in another order, some of them twice in an epoch and some never."""

    def __init__(self) -> None:
        self.read: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        """What goes into a checkpoint."""
        return {"args": {}, "attributes": {"read": self.read}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compare, and remember.

        Raises:
            InputError: the dump has other sequences than when training began, or the seed is another.
        """
        dataset = kwargs["train_dataloader"].dataset
        if not isinstance(dataset, DistillationDataset):
            return
        before = state.stateful_callbacks.get(type(self).__name__, self.state())["attributes"]["read"]
        self.read = {"snapshot": dataset.snapshot, "seed": dataset.plan.seed}
        state.stateful_callbacks[type(self).__name__] = self.state()
        if not before:
            return
        if before["snapshot"] != self.read["snapshot"]:
            raise InputError(
                f"there are other sequences in {', '.join(dataset.dumps)} than when this training began: begin it"
                " again, without resume_from_checkpoint"
            )
        if before["seed"] != self.read["seed"]:
            raise InputError(
                f"this training began with the seed {before['seed']} and would go on with {self.read['seed']}, which is another"
                " order of the sequences: give the first one (data_seed, or else seed)"
            )
