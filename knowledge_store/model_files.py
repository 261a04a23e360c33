"""Files of models: where they lie, and which may be loaded, checked before any library opens them.

safetensors and GGUF hold numbers alone. A pickle (.bin, .pt, .pth) is a program, and is not loaded even where a library would
take care while it runs it: what a folder's own index or configuration names counts as much as what lies in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from knowledge_store.errors import InputError

MAX_BYTES = 64 * 2**20  # of an index or a configuration
ADAPTER = "adapter_config.json"
# Each of these alone holds a vocabulary.
VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "tokenizer_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


# Templates that a tokenizer has beside its default one, by name.
TEMPLATE_FILES = "additional_chat_templates/*.jinja"


def check_folder_name(model: str) -> None:
    """Refuse what is no folder and has not the form of a hub id, OWNER/NAME; what has is left to `hub_folder`.

    Raises:
        InputError: there is no such folder.
    """
    folder = Path(model)
    if folder.exists():
        return
    # No folder here is called as the owner.
    local = folder.is_absolute() or model.startswith((".", "~")) or model.endswith("/") or len(folder.parts) != 2
    if local or folder.parent.is_dir():
        raise InputError(f"there is no folder {model}, and it cannot be a model of the hub, whose id has the form OWNER/NAME")


def hub_folder(model: str, gguf_file: str | None = None, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of the hub's cache that a hub id's files lie in, downloaded if need be: its configuration, its tokenizer, and
    its weights in safetensors or the one GGUF file. A model is checked and loaded there, as any folder is, and no pickle comes
    with it.

    Args:
        model: a hub id, such as OWNER/NAME, that is no folder.
        gguf_file: name of a GGUF file, instead of safetensors.
        revision: a branch, tag or commit; None for the main one.
        weights: whether safetensors are wanted too, or configuration and tokenizer alone.

    Raises:
        InputError: there is no such model, or it cannot be had.
    """
    check_folder_name(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    tensors = [gguf_file] if gguf_file else ["*.safetensors", "*.safetensors.index.json"] if weights else []
    patterns = ["config.json", "generation_config.json", ADAPTER, *tensors, *TOKENIZER_FILES, TEMPLATE_FILES, "*.model"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except RevisionNotFoundError:
        reason = f"the hub's model of that name has no revision {revision!r}: give one of its branches, tags or commits"
    except LocalEntryNotFoundError:
        reason = "the hub, which may have a model of that name, cannot be reached"
    except (RepositoryNotFoundError, HFValidationError):
        reason = "the hub has no model of that name that can be read from here"
    except Exception as error:  # the hub's client raises errors of many families
        reason = f"a model of that name could not be had from the hub ({type(error).__name__})"
    raise InputError(f"there is no folder {model}, and {reason}")


def check_gguf(folder: Path, name: str) -> None:
    """Make sure that a model's folder can be loaded from one GGUF file in it.

    Raises:
        InputError: there is no such file, it does not begin with GGUF's magic number, or the folder is an adapter to another
            model.
    """
    path = folder / name
    if not path.is_file():
        raise InputError(f"there is no GGUF file {path}")
    _check_adapter(folder)
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if magic != b"GGUF":
        raise InputError(f"{path} cannot be loaded: it is not a GGUF file")


def check_weights(folder: Path) -> None:
    """Make sure that what a model's folder would be loaded from is safetensors files in that folder.

    Raises:
        InputError: it is a pickle, lies elsewhere, or is an adapter to another model; names the file.
    """
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        pickle = f": {pickles[0]} is a pickle, which can run code, and is never loaded" if pickles else ""
        raise InputError(f"{folder} has no weights that can be used: weights must be safetensors or GGUF files{pickle}")
    _check_adapter(folder)
    configuration = read_configuration(folder)
    named = configuration.get("transformers_weights")
    for index in sorted(folder.glob("*.safetensors.index.json")):
        shards = _read(index).get("weight_map")
        if not isinstance(shards, dict):
            raise InputError(f"{index} does not say which file holds which weights")
        for name in shards.values():
            _check_name(folder, name, index)
    if named is not None:
        _check_name(folder, str(named).removesuffix(".index.json"), folder / "config.json")


def read_configuration(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """The configuration of a model's folder, as its file has it (InputError: it is missing, or no JSON object)."""
    return _read(folder / name)


@contextmanager
def silence() -> Iterator[None]:
    """Keep a library's bars and notices off standard error while the body runs; what fails is raised all the same."""
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        yield


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise RuntimeError where a library written in Rust panics: what that raises is, like Ctrl-C, no Exception."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise RuntimeError(str(error)) from None
        raise


def _check_adapter(folder: Path) -> None:
    if (folder / ADAPTER).is_file():
        raise InputError(
            f"{folder} is an adapter to a model that lies elsewhere: merge the two, and save that model, as `student-train init"
            f" --from {folder}` does with all layers in --keep-layers"
        )


def _check_name(folder: Path, name: Any, where: Path) -> None:
    if not isinstance(name, str) or not name.endswith(".safetensors"):
        raise InputError(f"{where} names weights in {name!r}: weights must be safetensors or GGUF files")
    if "/" in name or "\\" in name or (not where.name.startswith("config") and not (folder / name).is_file()):
        raise InputError(f"{where} names weights in {name!r}, which is no file of {folder}")


def _read(path: Path) -> dict[str, Any]:
    """A JSON object of a model's folder. InputError: it is not one."""
    try:
        with open(path, "rb") as file:
            record = json.loads(file.read(MAX_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be used: {error}") from None
    if not isinstance(record, dict):
        raise InputError(f"{path} cannot be used: it is not a JSON object")
    return record
