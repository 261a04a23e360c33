"""What the commands of `teacher-dump` are asked to do: a frozen dataclass for each, one field for each option.

The options of a kind of knowledge are declared with its extractor. From Python a path may be given as text or as a Path, and
`corpus` as one file or as several; the fields hold Paths. A store stays what it was given as.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from knowledge_store.configuration import CalibrationOptions, DumpOptions, GgufOptions, StoreOptions
from knowledge_store.errors import InputError
from knowledge_store.format.layout import check_dump_name
from knowledge_store.format.manifest import Manifest
from knowledge_store.options import check_options, flag_of, option, option_of
from teacher_dump.corpus.chat.options import TRAIN_ON, check_date
from teacher_dump.corpus.columns import read_columns
from teacher_dump.extraction import EXTRACTORS, option_classes
from teacher_dump.teachers.loading import ENGINES, SERVER, Loading, check_loading
from teacher_dump.teachers.protocol import ATTENTIONS, DEVICE_MAPS, DTYPES, QUANTISATIONS

# A longer text is cut into parts of at most this many characters for each position of a sequence: about 16 full windows.
PART_CHARACTERS_PER_POSITION = 64

TOO_LONG = ("cut", "skip", "refuse")


@dataclass(frozen=True)
class NamedTeacher(GgufOptions):
    """Which teacher is meant."""

    PANELS: ClassVar[Mapping[str, Sequence[str]]] = {
        "Teacher": (
            *(
                "engine",
                "teacher_url",
                "gguf_file",
                "revision",
                "batch_size",
                "dtype",
                "device",
                "device_map",
                "max_memory",
                "quantize",
            ),
            "attention",
        ),
        "Corpus": (
            *("columns", "max_length", "too_long", "chat_template", "train_on", "template_date"),
            *("skip_bad_rows", "max_skipped"),
        ),
        **{
            f"--kind {kind}": [field.name for field in fields(extractor.options) if option_of(field)]
            for kind, extractor in EXTRACTORS.items()
        },
        "Workers and repair": ("rank", "world_size", "help_others", "repair"),
    }

    teacher: str = option(help="A local folder or a hub id of a causal language model.")
    _: KW_ONLY
    revision: str | None = option(None, help="Branch, tag or commit of a hub id; main unless given.")

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in ("Path", "Path | None") and value is not None:
                object.__setattr__(self, field.name, Path(value))
        object.__setattr__(self, "teacher", str(self.teacher))
        check_options(self)


@dataclass(frozen=True)
class TeacherOptions(NamedTeacher):
    """Which teacher is asked, and how it is loaded and asked, alike in all commands."""

    _: KW_ONLY
    engine: str | None = option(
        None,
        choices=tuple(engine for engine in ENGINES if engine != SERVER),
        help="What runs the teacher: transformers, or vllm in this process. Without it transformers does, and a dump is resumed"
        " by the engine that began it.",
    )
    teacher_url: str | None = option(
        None,
        metavar="URL",
        help="Ask a vLLM server, such as http://127.0.0.1:8000; --teacher then names the model for its tokenizer alone."
        " A key is taken from VLLM_API_KEY.",
    )
    batch_size: int = option(
        16,
        min=1,
        help="Sequences of the maximum length in a forward pass; shorter ones share the room. Smaller takes less memory."
        " With --teacher-url, how many requests the server has at once.",
    )
    dtype: str = option(
        "auto",
        choices=DTYPES,
        help="Number type of the teacher's weights: auto (float32 on a CPU, the model's own elsewhere), float32, bfloat16 or"
        " float16.",
    )
    device: str = option("auto", help="Where the teacher runs: auto, cpu, cuda, cuda:1 or mps.")
    device_map: str = option(
        "none",
        choices=DEVICE_MAPS,
        help="Where a teacher's layers go: all on --device (none), or spread over all devices, the CPU's memory and the disk"
        " (auto).",
    )
    max_memory: str | None = option(
        None, metavar="SIZES", help="With --device-map, the room for weights on each device, such as 0=20GiB,1=20GiB,cpu=64GiB."
    )
    quantize: str | None = option(
        None,
        choices=QUANTISATIONS,
        help="Load the weights as 8-bit or 4-bit numbers, which takes less memory and changes the answers. It needs the"
        " library bitsandbytes. Without it they are not quantised, and a dump is resumed and checked as it was begun.",
    )
    attention: str = option(
        "auto", choices=ATTENTIONS, help="How attention is computed: auto, sdpa, eager or flash_attention_2."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine is not None and self.teacher_url is not None:
            raise InputError(
                "--engine runs the teacher here, and --teacher-url asks one that is run elsewhere: give one of the two"
            )
        check_loading(self.loading)

    @property
    def loading(self) -> Loading:
        """How the teacher is loaded."""
        named = {field.name: getattr(self, field.name) for field in fields(Loading)}
        engine = "transformers" if self.teacher_url is None else SERVER
        return Loading(**named | {"engine": self.engine or engine})


@dataclass(frozen=True)
class RowOptions(NamedTeacher):
    """How the rows of files are read, and conversations among them rendered."""

    _: KW_ONLY
    columns: str | None = option(
        None,
        metavar="NAME=COLUMN,...",
        help="Which column holds what, where they are called otherwise: prompt=q,completion=a. It also says what"
        " counts in rows that could be read in two ways, and images=- what does not.",
    )
    chat_template: Path | None = option(
        None, metavar="FILE", help="A chat template (Jinja) that stands in for the tokenizer's own; resuming needs no file."
    )
    template_date: str | None = option(
        None,
        metavar="YYYY-MM-DD",
        help="The date that a chat template gets when it asks for today's; without it, the day on which the dump was begun.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        read_columns(self.columns)
        if self.template_date is not None:
            check_date(self.template_date)

    @property
    def column_names(self) -> dict[str, str]:
        """What `columns` says: what a row's part is called here → its column's name."""
        return read_columns(self.columns)


@dataclass(frozen=True)
class CorpusOptions(RowOptions):
    """Which corpus is read, and how it becomes sequences."""

    corpus: tuple[Path, ...] = option(
        help="Files of the corpus, one or more: .jsonl, .json, .parquet, .arrow or .txt; or a data set of the hub,"
        " hf://datasets/OWNER/NAME.",
        of_hub=True,
    )
    _: KW_ONLY
    max_length: int = option(512, min=2, help="Longest sequence, in tokens.")
    too_long: str = option(
        "cut",
        choices=TOO_LONG,
        help="What becomes of prompts with completions, and of conversations, that are longer: cut their end off, skip them, or"
        " refuse the corpus. Plain text is never lost: it continues in another sequence.",
    )
    train_on: str | None = option(
        None,
        choices=TRAIN_ON,
        help="Which messages of the assistant are targets in a conversation: all (without this option), or the last of a row.",
    )

    def __post_init__(self) -> None:
        files: Any = self.corpus
        corpus = (Path(files),) if isinstance(files, str | Path) else tuple(map(Path, files))
        object.__setattr__(self, "corpus", corpus)
        super().__post_init__()
        if not corpus:
            raise InputError("name at least one corpus file")

    def with_corpus(self, files: tuple[Path, ...]) -> Self:
        """The same options with the corpus named by its files."""
        return replace(self, corpus=files)

    @property
    def part_characters(self) -> int:
        """Longest text, in characters, that is one document of the plan."""
        return PART_CHARACTERS_PER_POSITION * self.max_length


@dataclass(frozen=True)
class PreviewConfig(CorpusOptions):
    """The options of `teacher-dump preview`."""

    _: KW_ONLY
    rows: int = option(3, min=1, help="How many rows to show, from the beginning of the corpus.")


@dataclass(frozen=True)
class PassOptions(CorpusOptions, TeacherOptions):
    """A teacher that is asked about a corpus."""

    _: KW_ONLY
    skip_bad_rows: bool = option(False, help="Leave out rows that cannot be used, and count them, instead of stopping.")


@dataclass(frozen=True)
class CalibrateConfig(CalibrationOptions, PassOptions):
    """The options of `teacher-dump calibrate`; `corpus` is text that the teacher was not trained on."""

    _: KW_ONLY
    limit: int = option(20_000, min=1, help="About how many targets to fit on, of documents drawn at random.")


@dataclass(frozen=True)
class EstimateConfig(*option_classes(), PassOptions):  # type: ignore[misc]
    """The options of `teacher-dump estimate`: those of a dump that decide what it keeps and takes.

    It has the options of every kind of knowledge, each as the field of that name.
    """

    _: KW_ONLY
    kinds: tuple[str, ...] = option(
        ("positions",), flag="--kind", metavar="KIND", help="A kind of knowledge to keep; give the option again for more kinds."
    )
    shard_size: int = option(512, min=1, help="Documents in a shard.")
    # Not an option: of a dump whose kinds of knowledge, with their parameters, this one is to have; `append` sets it.
    like: Manifest | None = None

    def __post_init__(self) -> None:
        PassOptions.__post_init__(self)
        if not self.kinds:
            raise InputError("name at least one --kind of knowledge")
        for kind in self.kinds:
            if self.kinds.count(kind) > 1:
                raise InputError(f"--kind {kind} is given {self.kinds.count(kind)} times: name each kind once")
            if kind not in EXTRACTORS:
                raise InputError(f"there is no --kind {kind or repr(kind)}: choose from {', '.join(EXTRACTORS)}")
            self.kind_options(kind)
        for kind in EXTRACTORS.keys() - set(self.kinds):
            for field in fields(EXTRACTORS[kind].options):
                if getattr(self, field.name) != field.default:
                    raise InputError(f"{flag_of(field)} is an option of --kind {kind}, which is not given")

    def kind_options(self, kind: str) -> Any:
        """The options of one kind, as the dataclass of its extractor (InputError: they do not fit together)."""
        options = EXTRACTORS[kind].options
        return options(**{field.name: getattr(self, field.name) for field in fields(options)})


@dataclass(frozen=True)
class DumpConfig(StoreOptions, EstimateConfig):
    """What to dump, and where to."""

    name: str | None = option(None, help="The dump's name; without it, one is made of the teacher's and the corpus's names.")
    max_skipped: float = option(
        1.0,
        min=0,
        max=1,
        help="Largest share of rows that may be left out; with more, the run stops before the teacher is loaded.",
    )
    max_bytes: int = option(
        100_000_000_000, min=0, help="Do not begin a dump whose hidden states would take more bytes, before compression."
    )
    help_others: bool = option(
        False, help="Once this worker's shards are done, take what is missing of other workers', in an order of its own."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dump_name(self.dump_name)

    def with_corpus(self, files: tuple[Path, ...]) -> Self:
        """The same dump, under the same name, with the corpus named by its files."""
        return replace(self, corpus=files, name=self.dump_name)

    @property
    def dump_name(self) -> str:
        """The dump's name."""
        if self.name is not None:
            return self.name
        teacher = self.gguf_file or self.teacher.rstrip("/").split("/")[-1]
        corpus = self.corpus[0].name.split(".")[0].split("*")[0]
        words = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{teacher.removesuffix('.gguf')}-{corpus}").strip("-._")
        return words[:100] or "dump"


@dataclass(frozen=True)
class WorkerOptions:
    """Which of several workers this is."""

    _: KW_ONLY
    rank: int | None = option(
        None,
        min=0,
        help="Number of this worker, counted from 0. Without it, as torchrun, Slurm (srun, arrays) or an indexed job of"
        " Kubernetes says, or else 0.",
    )
    world_size: int | None = option(
        None, min=1, help="How many workers share the work; without it, as torchrun or Slurm says, or else 1."
    )


# What may be said beside `--append`; all else is a setting, which a family of dumps has throughout.
_NO_SETTINGS = {
    *(
        "store",
        "append",
        "corpus",
        "teacher",
        "teacher_url",
        "gguf_file",
        "revision",
        "batch_size",
        "device",
        "device_map",
        "max_memory",
    ),
    *("attention", "skip_bad_rows", "max_skipped", "max_bytes", "rank", "world_size"),
    "help_others",
}


@dataclass(frozen=True)
class RunConfig(WorkerOptions, DumpConfig):
    """The options of `teacher-dump run`: a dump, and which worker of it this is."""

    _: KW_ONLY
    teacher: str = option(
        "", help="A local folder or a hub id of a causal language model. With --append, a hub id may be left out."
    )
    append: str | None = option(
        None,
        metavar="FAMILY",
        names_dump=True,
        help="Begin or resume the next dump of a family, FAMILY-2, FAMILY-3 and so on, of another corpus and with the"
        " settings of the last one.",
    )
    repair: bool = option(False, help="Repair the dump instead: make damaged shards and files again, and no others.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.append is not None:
            self.check_appended({field.name for field in fields(self) if getattr(self, field.name) != field.default})
        elif not self.teacher:
            raise InputError("--teacher is missing: name a local folder or a hub id of a causal language model")
        if self.help_others and self.repair:
            raise InputError("--help-others is given with --repair, which has no use for it: leave one of them out")

    @classmethod
    def check_appended(cls, given: Collection[str]) -> None:
        """Make sure that no setting is given beside `--append`, by the names of the fields that are given.

        Raises:
            InputError: one is; names it.
        """
        for field in fields(cls):
            if field.name in given and field.name not in _NO_SETTINGS:
                raise InputError(
                    f"{flag_of(field)} cannot be given beside --append, which takes all settings from the family's last dump:"
                    " leave it out, or begin another family with --name"
                )

    def with_corpus(self, files: tuple[Path, ...]) -> Self:
        """The same dump with the corpus named by its files; `append` gives it its name."""
        return super().with_corpus(files) if self.append is None else replace(self, corpus=files)


@dataclass(frozen=True)
class CheckConfig(TeacherOptions, DumpOptions, StoreOptions):
    """The options of `teacher-dump check`."""

    _: KW_ONLY
    sample: int = option(200, min=1, help="How many sequences to ask again, drawn at random.")
    seed: int = option(0, min=0, help="Seed of the random draw of sequences.")
