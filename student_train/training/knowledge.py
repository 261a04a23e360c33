"""Whether dumps hold what a run's loss needs, and what of a dump the run reads. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from knowledge_store import KINDS, KnowledgeStore, Manifest
from knowledge_store.errors import InputError
from knowledge_store.reading.teachers import corpus_change
from knowledge_store.reporter import SILENT, Reporter
from student_train.losses.table import TEXT, TEXT_COLUMNS, Loss
from student_train.training.calibration import usable_calibration, with_scale
from student_train.training.configuration import HiddenStates, TrainConfig, check_config
from student_train.training.hidden import KIND, check_hidden
from student_train.training.mixture import Mixture, resolve_mixture
from student_train.training.model_folder import check_model_folder, stated_layers, stated_width
from student_train.training.positions import check_selection, check_selections
from student_train.training.preferences import check_preferences
from student_train.training.rationale import check_rationale
from student_train.training.relations import check_vectors
from student_train.training.run_folder import check_folder, check_resume

# What a kind's parameters have to allow for a loss that needs it, where the arrays of a batch do not say so: those of one dump,
# and those of several that are read together.
CHECKS: dict[str, Callable[[Manifest, TrainConfig, Loss], None]] = {"positions": check_selection, "vectors": check_vectors}
CHECKS_TOGETHER: dict[str, Callable[[Sequence[Manifest], TrainConfig, Loss], list[str]]] = {"positions": check_selections}


def check_knowledge(store: KnowledgeStore, dump: str, config: TrainConfig, loss: Loss) -> None:
    """Refuse a dump that does not hold what a loss needs.

    Raises:
        InputError: naming the kinds or columns that are missing, or that there are no draws or no candidates.
    """
    name, manifest = config.loss, store.manifest(dump)
    if loss.unit == "group" and not manifest.has_groups:
        raise InputError(
            f"the loss {name} learns from groups of answers, and the dump {dump} has none: dump a corpus with chosen and"
            " rejected, or with completions, beside its prompts"
        )
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


def check_mixture(store: KnowledgeStore, mixture: Mixture, config: TrainConfig, loss: Loss) -> list[str]:
    """Refuse dumps that do not hold what a loss needs, or that cannot be read together.

    Returns:
        what a person should know of what is taken of them, in sentences.

    Raises:
        InputError: naming the dump, and what is missing; or the loss cannot learn from several teachers.
    """
    sentences = []
    for dump in mixture.dumps:
        check_knowledge(store, dump, config, loss)
        if missing := store.what_is_missing(dump):
            sentences.append(f"Warning: {missing}")
    if len(mixture.dumps) == 1:
        return sentences
    manifests = [store.manifest(dump) for dump in mixture.dumps]
    sentences += _check_teachers(config, loss) if mixture.teachers else [*_same_texts(manifests), *_teachers(manifests)]
    batches = store.batches(mixture.source, kinds=kinds_read(manifests[0], loss), **mixture.plan)
    sentences += [f"The dumps differ: {difference}." for difference in batches.taken.differences]
    for kind in loss.kinds:
        if kind in CHECKS_TOGETHER:
            sentences += CHECKS_TOGETHER[kind](manifests, config, loss)
    return sentences


def _check_teachers(config: TrainConfig, loss: Loss) -> list[str]:
    """As `check_mixture`, what has to do with the loss alone."""
    if loss.whole_batch:
        raise InputError(
            f"--teachers: the loss {config.loss} is of whole batches, which hold one teacher's knowledge: use --dump"
        )
    if not loss.columns:
        raise InputError(f"--teachers: the loss {config.loss} learns nothing from a teacher: choose one dump with --dump")
    if config.calibration is not None:
        raise InputError("--teachers: a --calibration belongs to one teacher, and holds for no other: leave one of the two out")
    if loss.draws:  # which have an estimate because it is linear in the teacher's distribution
        return []
    return [
        f"With --teachers, {config.loss} is the weighted sum of its values for each teacher, not its value for their mixture:"
        " for forward-kl alone the two teach the same."
    ]


def _same_texts(manifests: Sequence[Manifest]) -> list[str]:
    """Sentences on dumps of one corpus that are read as several, each text once from each."""
    corpora: list[list[Manifest]] = []
    for manifest in manifests:
        same = next((corpus for corpus in corpora if corpus_change(corpus[0], manifest) is None), None)
        if same is None:
            corpora.append([manifest])
        else:
            same.append(manifest)
    groups = [[manifest.dump for manifest in corpus] for corpus in corpora if len(corpus) > 1]
    sentences = [
        f"{', '.join(dumps[:-1])} and {dumps[-1]} are dumps of the same texts, which are read once from each:"
        f" --teachers {','.join(dumps)} reads them once, with what all of these say of them."
        for dumps in groups
    ]
    read: dict[str, str] = {}
    for dump, *_ in corpora:
        files = {file["sha256"]: file["name"] for file in dump.corpus.get("files", ()) if "sha256" in file}
        if again := next((sha256 for sha256 in files if sha256 in read), None):
            sentences.append(
                f"{read[again]} and {dump.dump} are both dumps of the file {files[again]}, whose texts are read once from each,"
                " as other sequences or with other targets."
            )
        read = dict.fromkeys(files, dump.dump) | read
    return sentences


def _teachers(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Sentences on dumps whose teacher is another than the first's, by its files, or of a server by its name; or the same in
    another precision."""
    first = manifests[0]
    one, name = first.teacher.get("files"), first.teacher["name"]
    for manifest in manifests[1:]:
        other, other_name = manifest.teacher.get("files"), manifest.teacher["name"]
        if one is not None and one == other:
            for part in ("dtype", "quantize"):
                values = [each.teacher.get(part, "not there") for each in (first, manifest)]
                if values[0] != values[1]:
                    yield f"The teacher's {part} is {values[0]} in {first.dump} and {values[1]} in {manifest.dump}."
        elif name != other_name:
            yield f"The teacher is {name} in {first.dump} and {other_name} in {manifest.dump}."
        elif one is not None and other is not None:
            yield f"The teachers of {first.dump} and {manifest.dump} are both called {name}, and have other files."


def kinds_read(manifest: Manifest, loss: Loss, hidden: HiddenStates | None = None) -> tuple[str, ...]:
    """The kinds of knowledge that a run reads: its loss's, the one that has the text, where the loss runs on that, and the
    hidden states, where it learns from some."""
    with_text = (kind for kind in manifest.kinds if TEXT[0] in loss.inputs and TEXT[0] in KINDS[kind].arrays(manifest))
    return tuple(dict.fromkeys((*with_text, *loss.kinds, *((KIND,) if hidden is not None else ()))))


def columns_read(manifest: Manifest, config: TrainConfig, loss: Loss) -> dict[str, frozenset[str]]:
    """The columns that a run has a use for, by kind of knowledge: for a loss of whole batches, all of the kinds it reads."""
    kinds = kinds_read(manifest, loss, config.hidden_states())
    columns = {kind: frozenset(KINDS[kind].schema(manifest).names) for kind in kinds}
    if loss.whole_batch:
        return columns
    used = {*TEXT_COLUMNS, *loss.columns}
    if config.calibration is not None and loss.recalibrated:
        used.update(loss.recalibrated)
    elif config.tail != "bucket" and config.temperature == 1:
        used.update(loss.draws)
    return {kind: names if kind == KIND else names & used for kind, names in columns.items()}


def check_run(config: TrainConfig, reporter: Reporter = SILENT) -> tuple[KnowledgeStore, Mixture, Loss]:
    """The store, the dumps and the loss of a run. What can be refused without loading a model is refused here.

    Args:
        config: the options.
        reporter: hears when the server of the store is waited for.

    Raises:
        InputError: an option is out of range, the student's folder is missing, the calibration cannot be used, the store cannot
            be opened, the output is something else than the folder of this run, or a dump does not hold what the loss needs.
    """
    loss = check_config(config)
    store = KnowledgeStore.open(
        config.store, cache_size=int(config.cache_size * 1e9), token_file=config.token_file, reporter=reporter
    )
    mixture = resolve_mixture(config, store, check_folder(Path(config.output)))
    check_mixture(store, mixture, config, loss)
    check_rationale(config, store, mixture)
    check_preferences(config, store, mixture, loss)
    if (hidden := config.hidden_states()) is not None:
        layers, width = (stated(config.student, config.gguf_file) for stated in (stated_layers, stated_width))
        check_hidden(store, mixture, hidden, layers=layers, width=width)
    calibration = usable_calibration(config, store.manifest(mixture.dumps[0]), loss)
    for dump in mixture.dumps[1:]:
        usable_calibration(config, store.manifest(dump), loss)
    check_model_folder(config.student, config.gguf_file)
    kinds = kinds_read(store.manifest(mixture.dumps[0]), loss)
    if config.positions_where is not None and not any(KINDS[kind].target for kind in kinds):
        raise InputError(f"the loss {config.loss} counts no targets, so it takes no --positions-where")
    check_resume(with_scale(config, calibration), store, mixture, calibration.sha256 if calibration else None)
    return store, mixture, loss
