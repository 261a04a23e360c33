"""The options of `teacher-dump generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from knowledge_store.errors import InputError
from knowledge_store.options import option
from teacher_dump.configuration import NamedTeacher, RowOptions, TeacherOptions, WorkerOptions

PROMPT_AS = ("auto", "message", "text")


@dataclass(frozen=True)
class GenerateConfig(WorkerOptions, RowOptions, TeacherOptions):
    """The options of `teacher-dump generate`."""

    PANELS: ClassVar[Mapping[str, Sequence[str]]] = {
        "Teacher": NamedTeacher.PANELS["Teacher"],
        "Prompts": ("columns", "prompt_as", "chat_template", "template_date", "skip_bad_rows"),
        "Workers": ("rank", "world_size", "shard_size"),
    }

    _: KW_ONLY
    output: Path = option(help="Folder of the texts, which `run` takes as a corpus. It is made, or resumed.")
    prompts: tuple[Path, ...] = option(
        (),
        help="Files of prompts, one or more, as `run` takes a corpus: rows with a `prompt`, with `messages` that end with a"
        " user's turn, or with any columns for --template. Each line of a .txt file is a prompt.",
        of_hub=True,
    )
    count: int | None = option(
        None,
        min=1,
        help="Write without prompts, so many times: from --template with the number `row`, or from nothing but the token that"
        " begins a text.",
    )
    template: Path | None = option(
        None, metavar="FILE", help="A Jinja template that makes a prompt of each row: its variables are the row's columns."
    )
    prompt_as: str = option(
        "auto",
        choices=PROMPT_AS,
        help="What a prompt that is text becomes: one message of a user under the chat template (message), or plain text that"
        " is gone on with (text); auto: a message where the tokenizer has a chat template.",
    )
    samples: int = option(1, min=1, help="Texts for each prompt.")
    temperature: float = option(
        1.0, min=0, help="Divides the log-probabilities that tokens are drawn by; 0 takes the likeliest token each time."
    )
    max_new_tokens: int = option(256, min=1, help="Longest text, in tokens; one that is longer is cut off there.")
    seed: int = option(0, min=0, max=2**63 - 1, help="Of the draws: another seed writes other texts.")
    keep_top_k: int | None = option(
        None,
        min=1,
        help="Keep so many of the likeliest tokens at each token that is written, so that `teacher-dump import` makes a dump of"
        " the texts without the teacher. It changes no text.",
    )
    batch_size: int = option(16, min=1, help="Texts that are written at once. Smaller takes less memory.")
    shard_size: int = option(64, min=1, help="Prompts in a file of the folder, which is what is lost when a worker is killed.")
    skip_bad_rows: bool = option(False, help="Leave out rows that cannot be used, and count them, instead of stopping.")

    def __post_init__(self) -> None:
        files: Any = self.prompts
        object.__setattr__(self, "prompts", (Path(files),) if isinstance(files, str | Path) else tuple(map(Path, files)))
        super().__post_init__()
        if bool(self.prompts) == (self.count is not None):
            raise InputError(
                "give --prompts FILE, or --count to write without prompts" + (", not both" if self.prompts else "")
            )
        if self.count is not None and self.columns is not None:
            raise InputError("--columns is of the rows of --prompts, and --count has none: leave one of them out")
        if self.samples > 1 and not self.temperature:
            raise InputError(
                f"--samples {self.samples} with --temperature 0 would write each text {self.samples} times: give a temperature"
                " above 0, or one sample"
            )

    @property
    def corpus(self) -> tuple[Path, ...]:
        """The files of prompts."""
        return self.prompts

    def with_corpus(self, files: tuple[Path, ...]) -> Self:
        """The same options with the prompts named by their files."""
        return replace(self, prompts=files)
