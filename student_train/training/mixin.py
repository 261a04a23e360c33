"""A store in the trainers that people already have: a mixin for `transformers.Trainer` and what is made of it, such as TRL's.

    class SFTDistillation(DistillationMixin, SFTTrainer): pass

The trainer keeps its arguments, callbacks, optimisers, checkpoints and evaluations. Ours: where batches come from, what the
loss is, and how a step is counted. The loss of an optimiser step is the mean over all targets of its batches, on all processes,
so that the same sequences give the same gradient however they are cut into batches, accumulated or shared out.
"""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from knowledge_store.format.manifest import Manifest
from knowledge_store.kinds.positions import POSITIONS, knows_full_kl
from knowledge_store.reading.mixture import Named, named_dumps, weights_of
from knowledge_store.reading.plan import TargetMask
from knowledge_store.reporter import SILENT, Reporter
from student_train.losses.head import has_plain_head
from student_train.losses.hidden import state_distances
from student_train.losses.rationale import rationale_nll
from student_train.losses.sliced import sliced_loss
from student_train.losses.step import per_target, run_student, step_loss
from student_train.losses.table import TEXT
from student_train.losses.targets import Batch, Targets
from student_train.training.chat_template import note_template
from student_train.training.collator import MASKS, DistillationCollator
from student_train.training.configuration import HiddenStates, check_loss
from student_train.training.context import check_context, note_max_length
from student_train.training.dataset import DistillationDataset
from student_train.training.endings import stop_at_ending
from student_train.training.hidden import check_hidden
from student_train.training.hidden_states import HiddenStatesMixin
from student_train.training.knowledge import check_mixture, kinds_read
from student_train.training.mixture import Mixture
from student_train.training.models import tokenizer_beside
from student_train.training.preferences import check_preferences, preferences
from student_train.training.rationale import check_trainer
from student_train.training.snapshots import DumpSnapshots
from student_train.training.trainer_arguments import check_arguments
from student_train.training.validation import OF_GROUPS, ValidationMixin, each_of, of_store
from student_train.training.vocabulary import check_embeddings, check_student


class DistillationMixin(HiddenStatesMixin, ValidationMixin):
    """Makes a trainer learn from a store; stands before `transformers.Trainer`, or a class made of it, among the bases.

    What the rows are:

    * without `train_dataset`, the sequences of the dump, `per_device_train_batch_size` at once, in the store's order by
      `data_seed` or `seed`;
    * with one, its rows, which are tokenised and in the dump; see `DistillationCollator`.

    Evaluations have the figures of `ValidationMixin`.

    Args:
        model, args, data_collator: as of the trainer; the collator is made here.
        train_dataset: rows of your own, or a `DistillationDataset` with its own batches; None for the dump's sequences.
        eval_dataset: the same, or several by name.
        store, dump: what to learn from: one dump, or several as `KnowledgeStore.batches` takes them; it may be left out when
            there is one.
        teachers: several dumps of one corpus instead, each with its weight in the loss.
        ordinals, targets: which sequences to read and which targets count, by dump; as in `ReadPlan`. None for all.
        order: "global" or "blocks", as in `ReadPlan`.
        group_by_length: sort so many sequences by length at a time, so that batches have less padding; None does not.
        loss: a name in `LOSSES`.
        ce_weight: share of cross-entropy in the loss, from 0 to 1.
        rationale_weight: share of the second task in the loss, from 0 to below 1, where batches have rationales (see
            `rationales.second_input`); None where they have none.
        hidden: how the student is to have the dump's hidden states; None where it is not. A projector becomes a module of the
            model, and is saved in a file of its own (see `hidden_states`).
        loss_options: keyword arguments of the loss, such as `{"temperature": 2.0}`.
        reference, scores: dumps that a loss of preferences asks about the answers, as of `preferences`; with a train_dataset of
            your own, its `prepare` has them.
        recalibrate: what to make of the teacher's targets before the loss, such as `recalibrated`.
        named: whatever else the trainer takes. Its `processing_class` should be the student's tokenizer, by which vocabularies
            are compared; without it that is the one in the folder that the model was loaded from.

    The student's generation settings, and the end-of-sequence token of its tokenizer, become those that end the dump's targets,
    as `endings.stop_at_ending` has them. A UserWarning says what changes, and what a run would tell of the student.

    Raises:
        InputError: the dump does not hold what the loss needs, or is of another vocabulary than the model; rows are not in the
            dump; or an argument does not go with it, and which.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        store: KnowledgeStore | None = None,
        dump: Named = None,
        teachers: Mapping[str, float] | None = None,
        ordinals: Any = None,
        targets: Mapping[str, TargetMask] | None = None,
        order: str | None = None,
        group_by_length: int | None = None,
        loss: str = "forward-kl",
        ce_weight: float = 0.0,
        rationale_weight: float | None = None,
        hidden: HiddenStates | None = None,
        loss_options: Mapping[str, float | str] | None = None,
        reference: str | None = None,
        scores: str | None = None,
        recalibrate: Callable[[Targets], Targets] | None = None,
        **named: Any,
    ) -> None:
        named_teachers = teachers
        if isinstance(train_dataset, DistillationDataset):
            store, dump, named_teachers = train_dataset.store, train_dataset.dump, train_dataset.plan.teachers
        if store is None:
            raise InputError("a trainer needs a store to learn from: give store=KnowledgeStore.open(…), and dump=… of several")
        config, self.distillation = check_loss(loss, ce_weight, loss_options or {}, reference=reference, scores=scores)
        if self.distillation.hidden_states and (hidden is not None or targets is not None):
            raise InputError(f"the loss {loss} is of all targets' hidden states, and goes with neither hidden nor targets")
        mixture = _mixture(store, dump, named_teachers)
        self.dumps = dumps = mixture.dumps
        self._told = check_mixture(store, mixture, config, self.distillation)
        self.ce_weight, self.loss_options, self.recalibrate = ce_weight, dict(loss_options or {}), recalibrate
        manifests, on_text = [store.manifest(name) for name in dumps], TEXT[0] in self.distillation.inputs
        measured = [part.store.manifest(name) for part in each_of(eval_dataset) if of_store(part) for name in part.dumps]
        kl = _divergence([*manifests, *measured]) if on_text else ()
        self.rationale_weight, self.hidden = rationale_weight, hidden
        if rationale_weight is not None:
            check_trainer(rationale_weight, (train_dataset, *each_of(eval_dataset)))
        if hidden is not None:
            check_hidden(store, mixture, hidden, layers=None, width=None)
        of_groups = self.distillation.unit == "group"
        rewarded = OF_GROUPS if self.distillation.rewards is not None else ()
        self.figures = ("loss", *(("nll",) if on_text else ()), *kl, *rewarded, *self._more)
        self._source: dict[str, Any] = {"store": store, "dump": dump}
        if train_dataset is None:
            check_preferences(config, store, mixture, self.distillation)
            if reference is not None or scores is not None:
                self._source["prepare"] = preferences(store, dumps[0], reference=reference, scores=scores)
        chosen = {"teachers": teachers, "ordinals": ordinals, "targets": targets, "order": order}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        self._plan: dict[str, Any] = {**chosen, "kinds": kinds_read(manifests[0], self.distillation, hidden)}
        if of_groups:
            self._plan["groups"] = True
        from_store = train_dataset is None
        if from_store:
            train_dataset = DistillationDataset(**self._source, **self._plan)
        reads_store = isinstance(train_dataset, DistillationDataset)
        self._group_by_length = group_by_length
        for_store = {"group_by_length": group_by_length, "reference": reference, "scores": scores}
        named_for_store = [*chosen, *(name for name, value in for_store.items() if value is not None)]
        if named_for_store and not from_store:
            names = ", ".join(named_for_store)
            raise InputError(f"{names} goes with the dump's own sequences, and train_dataset is other ones: leave one out")
        if args is not None:
            check_arguments(args, named, from_store=reads_store)
        if data_collator is not None and not isinstance(data_collator, DistillationCollator):
            raise InputError("data_collator is made here, of store and dump: leave it out")
        if data_collator is None:
            data_collator = DistillationCollator(store, dumps[0], kinds=self._plan["kinds"])
        _check_parts([*each_of(train_dataset), *each_of(eval_dataset)], dumps, loss if of_groups else None)

        super().__init__(
            model,
            args,
            data_collator,
            self._as_taken(train_dataset),
            self._as_taken(eval_dataset),
            **named,
        )
        if args is None:
            check_arguments(self.args, named, from_store=reads_store)
        if self.get_tp_size() * self.get_cp_size() * self.get_sp_size() > 1:
            raise InputError("tensor, context and sequence parallelism do not go with learning from a store: use DDP or FSDP")
        if reads_store:
            self.train_dataset = self._dataset() if from_store else train_dataset
        if of_store(eval_dataset):
            self.eval_dataset = eval_dataset
        self._from_store = from_store
        # A step's counts are divided by in `compute_loss`, so the trainer divides by nothing more.
        self.model_accepts_loss_kwargs = True
        self._check_model(store, mixture)
        if hidden is not None:
            self.take_states(store, mixture, hidden)
        for dataset in (self.train_dataset, *(each_of(self.eval_dataset))):
            self._check_rows(dataset)
        self.add_callback(DumpSnapshots())

    def _as_taken(self, dataset: Any) -> Any:
        """A data set as the trainer's own initialisation takes it. TRL's looks at rows, and takes those of `datasets` alone: it
        is shown one row, and has its data set back afterwards."""
        if not of_store(dataset) or not any(base.__module__.startswith("trl.") for base in type(self).__mro__):
            return dataset
        import datasets

        return datasets.Dataset.from_dict({"input_ids": [[0, 0]], "labels": [[0, 0]]})

    def _dataset(self) -> DistillationDataset:
        """The dump's sequences, for this process."""
        arguments = self.args
        global_batch = self._train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        return DistillationDataset(
            **self._source,
            **self._plan,
            batch_size=self._train_batch_size,
            seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
            shuffle=arguments.train_sampling_strategy != "sequential",
            group_by_length=self._group_by_length,
            global_batch=global_batch if self._group_by_length else None,
            rank=arguments.process_index,
            world_size=arguments.world_size,
        )

    def _check_model(self, store: KnowledgeStore, mixture: Mixture) -> None:
        """Make the model stop where the targets end, and warn of what `student-train run` tells of a student (InputError: it
        cannot learn from a dump)."""
        model = self.accelerator.unwrap_model(self.model)
        reporter = _Warnings() if self.is_world_process_zero() else SILENT
        tokenizer, name = self.processing_class, "the student"
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer = getattr(tokenizer, "tokenizer", None)  # of a processor
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer = tokenizer_beside(model.config)
            name = f"the student (by the tokenizer in {model.config.name_or_path}; processing_class=… gives another)"
        for sentence in self._told:
            reporter.note(sentence)
        for part in filter(of_store, each_of(self.eval_dataset)):
            for missing in filter(None, map(part.store.what_is_missing, part.dumps)):
                reporter.note(missing)
        for dump in self.dumps:
            if isinstance(self.train_dataset, DistillationDataset):
                note_max_length(store, dump, getattr(self.args, "max_length", None), reporter)
            if tokenizer is not None:
                check_student(store, dump, model.config, tokenizer, name=name, reporter=reporter)
            else:
                check_embeddings(store, dump, model.config)
            if TEXT[0] in self.distillation.inputs:
                check_context(store, dump, model, reporter=reporter)
        if tokenizer is None:
            reporter.note(
                f"Neither the student's vocabulary nor what it stops at is compared with {' and '.join(self.dumps)}: no"
                " tokenizer could be read in a local folder that it was loaded from; give the student's as processing_class=…"
            )
            return
        kept = "set model.generation_config.eos_token_id after this to have others"
        stop_at_ending(model, tokenizer, store, mixture.corpus, how_to_keep=kept, reporter=reporter)
        note_template(tokenizer, store, mixture.corpus, reporter=reporter)

    def _check_rows(self, dataset: Any) -> None:
        """Raises InputError where people's own rows, if they can be counted, are not all in the dump."""
        if isinstance(dataset, DistillationDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            return
        count, rank, processes = len(dataset), self.args.process_index, self.args.world_size
        numbers = range(rank, count, processes)  # each process looks at some
        missing, problem = [], None
        try:
            missing = [numbers[place] for place in self.data_collator.missing(dataset[number] for number in numbers)]
        except InputError as error:  # no process may wait for this one
            problem = error
        found = torch.tensor([len(missing), missing[0] if missing else count, problem is not None], device=self.args.device)
        found = self.accelerator.gather(found).reshape(-1, 3)
        if found[:, 2].any():
            raise problem or InputError("rows that another process has looked at cannot be used: its error says why")
        total, first = int(found[:, 0].sum()), int(found[:, 1].min())
        if total:
            raise InputError(
                f"{total:,} of {count:,} rows are not in the dump {self.dumps[0]}; the first is row {first}. Rows are compared"
                " by all their tokens: the chat template, eos_token and max_length must be those of the dump, where a text"
                " longer than its --max-length stands as several. Leave the others out (`DistillationCollator.missing` gives"
                " their numbers), or make a dump of them"
            )

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """The store's batches as they are, which each process reads for itself; or the trainer's own loader of rows."""
        has_plain_head(self.accelerator.unwrap_model(self.model))  # looked up before anything wraps it
        if not isinstance(self.train_dataset, DistillationDataset):
            return super().get_train_dataloader()
        if self._from_store:
            self.train_dataset = self._dataset()  # the batch size may be another one by now (auto_find_batch_size)
        return self._loader(self.train_dataset, persistent=self.args.dataloader_persistent_workers)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The same of a data set to evaluate on."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        if isinstance(dataset, DistillationDataset):
            return self._loader(dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """The same of a data set to predict on."""
        if isinstance(test_dataset, DistillationDataset):
            return self._loader(test_dataset)
        return super().get_test_dataloader(test_dataset)

    def _loader(self, dataset: DistillationDataset, *, persistent: bool = False) -> DataLoader:
        arguments, workers = self.args, self.args.dataloader_num_workers
        if workers and dataset.start_method:  # libraries are loaded once, and not by each worker of each loader
            multiprocessing.set_forkserver_preload(["__main__", DistillationDataset.__module__])
        # Accelerate's, which tells the data set its epoch. Made here: `accelerator.prepare` would divide it among processes.
        return DataLoaderShard(
            dataset,
            batch_size=None,
            num_workers=workers,
            pin_memory=arguments.dataloader_pin_memory and arguments.device.type == "cuda",
            persistent_workers=persistent and workers > 0,
            prefetch_factor=arguments.dataloader_prefetch_factor,
            multiprocessing_context=(arguments.dataloader_multiprocessing_context or dataset.start_method) if workers else None,
        )

    def num_examples(self, dataloader: DataLoader) -> int:
        """How many sequences a loader reads in an epoch, over all processes."""
        if isinstance(dataloader.dataset, DistillationDataset):
            return dataloader.dataset.sequences
        return super().num_examples(dataloader)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "sequence_id" not in self._signature_columns:
            self._signature_columns += ["sequence_id", "attention_mask", "labels", *MASKS]

    def _init_training_state(self, *positional: Any, **named: Any) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(*positional, **named)
        if isinstance(self.train_dataset, DistillationDataset) and not self.train_dataset.endless:
            self.train_dataset.pass_over(epochs, batches)  # a resumed trainer draws them, and throws them away
        return epochs, batches

    def _prepare_input(self, data: Any) -> Any:
        # With DeepSpeed the trainer would make 16 bits of log-probabilities, as of what a model computes with.
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model)
        if hasattr(model, "peft_config") and model.generation_config is not None:
            # Which no adapter is saved with; as it is, where `save_pretrained` raises of settings that do not go together.
            model.generation_config.to_json_file(Path(output_dir or self.args.output_dir) / "generation_config.json")

    # A step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], dict[str, Tensor]]:
        """The batches of one optimiser step, and how many targets and sequences they hold over all processes."""
        batches = list(islice(epoch_iterator, num_batches))
        return batches, self.step_counts(batches, device)

    def step_counts(self, batches: Sequence[Batch], device: torch.device, **more: int) -> dict[str, Tensor]:
        """Sums over all processes: of the units of some batches, and of other numbers."""
        counts = [self.units(batch) for batch in batches]
        sums = {unit: sum(int(count[unit]) for count in counts) for unit in self.unit_names} | more
        totals = self.accelerator.reduce(torch.tensor(list(sums.values()), device=device), reduction="sum")
        return dict(zip(sums, totals, strict=True))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """This batch's share of the step's loss, times the number of processes: DDP averages gradients over them, and so do
        FSDP and DeepSpeed, whose shards are means of what each process adds."""
        counts = self.units(inputs) if num_items_in_batch is None else num_items_in_batch
        options: dict[str, Any] = {"ce_weight": self.ce_weight, "options": self.loss_options}
        outputs = None
        with self.keeping_states(model, inputs) as states:
            if self.distillation.whole_batch or return_outputs:
                outputs = run_student(model, self.distillation, inputs, logits=return_outputs)
                loss = step_loss(self.distillation, outputs, inputs, counts, recalibrate=self.recalibrate, **options)
            else:
                function = per_target(self.distillation, **options)
                loss = sliced_loss(model, inputs, function, count=counts["target"], recalibrate=self.recalibrate)
        if self.hidden is not None:
            apart = state_distances(states, inputs, self.hidden.loss).sum()
            apart = apart / torch.as_tensor(counts["hidden"], device=loss.device).clamp(min=1)
            loss = (1 - self.hidden.weight) * loss + self.hidden.weight * apart
        if self.rationale_weight is not None:
            rationale = rationale_nll(model, inputs) / torch.as_tensor(counts["rationale"], device=loss.device).clamp(min=1)
            loss = (1 - self.rationale_weight) * loss + self.rationale_weight * rationale
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs[0]) if outputs and return_outputs else loss


class _Warnings(Reporter):
    """Warns of what it is told."""

    def note(self, sentence: str) -> None:
        warnings.warn(sentence.removeprefix("Warning: "), stacklevel=2)


def _divergence(manifests: Sequence[Manifest]) -> tuple[str, ...]:
    """What evaluations call the divergence that is known of all of some dumps; nothing where it is of none."""
    if all(map(knows_full_kl, manifests)):
        return ("kl",)
    return ("kl_lower_bound",) if all(POSITIONS.name in manifest.kinds for manifest in manifests) else ()


def _check_parts(parts: Sequence[Any], dumps: Sequence[str], loss_of_groups: str | None) -> None:
    """Refuse data sets to train and evaluate on that do not go with the loss, or with several dumps (InputError)."""
    rows = [part for part in parts if not isinstance(part, DistillationDataset)]
    if loss_of_groups is not None and (rows or not all(part.plan.groups for part in parts)):
        raise InputError(
            f"the loss {loss_of_groups} reads groups of answers: leave train_dataset out, or give it and eval_dataset as"
            " DistillationDataset(store, …, groups=True, prepare=preferences(…))"
        )
    if rows and len(dumps) > 1:
        raise InputError("rows of your own are looked for in one dump: name one")


def _mixture(store: KnowledgeStore, dump: Named, teachers: Mapping[str, float] | None) -> Mixture:
    """The dumps that a trainer is given (InputError: there are no such ones, or a weight is none)."""
    if teachers is None:
        names, weights = named_dumps(dump, store.dump)
        return Mixture(weights or dict.fromkeys(names))
    weights = weights_of(teachers, "teacher")
    named_dumps(list(weights), store.dump)
    return Mixture(weights, teachers=True)


class DistillationTrainer(DistillationMixin, Trainer):
    """`transformers.Trainer` that learns from a store; see `DistillationMixin` for its arguments.

    `DistillationTrainer(model, args=TrainingArguments(…), store=KnowledgeStore.open(…), dump="train").train()`
    """
