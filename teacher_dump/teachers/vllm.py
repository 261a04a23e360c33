"""A teacher that vLLM runs in this process (see `vllm_engine`): any model that it generates with, from a folder of safetensors.

It gives whole distributions where vLLM's version is one that they can be taken from, and the likeliest tokens alone where it is
not, which is said when it is loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from knowledge_store.errors import InputError
from knowledge_store.model_files import read_configuration
from knowledge_store.reporter import SILENT, Reporter
from teacher_dump.teachers.files import EXPERTS, configured_ends, file_hashes, find_folder, model_files, stated_sizes
from teacher_dump.teachers.loading import Loading, check_loading
from teacher_dump.teachers.prediction import with_finite_padding
from teacher_dump.teachers.probes import check_looks_back
from teacher_dump.teachers.protocol import (
    DTYPES,
    Ability,
    Batching,
    Likeliest,
    TextRequest,
    WithoutGradients,
    Writing,
    WrittenText,
)
from teacher_dump.teachers.tokenizer import load_tokenizer, stop_tokens, token_texts
from teacher_dump.teachers.vllm_engine import VllmEngine, start_engine

ROOM = 64  # sequences that vLLM works on at once, at least
PROBES, PROBE_TOKENS = 2, 16  # texts whose distributions are asked for both ways at the start, and their length
TOLERANCE = {"float32": 1e-4}  # nats that the two may be apart, of the same batch
SHORT_TOLERANCE = 0.05  # in a dtype of 16 bits


@dataclass
class VllmPrediction:
    """What a teacher is asked about a batch of B sequences (see `protocol.Prediction`); vLLM runs when it is read.

    Attributes:
        teacher: whose.
        sequences: the B sequences, int64 (T,) each.
        starts: where each begins in the padded batch.
        count: of the likeliest tokens.
        hidden: there is none.
    """

    teacher: VllmTeacher
    sequences: list[np.ndarray]
    starts: np.ndarray
    count: int
    hidden: None = None

    def logit_slices(self, rows: torch.Tensor, positions: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """See `protocol.Prediction`: log-probabilities, which are logits too, in order.

        Raises:
            IndexError: a position is the last of its sequence, of which vLLM tells nothing.
        """
        at_rows, at_positions = rows.cpu().numpy(), positions.cpu().numpy()
        at_positions = at_positions - self.starts[at_rows] if len(at_rows) else at_positions
        runs = _runs(at_rows, at_positions)
        prompts = [self._prompt(at_rows[run][0], at_positions[run][-1]) for run in runs]
        early: dict[int, tuple[slice, torch.Tensor]] = {}
        following = 0
        with torch.inference_mode(), closing(self.teacher.engine.distributions(prompts)) as parts:
            for number, first, logprobs in parts:
                run = runs[number]
                wanted = at_positions[run]
                begin, end = np.searchsorted(wanted, [first, first + len(logprobs)])
                if begin == end:
                    continue
                chosen = logprobs[torch.from_numpy(wanted[begin:end] - first).to(logprobs.device)]
                place = slice(run.start + int(begin), run.start + int(end))
                early[place.start] = place, with_finite_padding(chosen, self.teacher.impossible_tokens)
                del logprobs
                while following in early:  # vLLM may be done with a prompt before an earlier one
                    place, chosen = early.pop(following)
                    following = place.stop
                    yield place, chosen

    def _prompt(self, row: int, last: int) -> np.ndarray:
        """As much of a sequence as tells what follows each of its tokens up to a place."""
        sequence = self.sequences[row]
        if last + 2 > len(sequence):
            raise IndexError(f"nothing stands behind position {last} of a sequence of {len(sequence)} tokens")
        return sequence[: last + 2]

    def likeliest(self, rows: np.ndarray, positions: np.ndarray) -> Likeliest:
        """See `protocol.Prediction`."""
        positions = positions - self.starts[rows] if len(rows) else positions
        asked = np.unique(rows)
        lasts = [positions[rows == row].max() for row in asked]
        answers = self.teacher.engine.likeliest(
            [self._prompt(row, last) for row, last in zip(asked, lasts, strict=True)], self.count
        )
        empty = Likeliest(np.zeros((0, self.count), np.int64), np.zeros((0, self.count)), np.zeros(0, np.int64), np.zeros(0))
        parts = [empty, *(answer.part(positions[rows == row]) for row, answer in zip(asked, answers, strict=True))]
        order = np.argsort(np.concatenate([np.zeros(0, np.int64), *(np.flatnonzero(rows == row) for row in asked)]))
        names = ("ids", "logprobs", "token_ids", "token_logprobs")
        return Likeliest(*(np.concatenate([getattr(part, name) for part in parts])[order] for name in names))

    def drop(self) -> None:
        """See `protocol.Prediction`: nothing runs until it is read."""

    def layer_states(self, layer: int) -> Any:
        """Never asked for."""
        raise NotImplementedError

    def input_gradients(self, rows: Any, positions: Any, slopes: Any) -> Any:
        """Never asked for."""
        raise NotImplementedError


def _runs(rows: np.ndarray, positions: np.ndarray) -> list[slice]:
    """Where places of one row follow each other in ascending order, int64 (N,) each: slices of the N, as long as can be."""
    if not len(rows):
        return []
    ends = np.flatnonzero((rows[1:] != rows[:-1]) | (positions[1:] < positions[:-1])) + 1
    edges = [0, *ends.tolist(), len(rows)]
    return [slice(begin, end) for begin, end in pairwise(edges)]


@dataclass
class VllmTeacher(WithoutGradients):
    """A teacher that vLLM runs (see `protocol.Teacher`).

    Attributes:
        engine: that runs it.
        tokenizer: its own.
        description: what goes into the manifest about it, its files' hashes and the engine included.
        abilities: what it can give.
        stop_tokens: ids of the tokens that end its texts.
        has_experts: whether its configuration names several experts.
        impossible_tokens: int64 (n,), those whose log-probabilities are always −inf.
    """

    engine: VllmEngine
    tokenizer: Any
    description: dict[str, Any]
    abilities: frozenset[Ability]
    stop_tokens: tuple[int, ...]
    has_experts: bool
    impossible_tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def vocabulary_size(self) -> int:
        """How many tokens its distribution is over."""
        return int(self.description["vocabulary_size"])

    @property
    def device(self) -> torch.device:
        """Of the distributions that it gives."""
        return self.engine.device

    @property
    def device_name(self) -> str:
        """Where it runs, for people, and by which version of what."""
        device = self.engine.device
        place = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return f"{place} (vLLM {self.engine.version})"

    @property
    def ahead(self) -> int:
        """vLLM runs when a prediction is read."""
        return 0

    def batching(self, longest: int, room: int) -> Batching:
        """Any: vLLM knows no padding, and picks what depends on lengths by the longest it was started for."""
        return Batching()

    def predict(
        self,
        token_ids: np.ndarray,
        attention_mask: np.ndarray,
        gradients: bool = False,
        layers: Collection[int] = (),
        likeliest: int = 0,
    ) -> VllmPrediction:
        """Ask for a batch (see `protocol.Teacher`)."""
        sequences = [row[mask] for row, mask in zip(token_ids, attention_mask, strict=True)]
        return VllmPrediction(self, sequences, attention_mask.argmax(axis=1), likeliest)

    def write(self, requests: Sequence[TextRequest], writing: Writing) -> list[WrittenText]:
        """Write some texts as one batch (see `protocol.Teacher`)."""
        return self.engine.write(requests, writing)

    def recognise(self, kept: Mapping[str, Any]) -> None:
        """It is told by its files."""

    def check_unchanged(self) -> None:
        """See `protocol.Teacher`: nobody puts another in its place."""

    def tokens(self) -> tuple[list[str | None], list[str | None]]:
        """For each token id its text and the tokenizer's own name for it (see `tokenizer.token_texts`)."""
        return token_texts(self.tokenizer, self.vocabulary_size)


def load_teacher(teacher: str, loading: Loading, longest: int, *, room: int = ROOM, reporter: Reporter = SILENT) -> VllmTeacher:
    """Start vLLM on a teacher, and hash its files.

    Args:
        teacher: a local folder or a hub id.
        loading: `dtype` and `revision` of it; the rest has no meaning for vLLM.
        longest: tokens of the longest sequence that it is going to be asked about.
        room: sequences that vLLM works on at once.
        reporter: hears of progress, and of distributions that cannot be had.

    Raises:
        InputError: it cannot be used; says why.
    """
    check_loading(loading)
    if loading.dtype not in DTYPES:
        raise InputError(f"there is no dtype {loading.dtype!r} for a teacher: use {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    folder = find_folder(teacher, None, loading.revision)
    files = model_files(folder, None)
    sizes, configuration = stated_sizes(str(folder)), read_configuration(folder)
    text: dict[str, Any] = configuration.get("text_config") or configuration
    if "vocabulary_size" not in sizes:
        raise InputError(f"{folder / 'config.json'} does not say how large the vocabulary is, which vLLM needs to know")
    positions = sizes.get("max_positions")
    if positions is not None and longest > positions:
        raise InputError(f"sequences have up to {longest} tokens, and {teacher} knows {positions} positions")
    tokenizer = load_tokenizer(str(folder))
    own_dtype = str(text.get("dtype") or text.get("torch_dtype") or configuration.get("dtype") or "auto")
    reporter.note(f"vLLM is being started on {teacher}, which takes a while")
    engine = start_engine(folder, loading.dtype, own_dtype, longest, room, sizes["vocabulary_size"])
    dtype = str(engine.engine.model_config.dtype).removeprefix("torch.")
    description = {
        "name": folder.resolve().name if Path(teacher).is_dir() else teacher,
        "engine": "vllm",
        "model_type": configuration.get("model_type"),
        "hidden_size": sizes.get("hidden_size"),
        "layers": sizes.get("layers"),
        "vocabulary_size": sizes["vocabulary_size"],
        "max_positions": positions,
        "dtype": dtype,
        "files": file_hashes(folder, files, reporter=reporter),
    }
    has_experts = any((text.get(name) or 0) > 1 for name in EXPERTS)
    ends = stop_tokens(configured_ends(folder), tokenizer)
    generator = np.random.default_rng(0)
    probes = [generator.integers(0, sizes["vocabulary_size"], min(PROBE_TOKENS, longest)) for _ in range(PROBES)]
    reason = engine.check_distributions(probes, TOLERANCE.get(dtype, SHORT_TOLERANCE))
    if reason is not None:
        reporter.note(f"vLLM's whole distributions are not used: {reason}. Its likeliest tokens are")
        return VllmTeacher(engine, tokenizer, description, frozenset({Ability.LIKELIEST, Ability.TEXT}), ends, has_experts)
    abilities = frozenset({Ability.DISTRIBUTIONS, Ability.LIKELIEST, Ability.TEXT})
    loaded = VllmTeacher(engine, tokenizer, description, abilities, ends, has_experts)
    never = torch.ones(loaded.vocabulary_size, dtype=torch.bool)
    for _, _, logprobs in engine.distributions(probes):
        never &= logprobs.isneginf().all(dim=0).cpu()
    loaded.impossible_tokens = never.nonzero()[:, 0].numpy()
    if len(loaded.impossible_tokens):
        description["impossible_tokens"] = len(loaded.impossible_tokens)
    check_looks_back(loaded)
    return loaded
