"""Whether a dump holds what a run's loss needs, and what of the dump the run reads. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable

from knowledge_store import KINDS, KnowledgeStore, Manifest
from knowledge_store.errors import InputError
from student_train.losses.table import TEXT, TEXT_COLUMNS, Loss
from student_train.training.calibration import usable_calibration, with_scale
from student_train.training.choice import check_choice
from student_train.training.configuration import TrainConfig, check_config
from student_train.training.model_folder import check_model_folder
from student_train.training.positions import check_selection
from student_train.training.run_folder import check_resume

# What a kind's parameters have to allow for a loss that needs it, where the arrays of a batch do not say so.
CHECKS: dict[str, Callable[[Manifest, TrainConfig, Loss], None]] = {"positions": check_selection}


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
    for kind in loss.kinds:
        if kind in CHECKS:
            CHECKS[kind](manifest, config, loss)


def kinds_read(manifest: Manifest, loss: Loss) -> tuple[str, ...]:
    """The kinds of knowledge that a run reads: its loss's, and the one that has the text, where the loss runs on that."""
    with_text = (kind for kind in manifest.kinds if TEXT[0] in loss.inputs and TEXT[0] in KINDS[kind].arrays(manifest))
    return tuple(dict.fromkeys((*with_text, *loss.kinds)))


def columns_read(manifest: Manifest, config: TrainConfig, loss: Loss) -> dict[str, frozenset[str]]:
    """The columns that a run has a use for, by kind of knowledge: for a loss of whole batches, all of the kinds it reads."""
    columns = {kind: frozenset(KINDS[kind].schema(manifest).names) for kind in kinds_read(manifest, loss)}
    if loss.whole_batch:
        return columns
    used = {*TEXT_COLUMNS, *loss.columns}
    if config.calibration is not None and loss.recalibrated:
        used.update(loss.recalibrated)
    elif config.tail != "bucket" and config.temperature == 1:
        used.update(loss.draws)
    return {kind: names & used for kind, names in columns.items()}


def check_run(config: TrainConfig) -> tuple[KnowledgeStore, str, Loss]:
    """The store, the name of the dump, and the loss of a run. What can be refused without loading a model is refused here.

    Raises:
        InputError: an option is out of range, the student's folder is missing, the calibration cannot be used, the store cannot
            be opened, the output is something else than the folder of this run, or the dump does not hold what the loss needs.
        QueryError: what chooses from the dump cannot be used.
    """
    loss = check_config(config)
    store = KnowledgeStore.open(config.store, cache_size=int(config.cache_size * 1e9))
    dump = store.dump(config.dump)
    check_knowledge(store, dump, config, loss)
    calibration = usable_calibration(config, store.manifest(dump), loss)
    check_model_folder(config.student, config.gguf_file)
    check_choice(config, store, [dump], kinds_read(store.manifest(dump), loss))
    check_resume(with_scale(config, calibration), store, dump, calibration.sha256 if calibration else None)
    return store, dump, loss
