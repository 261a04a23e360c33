"""What a dump is: who was asked, what, and how. Written before the first shard, never changed.

A manifest has two halves. Its *identity* (teacher, tokenizer, corpus, plan, and the parameters of each kind of knowledge)
decides what every shard contains, and a resume that differs in any of it is refused. What is *derived* from the identity (how
many documents, where each shard begins) is kept so that nobody has to read the corpus again to find out.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from knowledge_store.errors import DamageError, MissingFileError, NewerVersionError, StoreError
from knowledge_store.format.corpus_counts import COUNTS_SHAPE, CorpusCounts
from knowledge_store.format.integrity import FILE_SHAPE, FileRecord
from knowledge_store.format.layout import FORMAT_NAME, FORMAT_VERSION, manifest_file
from knowledge_store.format.records import check_shape, json_sha256, read_record, seal
from knowledge_store.storage import Storage

# Told to people, never compared: a model or corpus may be moved or renamed between runs.
_NOT_COMPARED = re.compile(r"teacher\.name|corpus\.files\[\d+\]\.name")

_SHAPE = {
    "dump": str,
    "kinds": {...: dict},
    "teacher": {"name": str, "vocabulary_size": int},
    "tokenizer": {},
    "corpus": {},
    "plan": {"max_length": int},
    "derived": {"documents": int, "columns": {...: str}, "shards": list, "tokens": FILE_SHAPE},
}

# What a manifest may leave out, but others read where it is there.
_OPTIONAL: dict[str, dict[str, Any]] = {
    "teacher": {"files": {...: str}, "dtype": str, "model_type": str, "parameters": int},
    "tokenizer": {"vocabulary_sha256": str, "size": int, "chat_template_sha256": str},
    "corpus": {"files": [{"name": str, "sha256": str}]},
    "plan": {"shard_size": int, "part_characters": int, "too_long": str, "groups": bool, "chat": {"train_on": str}},
    "derived": {"counts": COUNTS_SHAPE},
}

# Beyond these token ids and lengths do not fit their columns.
MAX_VOCABULARY = 2**32
MAX_LENGTH = 2**31 - 1


@dataclass(frozen=True)
class Manifest:
    """The identity of a dump and what follows from it.

    Attributes:
        dump: the dump's name, which is its folder's.
        kinds: the kinds of knowledge it holds, by name, and of each the record of its parameters (see `knowledge_store.kinds`).
        teacher: name, model_type, parameters, hidden_size, vocabulary_size (rows of the head), dtype, and the SHA-256 of
            each of its files.
        tokenizer: vocabulary_sha256, size, bos_token_id, eos_token_id, pad_token_id.
        corpus: files, each with its name, bytes and SHA-256.
        plan: max_length, too_long (what becomes of rows that are longer), shard_size, part_characters,
            chat (how conversations are rendered), groups (True where a document is a group of answers to one prompt).
        derived: documents, counts (what becomes of the corpus's rows, see CorpusCounts), columns (the corpus's own, name to
            type), shards (where each begins, and how many tokens it holds), tokens (the file record of tokens.parquet).
        version: of the format.
    """

    dump: str
    kinds: dict[str, dict[str, Any]]
    teacher: dict[str, Any]
    tokenizer: dict[str, Any]
    corpus: dict[str, Any]
    plan: dict[str, Any]
    derived: dict[str, Any]
    version: int = FORMAT_VERSION

    @property
    def vocabulary_size(self) -> int:
        """How many tokens the teacher's distribution is over (rows of its head)."""
        return int(self.teacher["vocabulary_size"])

    @property
    def has_groups(self) -> bool:
        """Whether each document is a group: several answers to one prompt, each a sequence of its own with a score."""
        return bool(self.plan.get("groups", False))

    @property
    def shard_count(self) -> int:
        """How many shards the plan has."""
        return len(self.derived["shards"])

    @property
    def counts(self) -> CorpusCounts | None:
        """What becomes of the rows of the corpus; None where it does not say."""
        return CorpusCounts.from_record(self.derived["counts"]) if "counts" in self.derived else None

    def identity(self) -> dict[str, Any]:
        """Everything that decides what the shards contain, flat, by dotted name."""
        parts = ("kinds", "teacher", "tokenizer", "corpus", "plan")  # not `derived`, which lists every shard
        leaves = [*((f"kinds.{name}", "kept") for name in self.kinds)]  # a kind may have no parameters
        leaves += [leaf for part in parts for leaf in _flatten(part, getattr(self, part))]
        return {name: value for name, value in leaves if not _NOT_COMPARED.fullmatch(name)}

    @cached_property
    def identity_sha256(self) -> str:
        """SHA-256 of the identity, which binds commit records to their dump: two dumps of one name may be different."""
        return json_sha256(self.identity())

    def changes(self, other: Manifest) -> dict[str, tuple[Any, Any]]:
        """By dotted name, what differs between this manifest's identity and another's: both values, None where absent."""
        identity, other_identity = self.identity(), other.identity()
        absent = object()
        return {
            name: (identity.get(name), other_identity.get(name))
            for name in sorted(identity.keys() | other_identity.keys())
            if identity.get(name, absent) != other_identity.get(name, absent)
        }

    def differences(self, other: Manifest) -> list[str]:
        """What in `other` differs from this manifest, one short sentence each; empty when they are the same dump."""
        changes = self.changes(other).items()
        return [f"{in_words(name)} was {_short(old)} and is now {_short(new)}" for name, (old, new) in changes]

    def to_bytes(self) -> bytes:
        """The manifest as the bytes of its file."""
        return seal({"format": FORMAT_NAME, **asdict(self)})


def in_words(name: str) -> str:
    """What a person calls a part of the identity, of its dotted name: "the teacher's vocabulary size"."""
    if file := re.fullmatch(r"corpus\.files\[(\d+)\]\.(\w+)", name):
        return f"the {file[2].replace('sha256', 'SHA-256')} of corpus file {int(file[1]) + 1}"
    if name.startswith("teacher.files."):
        return f"the SHA-256 of the teacher's file {name.removeprefix('teacher.files.')}"
    part, _, rest = name.partition(".")
    owner = f"the {part}'s"
    if part == "kinds":
        kind, _, rest = rest.partition(".")
        owner = f"of {kind}, the" if rest else f"the kind {kind}"
    return f"{owner} {rest.replace('.', ' ').replace('_', ' ').replace('sha256', 'SHA-256')}".strip()


def _flatten(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        items = [(f"{prefix}.{key}" if prefix else key, item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [(f"{prefix}[{index}]", item) for index, item in enumerate(value)]
    else:
        return [(prefix, value)]
    return [leaf for name, item in items for leaf in _flatten(name, item)]


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"


def check_version(record: dict[str, Any], path: str) -> None:
    """Refuse a file of another format, or of another version than this code reads and writes.

    Raises:
        NewerVersionError: the version is newer; names the file and both versions.
        StoreError: the version is older, or it is no file of this format.
    """
    if record.get("format") != FORMAT_NAME:
        raise StoreError(f"{path} is not part of a knowledge store")
    version = record.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise StoreError(f"{path} has no usable format version ({version!r})")
    if version > FORMAT_VERSION:
        raise NewerVersionError(
            f"{path} has format version {version}, and this is knowledge-store for version {FORMAT_VERSION}:"
            " install a newer knowledge-store to use it"
        )
    if version < FORMAT_VERSION:
        raise StoreError(
            f"{path} has format version {version}, which this knowledge-store does not read (version {FORMAT_VERSION} alone):"
            " dump the corpus again into a new store"
        )


def _check_limits(record: dict[str, Any]) -> None:
    """ValueError: a number of a manifest is one that nothing can be made of, or its lists name what they may not."""
    if not 1 <= record["teacher"]["vocabulary_size"] <= MAX_VOCABULARY:
        raise ValueError(f"its vocabulary size is not between 1 and {MAX_VOCABULARY:,}")
    if not 1 <= record["plan"]["max_length"] <= MAX_LENGTH:
        raise ValueError(f"its maximum length is not between 1 and {MAX_LENGTH:,}")
    if record["derived"]["documents"] < 0:
        raise ValueError("its number of documents is below 0")
    if not record["kinds"]:
        raise ValueError("it lists no kind of knowledge")
    shards = record["derived"]["shards"]
    if not all(type(shard) is dict and type(shard.get("document")) is int for shard in shards):
        raise ValueError("its list of shards does not say where each begins")


def read_manifest(storage: Storage, dump: str, any_name: bool = False) -> Manifest:
    """Read a dump's manifest.

    Args:
        storage: of the store.
        dump: the dump's folder.
        any_name: the manifest may say another name than the folder has.

    Raises:
        MissingFileError: it is missing.
        DamageError: it is missing, altered, or not shaped as a manifest.
        StoreError: it is of another format version.
    """
    path = storage.locate(manifest_file(dump))
    record = read_record(storage, manifest_file(dump))
    check_version(record, path)
    try:
        check_shape(record, _SHAPE, "a manifest")
        for part, shapes in _OPTIONAL.items():
            present = {name: shape for name, shape in shapes.items() if name in record[part]}
            check_shape(record[part], present, f"a manifest.{part}")
        _check_limits(record)
        FileRecord.from_dict(record["derived"]["tokens"])
    except ValueError as error:
        raise DamageError(f"{path} is damaged: {error}") from None
    manifest = Manifest(**{field.name: record[field.name] for field in fields(Manifest)})
    if manifest.dump != dump and not any_name:
        raise StoreError(
            f"{path} belongs to a dump named {manifest.dump!r}: rename the folder back, or give the dump its name with"
            f" `knowledge-store rename {storage.address} {manifest.dump} {dump}`, or remove the folder, where it is a copy"
        )
    return manifest


def manifest_exists(storage: Storage, folder: str) -> bool:
    """Whether a folder of a store has a manifest, readable or not."""
    try:
        storage.size(manifest_file(folder))
    except MissingFileError:
        return False
    except DamageError:
        return True
    return True


def template_sha256(templates: str | dict[str, str] | None) -> str:
    """SHA-256 of a tokenizer's chat template, of those that it has by name, or of the empty text where it has none."""
    templates = templates or ""
    return json_sha256(templates) if isinstance(templates, dict) else hashlib.sha256(templates.encode()).hexdigest()
