"""What `teacher-dump import` is asked to do. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, ClassVar

from knowledge_store.configuration import StoreOptions
from knowledge_store.errors import InputError
from knowledge_store.format.layout import check_dump_name
from knowledge_store.options import option
from teacher_dump.configuration import TeacherOptions

FORMATS = ("plain", "distillkit", "vllm", "axolotl", "nemo-aligner", "megatron")
PREDICTS = ("this", "next")

# What `--columns` names: required and optional ones.
REQUIRED = ("ids", "candidates", "logprobs")
OPTIONAL = ("token", "tail", "mask", "targets")


@dataclass(frozen=True)
class ImportConfig(TeacherOptions, StoreOptions):
    """The options of `teacher-dump import`."""

    PANELS: ClassVar[Mapping[str, Sequence[str]]] = {
        "Layout": ("columns", "row_predicts", "compression", "token_file", "vocabulary_size"),
        "Teacher": (
            *(
                "teacher",
                "teacher_url",
                "gguf_file",
                "revision",
                "engine",
                "batch_size",
                "dtype",
                "device",
                "device_map",
                "max_memory",
            ),
            *("quantize", "attention"),
        ),
    }

    files: tuple[Path, ...] = option(argument=True, metavar="FILES", help="The files, in order.")
    _: KW_ONLY
    format: str = option(choices=FORMATS, help="The layout of the files; IMPORTS.md describes each.")
    tokenizer: str = option(metavar="T", help="The teacher's tokenizer: a local folder or a hub id.")
    teacher: str = option(
        "", help="A local folder or a hub id: the teacher is asked again for a sample, and what differs is refused."
    )
    name: str | None = option(None, help="The dump's name; without it, one is made of the first file's name.")
    columns: str | None = option(
        None,
        metavar="NAME=COLUMN,...",
        help="With plain, which column holds what: ids, candidates and logprobs, and where there are any token (its"
        " log-probability), tail, mask (0 for padding, else which text) and targets.",
    )
    row_predicts: str | None = option(
        None,
        choices=PREDICTS,
        help="Whether row j predicts token j (this) or token j + 1 (next), where it is not as the layout has it.",
    )
    compression: Path | None = option(
        None,
        metavar="FILE",
        help="With distillkit, the configuration of the compression, where it does not lie beside the data.",
    )
    token_file: Path | None = option(
        None, metavar="FILE", help="With megatron, a Parquet or JSON Lines file of the samples' token ids, column input_ids."
    )
    vocabulary_size: int | None = option(
        None,
        min=1,
        help="Rows of the teacher's head; without it, what the files say, or as many as the tokenizer knows tokens.",
    )
    shard_size: int = option(512, min=1, help="Most rows of the files in a shard.")
    repair: bool = option(False, help="Repair the dump instead: make damaged shards and files again, and no others.")

    def __post_init__(self) -> None:
        files: Any = self.files
        object.__setattr__(self, "files", (Path(files),) if isinstance(files, str | Path) else tuple(map(Path, files)))
        super().__post_init__()
        if not self.files:
            raise InputError("name at least one file to import")
        for value, flag, needed in (
            (self.columns, "--columns", "plain"),
            (self.compression, "--compression", "distillkit"),
            (self.token_file, "--token-file", "megatron"),
        ):
            if value is not None and self.format != needed:
                raise InputError(f"{flag} is an option of --format {needed}, and this is {self.format}: leave it out")
        if self.format == "megatron" and self.token_file is None:
            raise InputError("--format megatron needs --token-file: the tar files do not hold the tokens that were predicted")
        if self.teacher_url is not None and not self.teacher:
            raise InputError("--teacher-url says where a teacher is served, and --teacher by which name: give both, or neither")
        _ = self.column_names
        check_dump_name(self.dump_name)
        for path in (*self.files, *(extra for extra in (self.compression, self.token_file) if extra is not None)):
            check_file(path)
        if len({path.resolve() for path in self.files}) < len(self.files):
            raise InputError("a file is named twice, and its rows would count twice: name it once")

    @property
    def dump_name(self) -> str:
        """The dump's name."""
        if self.name is not None:
            return self.name
        words = re.sub(r"[^A-Za-z0-9._-]+", "-", self.files[0].name.split(".")[0]).strip("-._")
        return words[:100] or "import"

    @property
    def column_names(self) -> dict[str, str]:
        """Of the layout `plain`, what `columns` says: what a column holds → its name. Empty for other layouts.

        Raises:
            InputError: it cannot be meant, or says too little.
        """
        if self.format != "plain":
            return {}
        names: dict[str, str] = {}
        for pair in self.columns.split(",") if self.columns else []:
            part, sign, name = (word.strip() for word in pair.partition("="))
            if not sign or not name or part not in REQUIRED + OPTIONAL or part in names:
                raise InputError(
                    f"--columns {self.columns}: {pair!r} does not say once which column holds one of"
                    f" {', '.join(REQUIRED + OPTIONAL)}, as in ids=input_ids"
                )
            names[part] = name
        missing = [part for part in REQUIRED if part not in names]
        if missing:
            raise InputError(
                f"--format plain needs --columns to say which column holds {' and '.join(missing)}, as in"
                " ids=input_ids,candidates=top_ids,logprobs=top_logprobs"
            )
        return names


def check_file(path: Path) -> None:
    """Make sure that a file is there and holds something (InputError: it does not)."""
    if not path.exists():
        raise InputError(f"there is no file {path}")
    if not path.is_file():
        raise InputError(f"{path} is a folder: name the files in it")
    if not path.stat().st_size:
        raise InputError(f"{path} is empty")
