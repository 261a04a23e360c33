"""Whether a dump holds what a run's loss needs, and what of the dump the run has no use for. Imports no torch."""

from __future__ import annotations

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from knowledge_store.kinds.positions import positions_of
from student_train.losses.table import LOSSES, TEXT, Loss
from student_train.training.calibration import usable_calibration, with_scale
from student_train.training.configuration import TrainConfig, check_config
from student_train.training.model_folder import check_model_folder
from student_train.training.run_folder import check_resume

_KNOWLEDGE = frozenset(
    ("token_logprob", "candidate_ids", "candidate_logprobs", "tail_logprob", "tail_ids", "tail_counts", "tail_logsumexp")
)


def unused_columns(config: TrainConfig, loss: Loss) -> frozenset[str]:
    """Columns of the table `positions` that a run has no use for; none are known of a loss of whole batches."""
    if loss.whole_batch:
        return frozenset()
    used = set(loss.columns)
    tempered = config.calibration is not None and config.loss != "first"
    if tempered:
        used.add("tail_logsumexp")
    elif loss.takes_draws and config.tail != "bucket" and config.temperature == 1:
        used |= {"tail_ids", "tail_counts"}
    return _KNOWLEDGE - used


def check_knowledge(store: KnowledgeStore, dump: str, config: TrainConfig, loss: Loss) -> None:
    """Refuse a dump that does not hold what a loss needs.

    Raises:
        InputError: naming the kinds or columns that are missing, or that there are no draws or no candidates.
    """
    name, manifest = config.loss, store.manifest(dump)
    kinds = manifest.kinds
    missing = [kind for kind in loss.kinds if kind not in kinds]
    if missing:
        raise InputError(f"the loss {name} needs the kind {missing[0]!r}, and the dump {dump} holds {', '.join(kinds)}")
    columns = next(iter(store.batches(dump, batch_size=1, shuffle=False)))
    missing = [column for column in (*loss.columns, *loss.inputs) if column not in columns]
    if missing:
        raise InputError(f"the loss {name} needs {', '.join(missing)}, which the dump {dump} does not hold")
    if "positions" not in loss.kinds:
        return
    rule = positions_of(manifest).selection
    if config.tail == "draws" and not rule.draws:
        raise InputError(f"--tail draws: the dump {dump} keeps no draws from the tail ({rule}); use --tail bucket")
    if rule.candidates or "candidate_ids" not in loss.columns:
        return
    nothing = f"the dump {dump} has no candidates, only draws ({rule})"
    if not loss.takes_draws:
        usable = [usable for usable, entry in LOSSES.items() if entry.takes_draws or not entry.columns]
        raise InputError(f"{nothing}: the loss {name} cannot use it; choose {' or '.join(usable)}")
    if config.tail == "bucket":
        raise InputError(f"{nothing}: --tail bucket has nothing to learn from it; use --tail draws")
    if config.temperature != 1:
        raise InputError(f"{nothing}: draws work at --temperature 1 only")


def kinds_read(store: KnowledgeStore, dump: str, loss: Loss) -> tuple[str, ...]:
    """The kinds of knowledge that a run reads: its loss's, and `positions`, which has the text, where the loss runs on that."""
    text = ("positions",) if TEXT[0] in loss.inputs and "positions" in store.manifest(dump).kinds else ()
    return tuple(dict.fromkeys((*text, *loss.kinds)))


def keeps_candidates(store: KnowledgeStore, dump: str) -> bool:
    """Whether a dump says which tokens the teacher finds likeliest."""
    manifest = store.manifest(dump)
    return "positions" in manifest.kinds and bool(positions_of(manifest).selection.candidates)


def check_run(config: TrainConfig) -> tuple[KnowledgeStore, str, Loss]:
    """The store, the name of the dump, and the loss of a run. What can be refused without loading a model is refused here.

    Raises:
        InputError: an option is out of range, the student's folder is missing, the calibration cannot be used, the store cannot
            be opened, the output is something else than the folder of this run, or the dump does not hold what the loss needs.
    """
    loss = check_config(config)
    store = KnowledgeStore.open(config.store, cache_size=int(config.cache_size * 1e9))
    dump = store.dump(config.dump)
    check_knowledge(store, dump, config, loss)
    calibration = usable_calibration(config, store.manifest(dump), loss)
    check_model_folder(config.student, config.gguf_file)
    check_resume(with_scale(config, calibration), store, dump, calibration.sha256 if calibration else None)
    return store, dump, loss
