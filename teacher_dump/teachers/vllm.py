"""A teacher that vLLM runs in this process."""

from __future__ import annotations

from knowledge_store.errors import InputError
from knowledge_store.reporter import SILENT, Reporter
from teacher_dump.teachers.loading import Loading
from teacher_dump.teachers.protocol import Teacher


def load_teacher(teacher: str, loading: Loading, longest: int, *, reporter: Reporter = SILENT) -> Teacher:
    """Load a teacher (see `opening.open_teacher`)."""
    raise InputError(f"{teacher} cannot be run by vLLM yet: leave --engine out")
