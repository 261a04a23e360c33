"""Whether a student can take sequences as long as those of a dump."""

from __future__ import annotations

import inspect

import numpy as np
import torch
from transformers import PreTrainedModel

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from knowledge_store.reporter import SILENT, Reporter

# What configurations call how many positions a model knows, where transformers does not translate it.
_LIMITS = ("max_position_embeddings", "max_seq_len")


def check_context(
    store: KnowledgeStore,
    dump: str,
    model: PreTrainedModel,
    ordinals: np.ndarray | None = None,
    *,
    name: str = "the student",
    reporter: Reporter = SILENT,
) -> None:
    """Refuse a model that has no position for the last tokens of a dump's sequences, and warn of one that was made for fewer.

    Positions that are learnt, or kept in a table, end where the table does. Rotary ones (RoPE) can be continued, and so can
    others that are computed, but a model is poor where it was never trained: whether that is wanted, only a person knows.

    Args:
        store: an open store.
        dump: which dump.
        model: the model, as it is loaded.
        ordinals: of the sequences that it is to read; None for all.
        name: what to call the model in messages.
        reporter: hears of sequences that are longer than the model was made for.

    Raises:
        InputError: the model cannot read them.
    """
    limit = context_length(model)
    lengths = store.sequences(dump)["length"].to_numpy()
    lengths = lengths if ordinals is None else lengths[ordinals]
    if limit is None or not len(lengths) or lengths.max() <= limit:
        return
    too_long = (
        f"{int((lengths > limit).sum()):,} of {len(lengths):,} sequences of the dump {dump} are longer than the {limit:,}"
        f" tokens of {name}'s context (the longest has {int(lengths.max()):,})"
    )
    if not continues(model, int(lengths.max()) - 1):
        raise InputError(
            f"{too_long}, and it has no positions beyond: choose a model with a longer context, or make the dump with"
            f" `teacher-dump run --max-length {limit}`"
        )
    reporter.note(f"Warning: {too_long}. It computes its positions and goes on beyond, where it may never have been trained.")


def note_max_length(store: KnowledgeStore, dump: str, max_length: int | None, reporter: Reporter) -> None:
    """Say that a trainer's `max_length`, to which TRL's cut rows, cuts no sequence of a dump, where some are longer."""
    if max_length is None:
        return
    longest = int(store.sequences(dump, ["length"])["length"].to_numpy().max(initial=0))
    if longest > max_length:
        reporter.note(
            f"max_length={max_length} cuts nothing: the sequences of {dump} are read as the teacher saw them, of up to"
            f" {longest:,} tokens; say so with max_length=None"
        )


def context_length(model: PreTrainedModel) -> int | None:
    """How many tokens a model was made for; None where its configuration does not say."""
    config = model.config.get_text_config()
    return next((size for known in _LIMITS if isinstance(size := getattr(config, known, None), int) and size > 0), None)


def continues(model: PreTrainedModel, position: int) -> bool:
    """Whether a model has such a position (counted from 0), beyond its context."""
    # Not asked by running it: some kinds of RoPE change with the longest sequence that they have seen.
    if any("rotary" in name for name, _ in model.named_modules()):
        return True
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    try:
        with torch.no_grad():
            tokens = torch.zeros(1, 1, dtype=torch.long, device=model.device)
            model(input_ids=tokens, position_ids=torch.full_like(tokens, position), use_cache=False)
    except (IndexError, RuntimeError, ValueError):
        return False
    return True
