"""A teacher opened by the engine that runs it; before that, whether it has what that engine needs. No torch here."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from knowledge_store.reporter import SILENT, Reporter
from teacher_dump.teachers.files import check_local_teacher, check_tokenizer
from teacher_dump.teachers.loading import SERVER, Loading

if TYPE_CHECKING:
    from teacher_dump.configuration import NamedTeacher
    from teacher_dump.teachers.protocol import Teacher


def check_files(config: NamedTeacher) -> None:
    """Make sure, as far as it is known before it is opened, that a teacher has the files that its engine needs.

    Raises:
        InputError: it has not, or there is no such teacher.
    """
    if getattr(config, "teacher_url", None) is not None:
        check_tokenizer(config.teacher, config.revision)
    else:
        check_local_teacher(config.teacher, config.gguf_file, config.revision)


def check_device(loading: Loading) -> None:
    """Make sure that the device a teacher is to run on is here, where it is chosen by its name.

    Raises:
        InputError: it is not.
    """
    if loading.engine == "transformers":
        from teacher_dump.teachers.local import find_device

        find_device(loading.device)


def open_teacher(config: NamedTeacher, loading: Loading, longest: int, *, reporter: Reporter = SILENT) -> Teacher:
    """Open a teacher, which may take minutes.

    Args:
        config: which one.
        loading: by which engine, and how.
        longest: tokens of the longest sequence that it is going to be asked about.
        reporter: hears of progress, and of what a person should know.

    Raises:
        InputError: it cannot be used; says why.
    """
    if loading.engine == SERVER:
        assert loading.teacher_url is not None
        from teacher_dump.teachers.http import open_server

        # From the library a teacher may be named with no options to it.
        connections = getattr(config, "batch_size", 1)
        return open_server(config.teacher, loading.teacher_url, longest, connections, loading.revision, reporter=reporter)

    # Torch takes seconds to import.
    if loading.engine == "vllm":
        from teacher_dump.teachers import vllm

        room = max(vllm.ROOM, getattr(config, "batch_size", 0))
        return vllm.load_teacher(config.teacher, loading, longest, room=room, reporter=reporter)

    from teacher_dump.teachers import local

    return local.load_teacher(config.teacher, **asdict(loading), reporter=reporter)
