"""What a trainer's checkpoints remember of a store: which sequences its dumps had."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from knowledge_store.errors import InputError
from student_train.training.dataset import DistillationDataset


class DumpSnapshots(TrainerCallback, ExportableState):
    """Keeps in checkpoints which sequences the dump has, and refuses to resume where it has others: in another order."""

    def __init__(self) -> None:
        self.snapshot: Any = None

    def state(self) -> dict[str, Any]:
        """What goes into a checkpoint."""
        return {"args": {}, "attributes": {"snapshot": self.snapshot}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compare, and remember.

        Raises:
            InputError: the dump has other sequences than when training began.
        """
        dataset = kwargs["train_dataloader"].dataset
        if not isinstance(dataset, DistillationDataset):
            return
        before = state.stateful_callbacks.get(type(self).__name__, self.state())["attributes"]["snapshot"]
        self.snapshot = dataset.snapshot
        state.stateful_callbacks[type(self).__name__] = self.state()
        if before not in (None, self.snapshot):
            raise InputError(
                f"there are other sequences in {', '.join(dataset.dumps)} than when this training began: begin it"
                " again, without resume_from_checkpoint"
            )
