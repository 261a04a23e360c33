"""Whether a student speaks the vocabulary of a dump."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError


def check_student(
    store: KnowledgeStore,
    dump: str | None,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str = "the student",
) -> None:
    """Refuse a student whose vocabulary is not the dump's.

    Token ids are compared, not files: every id of the dump must be the same token in the student. Embeddings padded
    with unused rows are fine on either side, and so are special tokens that were added behind the dump's vocabulary,
    since they change how no text is cut.

    Args:
        store: an open store.
        dump: which dump; may be left out when there is one.
        config: the student's configuration.
        tokenizer: the student's tokenizer.
        name: what to call the student in messages.

    Raises:
        InputError: naming the first ids that differ.
    """
    dump = store.dump(dump)
    table = store.tokens(dump)
    pairs = zip(table["token_id"].to_pylist(), table["token"].to_pylist(), strict=True)
    kept = {token_id: token for token_id, token in pairs if token is not None}
    tokens = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    differing = sorted(
        token_id
        for token_id in kept.keys() | tokens.keys()
        if kept.get(token_id) != tokens.get(token_id) and not (token_id not in kept and token_id in added)
    )
    if differing:
        shown = "; ".join(_difference(token_id, kept, tokens) for token_id in differing[:3])
        more = f"; and {len(differing) - 3:,} more" if len(differing) > 3 else ""
        raise InputError(
            f"the vocabulary of {name} is not that of the dump {dump}: {shown}{more}."
            " Train a student with the teacher's tokenizer"
        )
    needed = max(kept, default=-1) + 1
    vocabulary_size = config.get_text_config().vocab_size
    if vocabulary_size < needed:
        raise InputError(
            f"{name} has embeddings for {vocabulary_size:,} tokens and the dump {dump} uses ids up to {needed - 1:,}:"
            " resize its embeddings, or choose another student"
        )


def _difference(token_id: int, kept: dict[int, str], tokens: dict[int, str]) -> str:
    def name(tokens: dict[int, str]) -> str:
        return repr(tokens[token_id]) if token_id in tokens else "absent"

    return f"token id {token_id} is {name(kept)} in the dump and {name(tokens)} in the student"
