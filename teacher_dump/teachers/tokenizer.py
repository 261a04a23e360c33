"""What is known of a teacher before its weights are loaded: its tokenizer, and how many positions it knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from knowledge_store.errors import InputError
from knowledge_store.model_files import panics_as_errors, silence
from teacher_dump.teachers.files import find_folder


def load_tokenizer(teacher: str, gguf_file: str | None = None, *, weights: bool = True) -> PreTrainedTokenizerBase:
    """Load a teacher's tokenizer alone.

    Args:
        teacher: a local folder or a hub id.
        gguf_file: name of a GGUF file in it.
        weights: whether the weights of a hub id are going to be needed too, and are downloaded with it.

    Raises:
        InputError: there is no such teacher, or its tokenizer cannot be used; says why.
    """
    folder = find_folder(teacher, gguf_file, weights)
    try:
        with silence(), panics_as_errors():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **_source(gguf_file))
    except Exception as error:  # a broken folder fails in many ways, all of them the folder's
        raise _refusal("tokenizer", folder, error) from None


def known_positions(teacher: str, gguf_file: str | None = None) -> int | None:
    """How many positions a teacher's configuration says that it knows; None where it does not say.

    Raises:
        InputError: there is no such teacher, or its configuration cannot be used; says why.
    """
    folder = find_folder(teacher, gguf_file)
    try:
        with silence(), panics_as_errors():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **_source(gguf_file))
            return getattr(config.get_text_config(), "max_position_embeddings", None)
    except Exception as error:
        raise _refusal("configuration", folder, error) from None


def _source(gguf_file: str | None) -> dict[str, Any]:
    return {"gguf_file": gguf_file} if gguf_file else {}


def _refusal(part: str, folder: Path, error: Exception) -> InputError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return InputError(f"the teacher in {folder} cannot be loaded: {reason} (its {part})")
