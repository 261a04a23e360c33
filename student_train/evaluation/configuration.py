"""What `student-train evaluate` is asked to do, and what can be refused before a model is loaded. Imports no torch."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from knowledge_store.configuration import DumpOptions, GgufOptions
from knowledge_store.errors import InputError
from knowledge_store.options import check_options, option
from knowledge_store.storage import StorePlace, open_storage
from student_train.configuration import BatchOptions
from student_train.evaluation.questions import ANSWER_AS
from student_train.evaluation.results import read_evaluation
from student_train.training.model_folder import check_model_folder


@dataclass(frozen=True)
class EvaluateConfig(BatchOptions, GgufOptions, DumpOptions):
    """An evaluation; each field is an option of `student-train evaluate`."""

    model: str = option(help="Folder or hub id of the model to evaluate.")
    store: StorePlace | None = option(None, argument=True, metavar="STORE", help="The store, to evaluate on a held-out dump.")
    _: KW_ONLY
    limit: int | None = option(None, min=1, help="Evaluate only this many sequences or questions, spread evenly over them all.")
    output: str | None = option(
        None,
        metavar="<path>",
        help="File to write. The default is DUMP.json or QUESTIONS.letter.json in the model's folder evaluations, with the name"
        " of a GGUF file in it, and nothing for a hub id.",
    )
    keep_positions: Path | None = option(
        None, help="Parquet file to write, a row for each judged position of the dump, for `knowledge-store sql --with`."
    )
    questions: str | None = option(
        None,
        metavar="<path>",
        help="JSON Lines file of multiple-choice questions (`question`, `options`, `answer`), to evaluate on these instead.",
    )
    answer_as: str = option(
        "letter", choices=ANSWER_AS, help="How the model answers questions: by their letter, or by the text of the option."
    )
    post_hoc_temperature: str | None = option(
        None,
        metavar="<path>",
        help="Evaluate a second time at a temperature of the model, from a file of other questions (.jsonl) to fit one on, or"
        " from the model's own calibration (.json) of `teacher-dump calibrate`.",
    )

    @property
    def store_address(self) -> str | None:
        """What results call the store; None without one."""
        return None if self.store is None else open_storage(self.store).address

    @property
    def questions_name(self) -> str:
        """What the file of questions is called in results."""
        return Path(str(self.questions)).name.removesuffix(".jsonl")

    @property
    def calibration(self) -> Path | None:
        """The calibration file that the post-hoc temperature comes from; None where it is fitted on questions."""
        path = self.post_hoc_temperature
        return Path(path) if path and Path(path).suffix == ".json" else None


@dataclass(frozen=True)
class CompareConfig:
    """A comparison; each field is an option of `student-train compare`."""

    results: tuple[str, ...] = option(argument=True, metavar="RESULT...", help="Files that `student-train evaluate` wrote.")


def check_evaluation(config: EvaluateConfig) -> Path | None:
    """Check everything that needs no model, and give the file that the result goes to, if any.

    Raises:
        InputError: options do not fit each other; a file, the store, the dump or the model's folder is missing; no figures
            exist for what the dump holds; or the result would take the place of something else.
    """
    from knowledge_store import KnowledgeStore
    from student_train.evaluation.kinds import check_figures

    check_options(config)
    if (config.store is None) == (config.questions is None):
        raise InputError("give either STORE, to evaluate on a dump, or --questions, to evaluate on a file of questions")
    if config.questions and config.dump:
        raise InputError("--dump names a dump of a store, and has no meaning with --questions")
    if config.questions and config.keep_positions:
        raise InputError("--keep-positions keeps positions of a dump, and has no meaning with --questions")
    if config.store and config.answer_as != EvaluateConfig.answer_as:
        raise InputError("--answer-as says how --questions are answered, and has no meaning with a store")
    if config.store and config.post_hoc_temperature and not config.calibration:
        raise InputError(
            "--post-hoc-temperature takes a file of questions only with --questions: for a dump, fit the model's temperature"
            " with `teacher-dump calibrate` and give its calibration (.json)"
        )
    for path in (config.questions, None if config.calibration else config.post_hoc_temperature):
        if path and not Path(path).is_file():
            raise InputError(f"there is no file {path}")
    if config.calibration and not config.calibration.is_file():
        raise InputError(f"there is no calibration file {config.calibration}")
    dump = None
    if config.store:
        store = KnowledgeStore.open(config.store)
        dump = store.dump(config.dump)
        check_figures(store, dump)
    output = _checked_output(config, dump)
    if (kept := config.keep_positions) is not None:
        if output is not None and kept.resolve() == output.resolve():
            raise InputError(f"--keep-positions {kept} is where the result goes: name another file")
        if kept.exists():
            raise InputError(f"--keep-positions {kept} exists already: name another file, or remove it")
        if not kept.parent.is_dir():
            raise InputError(f"there is no folder {kept.parent} for --keep-positions: make it, or name another file")
    check_model_folder(config.model, config.gguf_file)
    return output


def output_path(config: EvaluateConfig, dump: str | None = None) -> Path | None:
    """Where a result goes; None for a hub id without --output."""
    if config.output:
        return Path(config.output)
    folder = Path(config.model)
    name = f"{config.questions_name}.{config.answer_as}" if config.questions else dump
    # Quantised copies of one model often lie in one folder.
    copy = f".{config.gguf_file.removesuffix('.gguf')}" if config.gguf_file else ""
    return folder / "evaluations" / f"{name}{copy}.json" if folder.is_dir() else None


def _checked_output(config: EvaluateConfig, dump: str | None) -> Path | None:
    """Raises InputError where a result cannot go, or would take the place of one of something else."""
    path = output_path(config, dump)
    if path and path.is_dir():
        raise InputError(f"--output {path} is a folder: name a file")
    if path and path.exists():
        try:
            result = read_evaluation(path)
        except InputError as error:
            raise InputError(f"{error}. Give --output to write the result somewhere else") from None
        previous = result["config"]
        source, asked = previous["questions"] or previous["store"], config.questions or config.store_address
        if Path(str(source)).resolve() != Path(str(asked)).resolve():
            raise InputError(f"{path} holds the results on {source}: give --output for those on another")
        if config.output and (previous["model"], previous["gguf_file"]) != (config.model, config.gguf_file):
            raise InputError(
                f"--output {path} holds the results of {previous['gguf_file'] or previous['model']}: name another file, or"
                " remove it"
            )
        count = result["questions"].get("count") if previous["questions"] else result.get("sequences")
        if config.limit is not None and previous.get("limit") != config.limit and (count or 0) > config.limit:
            raise InputError(
                f"{path} holds the result on {count:,} {'questions' if previous['questions'] else 'sequences'}, which that on"
                f" {config.limit:,} would replace: give another --output, or remove it"
            )
    return path
