"""What a trainer's checkpoints remember of a store: which sequences its dumps had."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from knowledge_store.errors import InputError
from knowledge_store.reading.plan import ReadPlan
from student_train.training.dataset import DistillationDataset


class DumpSnapshots(TrainerCallback, ExportableState):
    """Keeps in checkpoints which sequences the dump has and in what order they come, and refuses to resume where either is
    another: some sequences would come twice in an epoch and some never."""

    def __init__(self) -> None:
        self.snapshot: Any = None
        self.order: str | None = None

    def state(self) -> dict[str, Any]:
        """What goes into a checkpoint."""
        return {"args": {}, "attributes": {"snapshot": self.snapshot, "order": self.order}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compare, and remember.

        Raises:
            InputError: the dump has other sequences than when training began, or they would come in another order.
        """
        dataset = kwargs["train_dataloader"].dataset
        if not isinstance(dataset, DistillationDataset):
            return
        before = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
        self.snapshot, self.order = dataset.snapshot, _order(dataset.plan)
        state.stateful_callbacks[type(self).__name__] = self.state()
        if before.get("snapshot") not in (None, self.snapshot):
            raise InputError(
                f"there are other sequences in {', '.join(dataset.dumps)} than when this training began: begin it"
                " again, without resume_from_checkpoint"
            )
        if before.get("order") not in (None, self.order):
            raise InputError(
                f"this training began with sequences {before['order']}, and would go on with them {self.order}: give what it"
                " began with (the seed is that of a data set of your own, or else data_seed, or else seed)"
            )


def _order(plan: ReadPlan) -> str:
    """In what order sequences come, in words."""
    if not plan.shuffle:
        return "as they are stored"
    blocks = " in blocks" if plan.order == "blocks" else ""
    lengths = f", {plan.group_by_length} of them sorted by length together" if plan.group_by_length is not None else ""
    return f"shuffled{blocks} by the seed {plan.seed}{lengths}"
