"""`teacher-dump run` with a teacher that costs nothing, in its real threads."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import make_tokenizer, save_teacher, story_rows, write_jsonl

from knowledge_store import DumpWriter, Shard
from knowledge_store.format.commits import CommitRecord
from teacher_dump import cli
from teacher_dump.teachers import local
from teacher_dump.teachers.local import LocalPrediction, LocalTeacher

DUMP = "threads"
ROWS, SHARD_SIZE = 8, 2


class TableTeacher(LocalTeacher):
    """A teacher whose prediction depends on the last token alone."""

    def predict(self, token_ids: np.ndarray, attention_mask: np.ndarray, *_: Any, **__: Any) -> LocalPrediction:
        """Logits from a table."""
        return LocalPrediction(self, None, torch.from_numpy(TABLE[token_ids]))


def _teacher() -> TableTeacher:
    tokenizer = make_tokenizer()
    description = {
        "name": "table", "model_type": "table", "parameters": 0, "hidden_size": 1, "vocabulary_size": len(tokenizer),
        "max_positions": None, "dtype": "float32", "files": {},
    }  # fmt: skip
    return TableTeacher(None, tokenizer, description, torch.device("cpu"), True)  # type: ignore[arg-type]


TEACHER = _teacher()
TABLE = np.random.default_rng(0).normal(0, 3, (TEACHER.vocabulary_size, TEACHER.vocabulary_size)).astype(np.float32)


def write_corpus(folder: Path) -> Path:
    """The corpus that is dumped, beside the files of a teacher, of which the tokenizer alone is loaded."""
    save_teacher(folder / "teacher")
    return write_jsonl(folder / "rows.jsonl", story_rows(ROWS))


def work(acknowledge: Callable[[int], None], corpus: str, store: str) -> None:
    """Run the command; each shard is acknowledged as soon as the writer says that it is committed."""
    torch.set_num_threads(1)
    commit = DumpWriter.commit

    def acknowledged(writer: DumpWriter, shard: Shard) -> CommitRecord:
        record = commit(writer, shard)
        acknowledge(shard.number)
        return record

    DumpWriter.commit = acknowledged  # type: ignore[method-assign]
    local.load_teacher = lambda *arguments, **options: TEACHER  # type: ignore[assignment]
    teacher = Path(corpus).parent / "teacher"
    options = {"teacher": teacher, "corpus": corpus, "name": DUMP, "max-length": 40, "shard-size": SHARD_SIZE}
    sys.argv = ["teacher-dump", "run", store, *(str(word) for name, value in options.items() for word in (f"--{name}", value))]
    cli.main()
