"""Evaluations of a trainer that learns from a store: means over targets, however these are cut into batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from student_train.losses.divergences import forward_kl, token_nll
from student_train.losses.full_kl import full_kl
from student_train.losses.hidden import kept_positions, state_distances
from student_train.losses.preference import TargetLogprobs, margins
from student_train.losses.rationale import rationale_count, rationale_nll
from student_train.losses.sliced import Prepare, sum_over_slices
from student_train.losses.step import run_student, step_loss, units
from student_train.losses.table import TEXT
from student_train.losses.targets import Batch, Targets, predicting_logits, target_tokens
from student_train.losses.teachers import Share, weighted_loss
from student_train.training.configuration import HiddenStates
from student_train.training.dataset import DistillationDataset

# From the teacher, as figures.
DIVERGENCES: dict[str, Callable[[Tensor, Targets], Tensor]] = {
    "kl": lambda logits, targets: full_kl(logits, targets).estimate,
    "kl_lower_bound": partial(forward_kl, tail="bucket"),
}

# Of a loss of groups, means over them.
OF_GROUPS = ("accuracy", "margin")

# What the mixin's methods call is a trainer's: to a type checker it is one, and in truth it stands before one.
if TYPE_CHECKING:
    _Base = Any
else:
    _Base = object


class ValidationMixin(_Base):
    """How `DistillationMixin` evaluates.

    Every figure is a mean over the targets of all processes: `eval_loss`, the objective on the evaluated sequences; `eval_nll`,
    the negative log-likelihood of their text; and `eval_kl`, the divergence from the teacher (`full_kl`), or where a dump keeps
    no draws, or not the entropy of what they are from, `eval_kl_lower_bound` (over candidates and tail as one more symbol);
    nats. The last two are the same for any loss; they are left out for one that does not run on the text, and the bound for a
    dump without candidates. Where batches have rationales, `eval_rationale` is the negative log-likelihood of their tokens, a
    mean over these. Where hidden states are learnt, `eval_hidden` is how far the student's
    are from the teacher's, a mean over the positions that have some. Of a loss of groups, `eval_loss` is a mean over these,
    and so are `eval_accuracy`, the share of groups whose best answer has a higher reward than their worst, and `eval_margin`,
    by how much; rewards are what the loss raises (see `Loss.rewards`).

    Attributes:
        figures: the names of these that there are, without `eval_`.
        distillation: the entry of the loss in `LOSSES`.
        ce_weight, rationale_weight, hidden, loss_options, recalibrate: as of `DistillationMixin`.
    """

    eval_dataset: Any
    rationale_weight: float | None
    hidden: HiddenStates | None

    @property
    def unit_names(self) -> tuple[str, ...]:
        """What is counted of a batch, to divide sums by."""
        return ("target", "sequence", "group", *self._more)

    @property
    def _more(self) -> tuple[str, ...]:
        """What is learnt beside the loss, each a figure and a unit of its own."""
        learnt = {"rationale": self.rationale_weight, "hidden": self.hidden}
        return tuple(name for name, given in learnt.items() if given is not None)

    def units(self, batch: Batch) -> dict[str, Tensor]:
        """How many of each a batch holds (scalars, int64)."""
        counts = {"rationale": rationale_count, "hidden": lambda batch: kept_positions(batch).sum()}
        return units(batch) | {name: counts[name](batch) for name in self._more}

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As of the trainer. Its figures are those of the head of this class, and what `compute_metrics` gives."""
        if not of_store(eval_dataset):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        kept, self.eval_dataset = self.eval_dataset, eval_dataset  # TRL's would tokenise what it is given
        try:
            return super().evaluate(None, ignore_keys, metric_key_prefix)
        finally:
            self.eval_dataset = kept

    def evaluation_loop(self, dataloader: DataLoader, *positional: Any, **named: Any) -> Any:
        """As of the trainer, whose loss would be a mean of batches' means."""
        self._sums = torch.zeros(len(self.figures), dtype=torch.float64)
        self._units = dict.fromkeys(self.unit_names, 0)
        output = super().evaluation_loop(dataloader, *positional, **named)
        prefix = named.get("metric_key_prefix", positional[3] if len(positional) > 3 else "eval")
        output.metrics.update({f"{prefix}_{name}": float(value) for name, value in self._means().items()})
        if isinstance(dataloader.dataset, DistillationDataset):
            output = output._replace(num_samples=dataloader.dataset.sequences)
        return output

    def prediction_step(
        self, model: torch.nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """Loss, logits and labels of a batch, the last two where they are asked for."""
        batch = self._without_repeated_rows(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            sums, logits = self._measured(model, batch, keep_logits=not prediction_loss_only)
        counts = {unit: int(count) for unit, count in self.units(batch).items()}
        self._sums += sums.double().cpu()
        for unit, count in counts.items():
            self._units[unit] += count
        loss = (sums[0] / max(counts[self.distillation.unit], 1)).detach()
        return loss, logits, None if logits is None else batch["labels"]

    def _without_repeated_rows(self, batch: Batch) -> Batch:
        """The last batch of rows of people's own without those with which accelerate filled it up, from the beginning."""
        state, rows = self.accelerator.gradient_state, len(batch["sequence_id"])
        if not state.end_of_dataloader or state.remainder <= 0:
            return batch
        places = torch.arange(rows, device=batch["sequence_id"].device) + self.args.process_index * rows
        real = places < state.remainder
        batch = {**batch, "sequence_id": batch["sequence_id"].where(real, -1)}
        if "is_target" in batch:
            batch["is_target"] = batch["is_target"] & real.unsqueeze(-1)
        return batch

    def _means(self) -> dict[str, Tensor]:
        """The figures of what was measured, over all processes."""
        device = self.args.device
        sums = self.accelerator.reduce(self._sums.float().to(device), reduction="sum")
        counts = self.accelerator.reduce(torch.tensor(list(self._units.values()), device=device), reduction="sum")
        divisors = dict(zip(self._units, counts.clamp(min=1), strict=True))
        units_of = {"loss": self.distillation.unit, **dict.fromkeys(OF_GROUPS, "group"), **{name: name for name in self._more}}
        means = {name: value / divisors[units_of.get(name, "target")] for name, value in zip(self.figures, sums, strict=True)}
        if self.ce_weight:  # apart until here, since it may be of other units
            means["loss"] = (1 - self.ce_weight) * means["loss"] + self.ce_weight * means["nll"]
        if self.hidden is not None:
            means["loss"] = (1 - self.hidden.weight) * means["loss"] + self.hidden.weight * means["hidden"]
        if self.rationale_weight is not None:
            means["loss"] = (1 - self.rationale_weight) * means["loss"] + self.rationale_weight * means["rationale"]
        return means

    def _measured(self, model: torch.nn.Module, batch: Batch, *, keep_logits: bool = False) -> tuple[Tensor, Any]:
        """A batch's sums of the figures, the loss without its shares of cross-entropy, rationales and hidden states, and the
        logits where they are kept."""
        with self.keeping_states(model, batch) as states:
            sums, logits = self._measured_on_text(model, batch, keep_logits=keep_logits)
        if self.rationale_weight is not None:
            sums = torch.cat([sums, rationale_nll(model, batch).to(sums.dtype).reshape(1)])
        if self.hidden is not None:
            apart = state_distances(states, batch, self.hidden.loss).sum()
            sums = torch.cat([sums, apart.to(sums.dtype).reshape(1)])
        return sums, logits

    def _measured_on_text(self, model: torch.nn.Module, batch: Batch, *, keep_logits: bool) -> tuple[Tensor, Any]:
        if self.distillation.unit == "group":
            return self._measured_of_groups(model, batch, keep_logits=keep_logits)
        if not (self.distillation.whole_batch or keep_logits):
            return sum_over_slices(model, batch, self._shares(batch, self.distillation.function)), None
        outputs = run_student(model, self.distillation, batch)
        whole = outputs[self.distillation.inputs.index(TEXT[0])].logits if TEXT[0] in self.distillation.inputs else None
        kept = whole if keep_logits else None
        function = None if self.distillation.whole_batch else self.distillation.function
        sums = []
        if function is None:
            ones = {"target": 1, "sequence": 1, "group": 1}
            sums.append(step_loss(self.distillation, outputs, batch, ones, options=self.loss_options).unsqueeze(0))
        if whole is not None:
            logits = predicting_logits(whole, batch)
            sums.append(self._shares(batch, function)(logits.shape[-1])(logits, slice(0, len(logits))))
        return torch.cat(sums), kept

    def _measured_of_groups(self, model: torch.nn.Module, batch: Batch, *, keep_logits: bool) -> tuple[Tensor, Any]:
        """As `_measured_on_text`, of a loss of groups, from the tokens' log-probabilities."""
        found: list[Tensor] = []
        prepare, kept = self._shares(batch, None, found), None
        if keep_logits:
            [outputs] = run_student(model, self.distillation, batch)
            kept, logits = outputs.logits, predicting_logits(outputs.logits, batch)
            sums = prepare(logits.shape[-1])(logits, slice(0, len(logits)))
        else:
            sums = sum_over_slices(model, batch, prepare)
        logprobs = TargetLogprobs(torch.cat(found))
        losses = self.distillation.function(logprobs, batch, **self.loss_options)
        of_groups = []
        if self.distillation.rewards is not None:
            apart = margins(self.distillation.rewards(logprobs, batch, **self.loss_options), batch)
            of_groups = [(apart > 0).sum(), apart.sum()]
        return torch.stack([part.to(sums.dtype) for part in (losses.sum(), *sums, *of_groups)]), kept

    def _shares(self, batch: Batch, function: Callable[..., Tensor] | None, logprobs: list[Tensor] | None = None) -> Prepare:
        """What a slice of logits adds to the figures of the text; without a function, to all but the first, the loss. The list
        gets the log-probabilities of each slice's tokens."""
        tokens = target_tokens(batch)

        def prepare(vocabulary_size: int) -> Share:
            divergence = next((DIVERGENCES[name] for name in self.figures if name in DIVERGENCES), None)
            known = weighted_loss(divergence, batch, vocabulary_size) if divergence else None
            learned = None
            if function:
                learned = weighted_loss(partial(function, **self.loss_options), batch, vocabulary_size, self.recalibrate)

            def share(logits: Tensor, rows: slice) -> Tensor:
                sums = [learned(logits, rows).sum()] if learned else []
                nll = token_nll(logits, tokens[rows])
                sums.append(nll.sum())
                if logprobs is not None:
                    logprobs.append(-nll)
                if known:
                    sums.append(known(logits, rows).sum())
                return torch.stack(sums)

            return share

        return prepare


def of_store(dataset: Any) -> bool:
    """Whether a data set, or one of several by name, is of a store."""
    return any(isinstance(part, DistillationDataset) for part in each_of(dataset))


def each_of(dataset: Any) -> tuple[Any, ...]:
    """A data set, or several by name, as a tuple."""
    if dataset is None:
        return ()
    return tuple(dataset.values()) if isinstance(dataset, dict) else (dataset,)
