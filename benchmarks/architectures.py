"""Whether teachers of every architecture are told alike in a batch and alone: tiny random models of all of them.

    python -m benchmarks.architectures [--only llama phi3 …]

Of each architecture that transformers loads as a causal language model, a tiny random model is made offline, saved, and loaded
as a teacher. Sequences of several lengths are then asked in the batches that a dump would ask them in, and held against what
the model says of each of them alone: by how much the log-probability of any token differs, in nats. A teacher that differs by
more than TOLERANCE fails; one that is refused is listed with the sentence.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from benchmarks.measurement import keep
from benchmarks.tiny_architectures import architectures, tiny_config, tiny_model
from knowledge_store.errors import InputError
from teacher_dump.dumping.batches import batch_arrays, length_batches
from teacher_dump.teachers.local import LocalTeacher, load_teacher

LENGTHS = (96, 70, 48, 33, 20, 9, 5)
ROOM = 4 * max(LENGTHS)  # positions in a batch
TOLERANCE = 1e-4  # nats, as TEACHERS.md states it

_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.0, 1.1, 1.2], "long_factor": [1.1, 1.5, 8.0, 40.0],
}  # fmt: skip

# Beside the default configuration of each architecture: what makes a teacher depend on more than the tokens before.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3 with LongRoPE": ("phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 32}),
    "llama with dynamic RoPE": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, "max_position_embeddings": 64},
    ),
    "gemma3_text, bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}),
    **{f"{name}, decoder": (name, {"is_decoder": True}) for name in ("bert", "roberta", "electra", "rembert", "big_bird")},
    "mistral, sliding window": ("mistral", {"sliding_window": 6}),
    "falcon with ALiBi": ("falcon", {"alibi": True}),
}


def outcome(architecture: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What becomes of a tiny model as a teacher: `outcome` ("equal", "differs", "refused", or "not made" where there is no tiny
    model of it), and beside it the difference (nats), the batching, or why."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            model = tiny_model(tiny_config(architecture, **settings))
            model(input_ids=torch.arange(12)[None], use_cache=False)
            model.save_pretrained(folder)
            _tokenizer().save_pretrained(folder)
    except Exception as error:  # each architecture fails in its own way where its default configuration cannot be shrunk
        return {"outcome": "not made", "why": _first_line(error)}
    began = time.monotonic()
    try:
        teacher = load_teacher(str(folder), device="cpu")
        batching = teacher.batching(max(LENGTHS), ROOM)
    except InputError as error:
        return {"outcome": "refused", "why": str(error).replace(str(folder), architecture).replace(folder.name, architecture)}
    seconds = time.monotonic() - began
    sequences = [np.random.default_rng(length).integers(0, teacher.vocabulary_size - 1, length) for length in LENGTHS]
    worst = 0.0
    for indices in length_batches(list(LENGTHS), ROOM, batching):
        batch = [sequences[index] for index in indices]
        for sequence, together in zip(batch, _together(teacher, batch), strict=True):
            worst = max(worst, _difference(_alone(teacher, sequence), together))
    return {
        "outcome": "equal" if worst <= TOLERANCE else "differs",
        "nats": float(f"{worst:.2g}"),
        "batches": batching.rule,
        "load_seconds": round(seconds, 2),
    }


def _tokenizer() -> PreTrainedTokenizerFast:
    """Of letters alone: nothing is tokenised here."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1}, [])), eos_token="a", pad_token="a")


def _together(teacher: LocalTeacher, sequences: list[np.ndarray]) -> list[torch.Tensor]:
    """Log-probabilities (L, V) of each sequence, as a dump asks for them."""
    tokens, mask = batch_arrays(sequences)
    rows, positions = (torch.from_numpy(array) for array in np.nonzero(mask))
    logits = torch.cat([part.clone() for _, part in teacher.predict(tokens, mask).logit_slices(rows, positions)])
    return list(torch.log_softmax(logits, dim=1).split([len(sequence) for sequence in sequences]))


def _alone(teacher: LocalTeacher, sequence: np.ndarray) -> torch.Tensor:
    """The same of one sequence, from the model itself."""
    tokens = torch.from_numpy(sequence)[None]
    with torch.inference_mode():
        logits = teacher.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), dim=1)


def _difference(alone: torch.Tensor, together: torch.Tensor) -> float:
    """The largest between two (L, V), in nats; tokens that are never given count as equal."""
    given = alone.isfinite()
    return (alone - together).abs()[given].max().item() if given.any() else float("inf")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160]


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """All that are tried, by name: an architecture and settings of its configuration."""
    return {**{name: (name, {}) for name in architectures()}, **VARIANTS}


def main() -> None:
    """Try them all, and keep the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(cases()), metavar="NAME", help="these alone")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # threads of models so small mostly wait for each other
    transformers.logging.set_verbosity_error()
    outcomes: dict[str, dict[str, Any]] = {}
    for name, (architecture, settings) in cases().items():
        if options.only and name not in options.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            outcomes[name] = outcome(architecture, settings, Path(folder) / "tiny")
        print(name, outcomes[name], flush=True)
    counts = Counter(found["outcome"] for found in outcomes.values())
    keep("architectures", {"tolerance_nats": TOLERANCE, "lengths": list(LENGTHS), "counts": dict(counts), "outcomes": outcomes})


if __name__ == "__main__":
    main()
