"""What a dump is asked to do: one field for each option of `teacher-dump run`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from knowledge_store.errors import InputError
from knowledge_store.layout import check_dump_name

# A longer text is cut into parts of at most this many characters for each position of a sequence: about 16 full windows.
PART_CHARACTERS_PER_POSITION = 64

QUANTISATION_STEP = 1 / 8


@dataclass(frozen=True)
class DumpConfig:
    """The options of a dump.

    Attributes:
        teacher: a local folder or a hub id of a transformers causal language model.
        corpus: files: .jsonl, .jsonl.zst, .parquet or .txt.
        store: the store's folder; made if need be.
        name: the dump's name; made from the teacher's and the corpus's when None.
        top_k: candidates kept at each position.
        max_length: longest sequence, in tokens.
        batch_size: a forward pass has room for this many sequences of max_length; shorter ones share the room.
        dtype: "auto" (float32 on a CPU, the model's own elsewhere), "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        shard_size: documents in a shard.
        gguf_file: name of a GGUF file within the teacher's folder.
        keep_context: keep knowledge at context positions (prompts) too.
        skip_bad_rows: leave out rows that cannot be used, and count them, instead of stopping.
        kinds: the kinds of knowledge to keep.
    """

    teacher: str
    corpus: tuple[Path, ...]
    store: Path
    name: str | None = None
    top_k: int = 5
    max_length: int = 512
    batch_size: int = 16
    dtype: str = "auto"
    device: str = "auto"
    shard_size: int = 512
    gguf_file: str | None = None
    keep_context: bool = False
    skip_bad_rows: bool = False
    kinds: tuple[str, ...] = ("positions",)

    def __post_init__(self) -> None:
        for name, least in (("top_k", 1), ("max_length", 2), ("batch_size", 1), ("shard_size", 1)):
            if getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}")
        if not self.corpus:
            raise InputError("name at least one corpus file")
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

    @property
    def part_characters(self) -> int:
        """Longest text, in characters, that is one document of the plan."""
        return PART_CHARACTERS_PER_POSITION * self.max_length
