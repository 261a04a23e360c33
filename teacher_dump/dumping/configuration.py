"""What a dump is asked to do: one field for each option of `teacher-dump run`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from knowledge_store.errors import InputError
from knowledge_store.format.layout import check_dump_name
from knowledge_store.kinds.selection import MAX_DRAWS, NAMES, Selection

# A longer text is cut into parts of at most this many characters for each position of a sequence: about 16 full windows.
PART_CHARACTERS_PER_POSITION = 64

QUANTISATION_STEP = 1 / 8

SELECTION_OPTIONS = {
    "top-k": {"top_k", "tail_draws"},
    "top-p": {"top_p", "max_k", "tail_draws"},
    "random-sampling": {"draws"},
}


@dataclass(frozen=True)
class DumpConfig:
    """The options of a dump.

    Attributes:
        teacher: a local folder or a hub id of a transformers causal language model.
        corpus: files: .jsonl, .jsonl.zst, .parquet or .txt.
        store: the store's folder; made if need be.
        name: the dump's name; made from the teacher's and the corpus's when None.
        selection: what to keep at each position: top-k, top-p or random-sampling.
        top_k: candidates of top-k.
        tail_draws: draws from the tail, beside the candidates of top-k or top-p.
        top_p: the probability that the candidates of top-p reach, with at most max_k of them.
        draws: of random-sampling.
        max_length: longest sequence, in tokens.
        batch_size: a forward pass has room for this many sequences of max_length; shorter ones share the room.
        dtype: "auto" (float32 on a CPU, the model's own elsewhere), "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        shard_size: documents in a shard.
        gguf_file: name of a GGUF file within the teacher's folder.
        keep_context: keep knowledge at context positions (prompts) too.
        skip_bad_rows: leave out rows that cannot be used, and count them, instead of stopping.
        calibration: a file of `teacher-dump calibrate`, to keep the tail at its temperature too; None for no calibration.
            Not with random-sampling, which keeps no candidates.
        kinds: the kinds of knowledge to keep.
    """

    teacher: str
    corpus: tuple[Path, ...]
    store: Path
    name: str | None = None
    selection: str = "top-k"
    top_k: int = 5
    tail_draws: int = 4
    top_p: float = 0.95
    max_k: int = 32
    draws: int = 50
    max_length: int = 512
    batch_size: int = 16
    dtype: str = "auto"
    device: str = "auto"
    shard_size: int = 512
    gguf_file: str | None = None
    keep_context: bool = False
    skip_bad_rows: bool = False
    calibration: Path | None = None
    kinds: tuple[str, ...] = ("positions",)

    def __post_init__(self) -> None:
        if self.selection not in NAMES:
            raise InputError(f"there is no --selection {self.selection}: choose one of {', '.join(NAMES)}")
        leasts = {"top_k": 1, "max_k": 1, "draws": 1, "tail_draws": 0, "max_length": 2, "batch_size": 1, "shard_size": 1}
        for name, least in leasts.items():
            if getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}")
        for name in ("draws", "tail_draws"):
            if getattr(self, name) > MAX_DRAWS:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at most {MAX_DRAWS:,}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p is {self.top_p}; it must be above 0 and at most 1")
        options = {name for each in SELECTION_OPTIONS.values() for name in each}
        for name in sorted(options - SELECTION_OPTIONS[self.selection]):
            if getattr(self, name) != getattr(DumpConfig, name):
                raise InputError(f"--{name.replace('_', '-')} is not an option of the selection {self.selection}")
        if self.calibration is not None and self.selection == "random-sampling":
            raise InputError(
                "--calibration keeps the tail at another temperature beside candidates, and random-sampling has none: its draws"
                " serve temperature 1 alone"
            )
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
    def rule(self) -> Selection:
        """The selection, as the rule it stands for."""
        if self.selection == "random-sampling":
            return Selection(self.selection, 0, self.draws)
        if self.selection == "top-p":
            return Selection(self.selection, self.max_k, self.tail_draws, self.top_p)
        return Selection(self.selection, self.top_k, self.tail_draws)

    @property
    def part_characters(self) -> int:
        """Longest text, in characters, that is one document of the plan."""
        return PART_CHARACTERS_PER_POSITION * self.max_length
