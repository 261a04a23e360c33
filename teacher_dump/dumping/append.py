"""`append`: the next dump of a family, of another corpus and otherwise as the last one was made. That is how a corpus grows.

The dumps of the family `news` are `news` or `news-1`, the first, and then `news-2`, `news-3`, … Which of them a command means
follows from its corpus alone: the one that has exactly these files, or a new one. So workers that are given the same command
agree, whenever each of them starts, and a command that is given again resumes its dump.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from knowledge_store.errors import InputError, MismatchError
from knowledge_store.format.commits import commit_records
from knowledge_store.format.manifest import Manifest, manifest_exists, read_manifest
from knowledge_store.quantities import counted
from knowledge_store.reporter import SILENT, Reporter
from knowledge_store.storage import Storage, open_storage
from teacher_dump.configuration import RunConfig
from teacher_dump.corpus.compression import uncompressed_name
from teacher_dump.corpus.sources import corpus_record, with_local_corpus
from teacher_dump.dumping.mismatch import check_alike
from teacher_dump.dumping.preconditions import as_made, existing_manifest
from teacher_dump.dumping.report import DumpReport
from teacher_dump.dumping.run import dump
from teacher_dump.dumping.worker_shards import worker_shards
from teacher_dump.teachers.files import file_hashes, find_folder, model_files
from teacher_dump.teachers.loading import SERVER
from teacher_dump.teachers.opening import check_files

if TYPE_CHECKING:
    from teacher_dump.teachers.protocol import Teacher


def append(
    config: RunConfig, rank: int = 0, world_size: int = 1, teacher: Teacher | None = None, *, reporter: Reporter = SILENT
) -> DumpReport:
    """Begin the next dump of the family `config.append`, or resume the one of this corpus.

    Args:
        config: the family, the corpus, and how the teacher is asked; no settings.
        rank, world_size: this worker's number among all.
        teacher: already loaded; loaded here when None.
        reporter: hears of progress, of files that the family has already, and of which dump it is.

    Raises:
        InputError: there is no such family, something given cannot be used, a file of it has grown, or nobody says where the
            teacher is.
        MismatchError: the teacher or its tokenizer is another, or another command has begun the dump of that name meanwhile.
        DamageError: a manifest of the family is damaged.
        StoreError: the store cannot be written, or something of the dump has a newer format version.
        KeyboardInterrupt: Ctrl-C; shards that had been handed to the writer are committed first.
    """
    family = config.append
    if family is None:
        raise InputError("name the family of dumps that is appended to")
    storage = open_storage(config.store)
    config = with_local_corpus(config, reporter=reporter)
    members = _members(storage, family)
    corpus = [str(file["sha256"]) for file in corpus_record(config.corpus, reporter=reporter)]
    same = next((manifest for manifest in reversed(members.values()) if _hashes(manifest) == corpus), None)
    number, last = next(reversed(members.items()))
    if same is not None:
        if not _missing_shards(storage, same):
            _check_teacher(config, storage, same, teacher, reporter)
            reporter.note(f"{same.dump} is the dump of this corpus, and is finished: nothing is left to do")
            shards = worker_shards(same, rank, world_size)
            return DumpReport(same.dump, 0, len(shards), same.shard_count)
        reporter.note(f"{same.dump} is the dump of this corpus, and is resumed")
        name, like = same.dump, same
    else:
        name, like = f"{family}-{number + 1}", last
        _check_overlap(config, corpus, members.values(), reporter)
        if missing := _missing_shards(storage, last):
            shards_missing = counted(missing, "shard of it is", "shards of it are")
            reporter.note(
                f"Warning: {last.dump} is not finished, {shards_missing} missing: the command that began it resumes it"
            )
    next_config = _next(config, name, like)
    if same is None:
        reporter.note(f"{name} is begun with the settings of {last.dump}")
    try:
        return dump(next_config, rank, world_size, teacher, reporter=reporter)
    except MismatchError:
        standing = existing_manifest(storage, name)
        if same is not None or standing is None or _hashes(standing) == corpus:
            raise
        raise MismatchError(
            f"another command has begun {name} in {storage.address} with another corpus meanwhile: give this command again,"
            " and it takes the next name"
        ) from None


def _members(storage: Storage, family: str) -> dict[int, Manifest]:
    """The dumps of a family by their numbers, in order; there is at least one.

    Raises:
        InputError: there is none, or two are the first.
        DamageError: a manifest is damaged.
    """
    pattern = re.compile(rf"{re.escape(family)}(?:-([1-9]\d*))?")
    names: dict[int, str] = {}
    for folder in storage.folders(""):
        if (match := pattern.fullmatch(folder)) and manifest_exists(storage, folder):
            number = int(match[1] or 1)
            if number in names:
                raise InputError(f"{names[number]} and {folder} are both the first dump of the family {family}: rename one")
            names[number] = folder
    if 1 not in names:
        raise InputError(
            f"there is no dump {family} or {family}-1 in {storage.address} to append to: the first dump of a family is made"
            f" without --append, under --name {family}"
        )
    return {number: read_manifest(storage, names[number]) for number in sorted(names)}


def _hashes(manifest: Manifest) -> list[str]:
    """SHA-256 of each file of its corpus."""
    return [str(file["sha256"]) for file in manifest.corpus.get("files", [])]


def _missing_shards(storage: Storage, manifest: Manifest) -> int:
    return manifest.shard_count - len(list(commit_records(storage, manifest.dump)))


def _check_overlap(config: RunConfig, corpus: Sequence[str], members: Iterable[Manifest], reporter: Reporter) -> None:
    """Say which files of the corpus the family has already.

    Raises:
        InputError: a file is one of them that has grown.
    """
    dumps = {str(file["sha256"]): (manifest.dump, file) for manifest in members for file in manifest.corpus.get("files", [])}
    for path, sha256 in zip(config.corpus, corpus, strict=True):
        if sha256 in dumps:
            reporter.note(f"Warning: {path} is in {dumps[sha256][0]} already: its documents will be in the family twice")
        elif uncompressed_name(path).endswith(".jsonl"):  # a .txt is one document, of which the old one is a part
            for size, begun in _beginnings(path, {int(file["bytes"]) for _, file in dumps.values()}):
                if begun in dumps:
                    dump, file = dumps[begun]
                    new = f"tail -c +{size + 1} {shlex.quote(str(path))} > …"
                    raise InputError(
                        f"{path} begins with all of {file['name']}, which is in {dump}: its rows would be in the family twice."
                        f" Append what is new, in a file of its own ({new}), or begin another family (--name)"
                    )


def _beginnings(path: Path, sizes: Iterable[int]) -> Iterator[tuple[int, str]]:
    """SHA-256 of the first bytes of a file, for each of these numbers that it has more than."""
    digest, read = hashlib.sha256(), 0
    with path.open("rb") as file:
        for size in sorted(size for size in sizes if 0 < size < path.stat().st_size):
            while block := file.read(min(size - read, 2**20)):
                digest.update(block)
                read += len(block)
            yield size, digest.hexdigest()


def _check_teacher(
    config: RunConfig, storage: Storage, finished: Manifest, teacher: Teacher | None, reporter: Reporter
) -> None:
    """Make sure that a finished dump is of the teacher that is given, which nobody loads any more: by its files. One of the
    hub that the dump was made with is not fetched for that.

    Raises:
        MismatchError: it is of another one.
        InputError: there is no such teacher.
    """
    if teacher is not None:
        check_alike(storage, finished, replace(finished, teacher=teacher.description))
        return
    if config.teacher_url is not None:  # what a server says is no file that could be compared
        return
    made_by = finished.teacher["name"]
    if not config.teacher or (config.teacher == made_by and not Path(made_by).is_dir() and config.revision is None):
        return
    check_files(config)
    folder = find_folder(config.teacher, config.gguf_file, config.revision)
    files = file_hashes(folder, model_files(folder, config.gguf_file), reporter=reporter)
    check_alike(storage, finished, replace(finished, teacher={**finished.teacher, "files": files}))


def _next(config: RunConfig, name: str, like: Manifest) -> RunConfig:
    """The configuration of a dump of that name with the settings of another (InputError: that was imported, or nobody says
    where the teacher is)."""
    made_by = str(like.teacher["name"])
    if "import" in like.plan:
        raise InputError(f"{like.dump} was imported: take other files in by `teacher-dump import` with another --name")
    if not config.teacher and ("/" not in made_by or config.gguf_file):
        raise InputError(
            f"the teacher of {like.dump} is called {made_by!r}, and no dump knows where it is kept: say where with --teacher"
        )
    engine = like.teacher.get("engine", "transformers")
    if (engine == SERVER) != (config.teacher_url is not None):
        way = "give its --teacher-url" if engine == SERVER else "leave --teacher-url out"
        raise InputError(f"{like.dump} was made by {engine}, and so are all dumps of its family: {way}")
    plan = {name: like.plan[name] for name in ("max_length", "too_long", "shard_size") if name in like.plan}
    settings = replace(
        config,
        append=None,
        name=name,
        like=like,
        teacher=config.teacher or made_by,
        kinds=tuple(like.kinds),
        dtype=like.teacher.get("dtype", config.dtype),
        quantize=like.teacher.get("quantize", "none"),
        engine=None if engine == SERVER else engine,
        **plan,
    )
    return as_made(settings, like)
