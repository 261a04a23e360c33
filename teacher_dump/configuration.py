"""What the commands of `teacher-dump` are asked to do: a frozen dataclass for each, one field for each option.

From Python a path may be given as text or as a Path, and `corpus` as one file or as several; the fields hold Paths.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Any

from knowledge_store.errors import InputError
from knowledge_store.format.layout import check_dump_name
from knowledge_store.kinds import KINDS
from knowledge_store.kinds.positions.selection import MAX_DRAWS, NAMES, Selection
from knowledge_store.options import check_options, option

# A longer text is cut into parts of at most this many characters for each position of a sequence: about 16 full windows.
PART_CHARACTERS_PER_POSITION = 64

DTYPES = ("auto", "float32", "bfloat16", "float16")

SELECTION_OPTIONS = {
    "top-k": {"top_k", "tail_draws"},
    "top-p": {"top_p", "max_k", "tail_draws"},
    "random-sampling": {"draws"},
}

TEACHER_HELP = "A local folder or a hub id of a causal language model."
STORE_HELP = "The store's folder."


@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """How a teacher is loaded and asked, alike in all commands."""

    batch_size: int = option(
        16,
        min=1,
        help="Sequences of the maximum length in a forward pass; shorter ones share the room. Smaller takes less memory.",
    )
    dtype: str = option(
        "auto",
        help="Number type of the teacher's weights: auto (float32 on a CPU, the model's own elsewhere), float32, bfloat16 or"
        " float16.",
    )
    device: str = option("auto", help="Where the teacher runs: auto, cpu, cuda, cuda:1 or mps.")
    gguf_file: str | None = option(None, help="Name of a GGUF file in the teacher's folder.")

    def __post_init__(self) -> None:
        _convert_paths(self)
        check_options(self)
        if self.dtype not in DTYPES:
            raise InputError(f"--dtype {self.dtype} is not known: use {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")


@dataclass(frozen=True, kw_only=True)
class CorpusOptions(TeacherOptions):
    """How a corpus becomes sequences."""

    max_length: int = option(512, min=2, help="Longest sequence, in tokens.")
    too_long: str = option(
        "cut",
        choices=("cut", "skip", "refuse"),
        help="What becomes of prompts with completions, and of conversations, that are longer: cut their end off, skip them, or"
        " refuse the corpus. Plain text is never lost: it continues in another sequence.",
    )
    skip_bad_rows: bool = option(False, help="Leave out rows that cannot be used, and count them, instead of stopping.")

    @property
    def part_characters(self) -> int:
        """Longest text, in characters, that is one document of the plan."""
        return PART_CHARACTERS_PER_POSITION * self.max_length


@dataclass(frozen=True)
class CalibrateConfig(CorpusOptions):
    """The options of `teacher-dump calibrate`; `corpus` is text that the teacher was not trained on."""

    teacher: str = option(help=TEACHER_HELP)
    corpus: tuple[Path, ...] = option(
        help="Files of text that the teacher was not trained on: .jsonl, .jsonl.zst, .parquet or .txt."
    )
    _: KW_ONLY
    output: Path = option(Path("calibration.json"), help="The calibration's file; an existing calibration is replaced.")
    limit: int = option(20_000, min=1, help="About how many targets to fit on, of documents drawn at random.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_corpus(self.corpus)


@dataclass(frozen=True)
class EstimateConfig(CorpusOptions):
    """The options of `teacher-dump estimate`: those of a dump that decide what it keeps and takes."""

    teacher: str = option(help=TEACHER_HELP)
    corpus: tuple[Path, ...] = option(help="Files of the corpus, one or more: .jsonl, .jsonl.zst, .parquet or .txt.")
    _: KW_ONLY
    kinds: tuple[str, ...] = option(
        ("positions",), flag="--kind", metavar="KIND", help="A kind of knowledge to keep; give the option again for more kinds."
    )
    selection: str = option(
        "top-k",
        help="The rule that picks what is kept: top-k, top-p (as many candidates as reach --top-p) or random-sampling (draws"
        " alone).",
    )
    top_k: int = option(5, min=1, help="Candidates kept at each position, with top-k.")
    tail_draws: int = option(
        4, min=0, max=MAX_DRAWS, help="Draws from beyond the candidates, which make an unbiased target; 0 keeps none."
    )
    top_p: float = option(0.95, max=1, help="The probability that the candidates reach, with top-p.")
    max_k: int = option(32, min=1, help="Maximum number of candidates, with top-p.")
    draws: int = option(50, min=1, max=MAX_DRAWS, help="Draws at each position, with random-sampling.")
    keep_context: bool = option(False, help="Keep knowledge at context positions (prompts) too.")
    calibration: Path | None = option(None, help="A file of `teacher-dump calibrate`: the tail is kept at its temperature too.")
    shard_size: int = option(512, min=1, help="Documents in a shard.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_corpus(self.corpus)
        if self.selection not in NAMES:
            raise InputError(f"there is no --selection {self.selection}: choose one of {', '.join(NAMES)}")
        if not self.top_p > 0:
            raise InputError(f"--top-p is {self.top_p}; it must be above 0 and at most 1")
        options = {name for names in SELECTION_OPTIONS.values() for name in names}
        for name in sorted(options - SELECTION_OPTIONS[self.selection]):
            if getattr(self, name) != getattr(EstimateConfig, name):
                raise InputError(f"--{name.replace('_', '-')} is not an option of the selection {self.selection}")
        if self.calibration is not None and self.selection == "random-sampling":
            raise InputError(
                "--calibration keeps the tail at another temperature beside candidates, and random-sampling has none: its draws"
                " serve temperature 1 alone"
            )
        if not self.kinds:
            raise InputError("name at least one --kind of knowledge")
        for kind in self.kinds:
            if kind not in KINDS:
                raise InputError(f"there is no --kind {kind}: choose from {', '.join(KINDS)}")

    @property
    def rule(self) -> Selection:
        """The selection, as the rule it stands for."""
        if self.selection == "random-sampling":
            return Selection(self.selection, 0, self.draws)
        if self.selection == "top-p":
            return Selection(self.selection, self.max_k, self.tail_draws, self.top_p)
        return Selection(self.selection, self.top_k, self.tail_draws)


@dataclass(frozen=True)
class DumpConfig(EstimateConfig):
    """The options of `teacher-dump run`."""

    store: Path = option(argument=True, metavar="STORE", help=f"{STORE_HELP} It is created if it does not exist.")
    name: str | None = option(None, help="The dump's name; without it, one is made of the teacher's and the corpus's names.")
    max_skipped: float = option(
        1.0,
        min=0,
        max=1,
        help="Largest share of rows that may be left out; with more, the run stops before the teacher is loaded.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dump_name(self.dump_name)

    @property
    def dump_name(self) -> str:
        """The dump's name."""
        if self.name is not None:
            return self.name
        teacher = self.gguf_file or self.teacher.rstrip("/").split("/")[-1]
        corpus = self.corpus[0].name.split(".")[0]
        words = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{teacher.removesuffix('.gguf')}-{corpus}").strip("-._")
        return words[:100] or "dump"


@dataclass(frozen=True)
class CheckConfig(TeacherOptions):
    """The options of `teacher-dump check`."""

    store: Path = option(argument=True, metavar="STORE", help=STORE_HELP)
    teacher: str = option(help=TEACHER_HELP)
    _: KW_ONLY
    dump: str | None = option(None, help="Which dump to check, if there are several.")
    sample: int = option(200, min=1, help="How many sequences to ask again, drawn at random.")
    seed: int = option(0, min=0, help="Seed of the random draw of sequences.")


def _convert_paths(config: TeacherOptions) -> None:
    """Make Paths of the paths that a configuration was given, a tuple of `corpus`, and text of the teacher's name."""
    conversions: dict[str, Callable[[Any], Any]] = {
        "teacher": str,
        "store": Path,
        "output": Path,
        "calibration": Path,
        "corpus": lambda files: (Path(files),) if isinstance(files, str | Path) else tuple(map(Path, files)),
    }
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in conversions and value is not None:
            object.__setattr__(config, field.name, conversions[field.name](value))


def _check_corpus(corpus: tuple[Path, ...]) -> None:
    if not corpus:
        raise InputError("name at least one corpus file")
