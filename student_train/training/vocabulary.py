"""Whether a student speaks the vocabulary of a dump."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from knowledge_store.reporter import SILENT, Reporter
from student_train.training.positions import used_tokens


def check_student(
    store: KnowledgeStore,
    dump: str | None,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str = "the student",
    reporter: Reporter = SILENT,
) -> None:
    """Refuse a student whose vocabulary is not the dump's.

    Token ids are compared, not files: an id of the dump must be the same token in the student. Embeddings padded with unused
    rows are fine on either side, and so are special tokens that were added behind the dump's vocabulary, since they change how
    no text is cut. Two sorts of differences do no harm where no sequence of the dump holds the token: a special token of the
    student that has another name in the dump (tokens that are reserved in one release of a model get names in the next), and a
    token behind the student's vocabulary. They are told by name.

    Args:
        store: an open store.
        dump: which dump; may be left out when there is one.
        config: the student's configuration.
        tokenizer: the student's tokenizer.
        name: what to call the student in messages.
        reporter: hears of tokens that differ and are not used.

    Raises:
        InputError: naming the first ids that differ.
    """
    dump = store.dump(dump)
    kept = _named_tokens(store, dump)
    tokens = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    differing = {
        token_id
        for token_id in kept.keys() | tokens.keys()
        if kept.get(token_id) != tokens.get(token_id) and not (token_id not in kept and token_id in added)
    }
    known, last = set(tokens.values()), max(tokens, default=-1)
    # A token that has another id in the student is no renamed one.
    harmless = {
        token_id for token_id in differing if (token_id in added or token_id > last) and kept.get(token_id) not in known
    }
    harmless -= used_tokens(store, dump, harmless)
    if refused := differing - harmless:
        raise InputError(
            f"the vocabulary of {name} is not that of the dump {dump}: {_differences(refused, kept, tokens)}."
            " Train a student with the teacher's tokenizer"
        )
    _check_size(kept, dump, config, name)
    if harmless:
        reporter.note(
            f"Tokens that no sequence of {dump} holds have other names in {name}: {_differences(harmless, kept, tokens)}"
        )


def check_embeddings(store: KnowledgeStore, dump: str, config: PreTrainedConfig) -> None:
    """Refuse a student that has no embeddings for tokens of a dump's vocabulary: what can be told of it without its tokenizer.

    Args:
        store, dump, config: as of `check_student`.

    Raises:
        InputError: naming both sizes.
    """
    _check_size(_named_tokens(store, dump), dump, config, "the student")


def _named_tokens(store: KnowledgeStore, dump: str) -> dict[int, str]:
    """The tokens of a dump's vocabulary that have a name, by their ids."""
    table = store.tokens(dump)
    pairs = zip(table["token_id"].to_pylist(), table["token"].to_pylist(), strict=True)
    return {token_id: token for token_id, token in pairs if token is not None}


def _check_size(kept: dict[int, str], dump: str, config: PreTrainedConfig, name: str) -> None:
    needed = max(kept, default=-1) + 1
    vocabulary_size = config.get_text_config().vocab_size
    if vocabulary_size < needed:
        raise InputError(
            f"{name} has embeddings for {vocabulary_size:,} tokens and the dump {dump} uses ids up to {needed - 1:,}:"
            " resize its embeddings, or choose another student"
        )


def _differences(token_ids: set[int], kept: dict[int, str], tokens: dict[int, str]) -> str:
    def name(names: dict[int, str], token_id: int) -> str:
        return repr(names[token_id]) if token_id in names else "absent"

    ordered = sorted(token_ids)
    shown = "; ".join(
        f"token id {token_id} is {name(kept, token_id)} in the dump and {name(tokens, token_id)} in the student"
        for token_id in ordered[:3]
    )
    return shown + (f"; and {len(ordered) - 3:,} more" if len(ordered) > 3 else "")
