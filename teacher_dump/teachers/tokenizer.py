"""A teacher's tokenizer without its model, which tells what becomes of a corpus before weights are loaded, and its tokens."""

from __future__ import annotations

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from knowledge_store.errors import InputError
from knowledge_store.model_files import panics_as_errors, silence
from teacher_dump.teachers.files import find_folder


def load_tokenizer(teacher: str, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """Load a teacher's tokenizer alone; of a hub id, the weights are not downloaded.

    Args:
        teacher: a local folder or a hub id.
        gguf_file: name of a GGUF file in it.

    Raises:
        InputError: there is no such teacher, or its tokenizer cannot be used; says why.
    """
    folder = find_folder(teacher, gguf_file, weights=False)
    source = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        with silence(), panics_as_errors():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **source)
    except Exception as error:  # a broken folder fails in many ways, all of them the folder's
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"the tokenizer in {folder} cannot be loaded: {reason}") from None


def token_texts(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[list[str | None], list[str | None]]:
    """For each token id below a vocabulary size: its text as a person reads it, and the tokenizer's own name for it."""
    names: list[str | None] = [None] * size
    for name, token in tokenizer.get_vocab().items():
        if token < size:
            names[token] = name
    # Decoded behind another token, since decoders drop a leading space at the start of a text.
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    known = [token for token, name in enumerate(names) if name is not None]
    pairs = tokenizer.batch_decode([[*anchor, token] for token in known], clean_up_tokenization_spaces=False)
    before = tokenizer.decode(anchor, clean_up_tokenization_spaces=False)
    texts: list[str | None] = [None] * size
    for token, text in zip(known, pairs, strict=True):
        texts[token] = text.removeprefix(before)
    return texts, names


def stop_tokens(configured: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of the tokens that end a text: those of a model's configuration, and the tokenizer's own."""
    ids = configured if isinstance(configured, list) else [configured]
    return tuple(sorted({token for token in (*ids, tokenizer.eos_token_id) if token is not None}))
