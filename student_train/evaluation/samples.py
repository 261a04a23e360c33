"""What a model writes: greedy continuations of a few sequences of a dump, beside the text and what the teacher expected there.

Which sequences and where they are cut follows from the dump alone, so every model that is evaluated on it continues the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from knowledge_store import KnowledgeStore
from knowledge_store.reporter import SILENT, Reporter
from student_train.evaluation.figures import Likeliest
from student_train.evaluation.kinds import FIGURES
from student_train.training.context import context_length

SEQUENCES = 3
TOKENS = 32  # that a model writes
SHOWN_POSITIONS = 6  # of which the teacher's candidates are kept
SHOWN_CANDIDATES = 5
PROMPT_CHARACTERS = 300
# Tokens before a text that it is decoded with: a decoder may drop a space in front of what it takes for a text's beginning.
BEFORE = 8


def sample_continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    store: KnowledgeStore,
    dump: str,
    *,
    reporter: Reporter = SILENT,
) -> list[dict[str, Any]]:
    """Have a model continue a few sequences of a dump, spread evenly over it.

    A sequence is cut before its first target; where it begins with targets, as plain text does, in its middle.

    Args:
        model: a causal language model, in evaluation mode, on its device.
        tokenizer: its tokenizer.
        store: an open store.
        dump: which dump.
        reporter: hears of progress, and of a model that cannot write.

    Returns:
        For each sequence: sequence_id; start (the position that the model continues from); prompt, the end of the text before
        it, and prompt_cut, whether there is more before that; text, what stands there; written, what the model writes instead,
        the likeliest token each time, up to the end that it knows; and positions, of the first targets of the text: token, and
        candidates, the teacher's, each with its probability. Nothing where no kind of the dump knows candidates and texts.
    """
    kind, likeliest = _kind(store, dump)
    if likeliest is None:
        return []
    if not model.can_generate():
        reporter.note(f"{type(model).__name__} cannot generate text: no samples are written")
        return []
    texts = store.tokens(dump)["text"].to_pylist()
    samples = []
    ordinals = _chosen(store, dump)
    with reporter.progress("writing samples", len(ordinals), "sequences") as advance:
        for ordinal in ordinals:
            # One by one: a batch may have any order, and is padded.
            [batch] = store.batches(dump, batch_size=1, ordinals=np.array([ordinal]), shuffle=False, kinds=(kind,))
            samples.append(_sample(model, tokenizer, batch, likeliest, texts))
            advance(1)
    return samples


def _kind(store: KnowledgeStore, dump: str) -> tuple[str, Likeliest | None]:
    """The dump's first kind of knowledge that says what the teacher expected of a text."""
    found = ((kind, FIGURES[kind].likeliest) for kind in store.manifest(dump).kinds if kind in FIGURES)
    return next((entry for entry in found if entry[1] is not None), ("", None))


def _chosen(store: KnowledgeStore, dump: str) -> np.ndarray:
    """Ordinals, int64, of sequences that have something to continue and something to compare it with."""
    table = store.sequences(dump)
    usable = np.flatnonzero((table["targets"].to_numpy() > 1) & (table["length"].to_numpy() > 2))
    places = (np.arange(SEQUENCES) + 0.5) / SEQUENCES * len(usable)
    return usable[np.unique(places.astype(np.int64))] if len(usable) else usable


def _sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Mapping[str, np.ndarray],
    likeliest: Likeliest,
    texts: list[str | None],
) -> dict[str, Any]:
    length = int(batch["attention_mask"][0].sum())
    token_ids, targets = batch["input_ids"][0, :length], np.flatnonzero(batch["is_target"][0, :length])
    start = int(targets[0])
    if start <= 1:  # there is no prompt
        start = int(targets[min(int(np.searchsorted(targets, length // 2)), len(targets) - 1)])
    prompt = _decoded(tokenizer, token_ids[:start])
    shown = targets[targets >= start][:SHOWN_POSITIONS].tolist()

    def text_of(token: int) -> str:
        text = texts[token] if token < len(texts) else None
        return f"[{token}]" if text is None else text

    return {
        "sequence_id": int(batch["sequence_id"][0]),
        "start": start,
        "prompt": prompt[-PROMPT_CHARACTERS:],
        "prompt_cut": len(prompt) > PROMPT_CHARACTERS,
        "text": _continued(tokenizer, token_ids[:start], token_ids[start : start + TOKENS]),
        "written": _continued(tokenizer, token_ids[:start], _written(model, token_ids[:start])),
        "positions": [
            {
                "token": text_of(int(token_ids[position])),
                "candidates": [[text_of(token), round(share, 4)] for token, share in candidates[:SHOWN_CANDIDATES]],
            }
            for position, candidates in zip(shown, likeliest(batch, shown), strict=True)
        ],
    }


def _written(model: PreTrainedModel, token_ids: np.ndarray) -> np.ndarray:
    """What a model writes after some tokens, int64 (at most TOKENS,)."""
    limit = context_length(model)
    room = TOKENS if limit is None else min(TOKENS, limit - len(token_ids))
    if room < 1:
        return token_ids[:0]
    prompt = torch.from_numpy(np.ascontiguousarray(token_ids[None].astype(np.int64))).to(model.device)
    with torch.no_grad(), _greedy(model, room):
        written: torch.Tensor = model.generate(prompt, attention_mask=torch.ones_like(prompt))
    return written[0, len(token_ids) :].cpu().numpy()


@contextmanager
def _greedy(model: PreTrainedModel, tokens: int) -> Iterator[None]:
    """Inside, a model writes the likeliest token each time: its own settings may sample, or punish repetition. It stops where
    they say that a text ends."""
    settings = model.generation_config
    ends = settings.eos_token_id if settings is not None else None
    ending = ends[0] if isinstance(ends, list) and ends else ends
    model.generation_config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, num_beams=1, eos_token_id=ends, pad_token_id=ending, use_cache=True
    )
    try:
        yield
    finally:
        model.generation_config = settings


def _decoded(tokenizer: PreTrainedTokenizerBase, token_ids: np.ndarray) -> str:
    ids = token_ids.tolist()
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""


def _continued(tokenizer: PreTrainedTokenizerBase, before: np.ndarray, token_ids: np.ndarray) -> str:
    """The text that tokens add to that of those before them."""
    before = before[-BEFORE:]
    whole, known = _decoded(tokenizer, np.concatenate([before, token_ids])), _decoded(tokenizer, before)
    return whole.removeprefix(known) if whole.startswith(known) else _decoded(tokenizer, token_ids)
