"""What people name as a corpus, as the files that are read: files, data sets of the hub, folders of `datasets` and of generated
texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from knowledge_store.errors import InputError
from knowledge_store.reporter import SILENT, Reporter
from teacher_dump.corpus.documents import SUFFIXES, check_files, file_names
from teacher_dump.corpus.generated import check_finished, generated_files, is_generated
from teacher_dump.corpus.hub import hub_address, hub_files
from teacher_dump.fingerprints import file_sha256


class NamesCorpus(Protocol):
    """A configuration that names a corpus."""

    @property
    def corpus(self) -> tuple[Path, ...]:
        """As it was named."""

    def with_corpus(self, files: tuple[Path, ...]) -> Self:
        """The same configuration with the corpus named by its files."""


Configuration = TypeVar("Configuration", bound=NamesCorpus)


def with_local_corpus(config: Configuration, *, reporter: Reporter = SILENT) -> Configuration:
    """A configuration whose corpus is files that are there and can be read; data sets of the hub are downloaded.

    Raises:
        InputError: a file is missing or of no known kind, or a data set cannot be had; says which.
    """
    files: list[Path] = []
    for named in config.corpus:
        if (address := hub_address(named)) is not None:
            files += hub_files(address, SUFFIXES, reporter)
        elif (named / "state.json").is_file() or (named / "dataset_dict.json").is_file():
            files += _saved_files(named)
        elif is_generated(named):
            files += generated_files(named)
        else:
            files.append(named)
    check_files(tuple(files))
    check_finished(files)
    return config if tuple(files) == config.corpus else config.with_corpus(tuple(files))


def _saved_files(folder: Path) -> list[Path]:
    """The files of a folder that `Dataset.save_to_disk` wrote, in the order of their rows."""
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
            raise InputError(f"{folder} has several splits: name the folder of one, as in {folder / splits[0]}")
        return [folder / file["filename"] for file in json.loads((folder / "state.json").read_text())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{folder} cannot be read as a folder of `datasets` ({error!r})") from None


def corpus_record(files: tuple[Path, ...], *, reporter: Reporter = SILENT) -> list[dict[str, Any]]:
    """What a manifest says of a corpus: name, bytes and SHA-256 of each file, checked by `check_files`.

    Raises:
        InputError: a file cannot be read.
    """
    return [
        {"name": name, "bytes": path.stat().st_size, "sha256": file_sha256(path, reporter=reporter)}
        for name, path in zip(file_names(files), files, strict=True)
    ]
