"""The tokens that end a dump's targets, and whether a student stops at them when it generates text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import numpy as np
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from knowledge_store import KINDS, KnowledgeStore
from knowledge_store.reporter import SILENT, Reporter
from student_train.losses.table import TEXT

SAMPLED = 64  # sequences looked at
SHARE = 0.05  # of them that a token has to end to be one of the dump's


def ending_tokens(store: KnowledgeStore, dump: str, special: Collection[int]) -> list[int] | None:
    """The special tokens that are the last target of a dump's sequences, the most frequent first.

    A sample of sequences is read, spread evenly over the dump: those that end where their document ends, so neither truncated
    ones nor the windows of a long text before its last. A token counts that ends at least a twentieth of them.

    Args:
        store: an open store.
        dump: which dump.
        special: ids of the tokens that can be an end.

    Returns:
        Token ids, none where the sequences end with ordinary tokens; None where the dump has no such sequence, or no text.
    """
    manifest = store.manifest(dump)
    kinds = [kind for kind in manifest.kinds if TEXT[0] in KINDS[kind].arrays(manifest)]
    complete = _complete(store, dump)
    if not kinds or not len(complete):
        return None
    sampled = complete[np.unique(np.linspace(0, len(complete) - 1, SAMPLED).round().astype(int))]
    counts: Counter[int] = Counter()
    for batch in store.batches(dump, batch_size=8, ordinals=sampled, shuffle=False, kinds=tuple(kinds[:1])):
        for token_ids, is_target in zip(batch["input_ids"], batch["is_target"], strict=True):
            counts.update(token_ids[is_target.astype(bool)][-1:].tolist())
    return [token for token, count in counts.most_common() if token in special and count >= SHARE * len(sampled)]


def _complete(store: KnowledgeStore, dump: str) -> np.ndarray:
    """Ordinals of the sequences with targets that end where their document ends, int64 ascending."""
    table = store.sequences(dump).select(["file", "row", "truncated", "targets"]).combine_chunks()
    files = table["file"].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    rows = table["row"].to_numpy()
    last = np.ones(len(rows), bool)
    last[:-1] = (files[1:] != files[:-1]) | (rows[1:] != rows[:-1])
    return np.flatnonzero(last & ~table["truncated"].to_numpy() & (table["targets"].to_numpy() > 0))


def stop_at_ending(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    store: KnowledgeStore,
    dumps: Sequence[str],
    *,
    keep_eos: bool = False,
    how_to_keep: str = "--keep-eos leaves them",
    reporter: Reporter = SILENT,
) -> None:
    """Make a student's settings stop at the tokens that end the targets of dumps, which it learns to end its texts with.

    Where the generation settings lack such a token, it is put before those they have. The tokenizer's end-of-sequence token,
    and that of the model's configuration, become the dumps' where they have one alone, unless the chat template writes the
    tokenizer's own: that still ends a turn then. Settings that stop already are left as they are.

    Args:
        student: changed in place, its settings alone.
        tokenizer: the student's; changed in place.
        store: an open store.
        dumps: the dumps that it learns from, the one whose ending is to come first first.
        keep_eos: change nothing.
        how_to_keep: how the settings are left as they are, in the words of whoever calls.
        reporter: hears what differs, and what becomes of it.
    """
    special = {*tokenizer.all_special_ids, *(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)}
    found = {dump: tokens for dump in dumps if (tokens := ending_tokens(store, dump, special)) is not None}
    if len({frozenset(tokens) for tokens in found.values()}) > 1:
        how = "; ".join(f"{dump}: {_names(tokens, tokenizer)}" for dump, tokens in found.items())
        reporter.note(f"The targets of the dumps do not end with the same special tokens ({how}).")
    for dump, tokens in found.items():
        if not tokens:
            reporter.note(f"No special token ends the targets of {dump}: the student does not learn from it where a text ends.")
    endings = list(dict.fromkeys(token for tokens in found.values() for token in tokens))
    if not endings:
        return
    ended = " and ".join(dump for dump, tokens in found.items() if tokens)
    settings = student.generation_config or GenerationConfig()
    stops = _listed(settings.eos_token_id)
    if set(endings) <= set(stops):
        return
    both = [*endings, *(token for token in stops if token not in endings)]
    difference = (
        f"The targets of {ended} end with {_names(endings, tokenizer)}, and the student's generation settings stop at"
        f" {_names(stops, tokenizer)}"
    )
    if keep_eos:
        reporter.note(f"Warning: {difference}: with --keep-eos, the trained student will not stop where its texts end.")
        return
    reporter.note(f"{difference}: the trained student's will stop at {_names(both, tokenizer)} ({how_to_keep}).")
    settings.eos_token_id = both
    student.generation_config = settings
    if len(endings) == 1 and tokenizer.eos_token_id not in endings and not _writes(tokenizer, tokenizer.eos_token):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(endings[0])
        student.config.eos_token_id = endings[0]


def _writes(tokenizer: PreTrainedTokenizerBase, token: str | None) -> bool:
    """Whether a chat template of a tokenizer has a token in it, word for word."""
    templates = tokenizer.chat_template or {}
    texts = templates.values() if isinstance(templates, dict) else [templates]
    return token is not None and any(token in text for text in texts)


def _listed(tokens: int | list[int] | None) -> list[int]:
    return [] if tokens is None else [tokens] if isinstance(tokens, int) else list(tokens)


def _names(tokens: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> str:
    names = [f"{tokenizer.convert_ids_to_tokens(token)!r}" for token in tokens]
    return " and ".join(names) if names else "no token"
