"""The part of a trainer that learns hidden states: what is taken of the student, and the maps that are learnt with it.

A *projector* is a module of the model while it is trained, so that it is in the optimiser, and gradients are averaged over
processes; what transformers saves and loads is the model without it. It stands in a file beside the model:

    hidden_projector.safetensors   N.weight (H, W) and N.bias (H,) for each layer N in the order of the dump's; float32
                                   (float64 of a model in that)

W is the student's width and H the teacher's. Its metadata names the layers of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from knowledge_store.kinds.hidden import hidden_of
from student_train.losses.head import has_plain_head
from student_train.losses.hidden import Projector, keeping_states
from student_train.losses.targets import Batch
from student_train.training.configuration import HiddenStates
from student_train.training.hidden import check_hidden
from student_train.training.mixture import Mixture

PROJECTOR_FILE = "hidden_projector.safetensors"
MODULE = "hidden_projector"

# What the mixin's methods call is a trainer's: to a type checker it is one, and in truth it stands before one.
if TYPE_CHECKING:
    _Base = Any
else:
    _Base = object


class HiddenStatesMixin(_Base):
    """How `DistillationMixin` learns hidden states.

    Attributes:
        hidden: how, or None where it learns none.
        projector: that is learnt; None without one.
    """

    hidden: HiddenStates | None
    projector: Projector | None = None

    def take_states(self, store: KnowledgeStore, mixture: Mixture, hidden: HiddenStates) -> None:
        """Make sure that the model can have the states of the dumps, and give it a projector where one is asked for.

        Raises:
            InputError: it cannot, or something of the trainer does not go with it.
        """
        if self.args.torch_compile:
            raise InputError("learning hidden states does not go with torch_compile: leave one of the two out")
        model = self.accelerator.unwrap_model(self.model)
        has_plain_head(model)  # looked up before anything hooks into its passes
        config = model.config.get_text_config()
        layers, width = config.num_hidden_layers, config.hidden_size
        self._student_layers, teacher_width = check_hidden(store, mixture, hidden, layers=layers, width=width)
        if not hidden.projector:
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise InputError(
                "--hidden-projector does not go with sharded weights: use DDP, or a student as wide as the teacher"
            )
        self._teacher_layers = hidden_of(store.manifest(mixture.dumps[0])).layers
        self.projector = Projector(len(self._student_layers), width, teacher_width, seed=self.args.seed)
        dtype = torch.promote_types(model.dtype, torch.float32)  # that of the states, see `losses.hidden.keeping_states`
        setattr(self.model, MODULE, self.projector.to(self.model.device, dtype))

    def keeping_states(self, model: nn.Module, batch: Batch) -> AbstractContextManager[list[Tensor]]:
        """See `losses.hidden.keeping_states`; nothing is kept where no states are learnt."""
        if self.hidden is None:
            return nullcontext([])
        return keeping_states(model, batch, self._student_layers, self.projector)

    @contextmanager
    def projector_apart(self) -> Iterator[None]:
        """Within it, the model is as transformers saves and loads it."""
        if self.projector is None:
            yield
            return
        delattr(self.model, MODULE)
        try:
            yield
        finally:
            setattr(self.model, MODULE, self.projector)

    def load_projector(self, folder: str) -> None:
        """Go on with the projector that was saved in a folder, where there is one (InputError: it is another one's)."""
        if self.projector is None:
            return
        path = Path(folder) / PROJECTOR_FILE
        try:
            self.projector.load_state_dict(load_file(path))
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{path} is not the projector of this run: {reason}; remove that checkpoint") from error

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        with self.projector_apart():
            super()._save(output_dir, state_dict)
        if self.projector is not None and self.args.should_save:
            layers = {"student_layers": self._student_layers, "teacher_layers": self._teacher_layers}
            metadata = {name: ",".join(map(str, numbers)) for name, numbers in layers.items()}
            tensors = {name: tensor.contiguous() for name, tensor in self.projector.state_dict().items()}
            save_file(tensors, Path(output_dir or self.args.output_dir) / PROJECTOR_FILE, metadata)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with self.projector_apart():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.load_projector(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        with self.projector_apart():
            super()._load_best_model()
        self.load_projector(self.state.best_model_checkpoint)
