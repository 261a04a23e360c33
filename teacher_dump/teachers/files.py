"""The files of a teacher that is loaded from a folder, found and checked before torch is imported for them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from knowledge_store.errors import InputError
from knowledge_store.model_files import (
    ADAPTER,
    TEMPLATE_FILES,
    TOKENIZER_FILES,
    VOCABULARY_FILES,
    check_folder_name,
    check_gguf,
    check_weights,
    hub_folder,
    read_configuration,
)
from knowledge_store.reporter import SILENT, Reporter
from teacher_dump.fingerprints import file_sha256

# What configurations call how many positions a model knows, how many layers it has, and how wide these are.
MAX_POSITIONS = ("max_position_embeddings", "n_positions")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
WIDTH = ("hidden_size", "n_embd", "d_model")
# And how many experts a mixture of them has.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def check_local_teacher(teacher: str, gguf_file: str | None = None, revision: str | None = None) -> None:
    """Make sure that a teacher on this machine has the files it needs; a hub id is checked when it has been downloaded.

    Raises:
        InputError: it has not, or there is no such folder; says what is missing.
    """
    check_folder_name(teacher)
    if Path(teacher).exists():
        model_files(find_folder(teacher, gguf_file, revision), gguf_file)


def check_tokenizer(teacher: str, revision: str | None = None) -> None:
    """Make sure that the folder of a teacher that is run elsewhere has its configuration and its tokenizer.

    Raises:
        InputError: it has not, or there is no such folder; says what is missing.
    """
    check_folder_name(teacher)
    if Path(teacher).exists():
        folder = find_folder(teacher, None, revision)
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{folder} has no config.json: copy the configuration and the tokenizer of the model served into it"
            )
        _tokenizer_files(folder)


def stated_sizes(teacher: str, gguf_file: str | None = None) -> dict[str, int]:
    """`vocabulary_size`, `max_positions`, `layers` and `hidden_size` as the configuration of a teacher's folder states them.

    Empty of a hub id or a GGUF file, and without what is not stated (InputError: the configuration is no JSON object).
    """
    folder = Path(teacher)
    if gguf_file is not None or not folder.is_dir():
        return {}
    configuration = read_configuration(folder)
    text: dict[str, Any] = configuration.get("text_config") or configuration
    names = {"vocabulary_size": ("vocab_size",), "max_positions": MAX_POSITIONS, "layers": LAYERS, "hidden_size": WIDTH}
    sizes = {size: next((text[name] for name in known if name in text), None) for size, known in names.items()}
    return {size: value for size, value in sizes.items() if isinstance(value, int)}


def configured_ends(folder: Path) -> int | list[int] | None:
    """The tokens that end a text, as a teacher's folder states them: in the configuration of its generation, or else its own.

    Raises:
        InputError: one of the two is no JSON object.
    """
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file() and (ends := read_configuration(folder, name).get("eos_token_id")) is not None:
            found: int | list[int] = ends
            return found
    return None


def find_folder(teacher: str, gguf_file: str | None = None, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder that holds a teacher; a hub id is downloaded into the hub's cache (safetensors, or the one GGUF file).

    Args:
        teacher: a local folder or a hub id.
        gguf_file: name of a GGUF file in it.
        revision: of a hub id.
        weights: whether a hub's safetensors are wanted too.

    Raises:
        InputError: there is neither such a folder nor such a hub id, or a folder is given with a revision.
    """
    folder = Path(teacher)
    if folder.is_file():
        raise InputError(f"{teacher} is a file: name the teacher's folder (and a GGUF file in it with --gguf-file)")
    if not folder.is_dir():
        return hub_folder(teacher, gguf_file, revision, weights=weights)
    if revision is not None:
        raise InputError(f"--revision {revision} is of a hub id, and {teacher} is a folder: leave it out")
    return folder


def model_files(folder: Path, gguf_file: str | None) -> list[Path]:
    """The files that decide what a teacher answers, weights first.

    Raises:
        InputError: weights, configuration or tokenizer are missing, or the weights are of a kind that can run code.
    """
    if gguf_file is not None:
        check_gguf(folder, gguf_file)
        return [folder / gguf_file]
    weights = sorted(folder.glob("*.safetensors"))
    ggufs = ", ".join(sorted(path.name for path in folder.glob("*.gguf")))
    if not weights and ggufs:
        raise InputError(f"{folder} has no weights that can be used: it has {ggufs}; pass --gguf-file")
    if weights and not (folder / "config.json").is_file() and not (folder / ADAPTER).is_file():
        raise InputError(f"{folder} has no config.json")
    check_weights(folder)
    return [*weights, folder / "config.json", *_tokenizer_files(folder), *sorted(folder.glob(TEMPLATE_FILES))]


def _tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder's tokenizer (InputError: it has none)."""
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not any(path.name in VOCABULARY_FILES for path in files):
        raise InputError(f"{folder} has no tokenizer: save the teacher's tokenizer there too")
    return files


def file_hashes(folder: Path, files: Iterable[Path], *, reporter: Reporter = SILENT) -> dict[str, str]:
    """SHA-256 of each of a teacher's files by its name in the folder (see `fingerprints.file_sha256`)."""
    return {path.relative_to(folder).as_posix(): file_sha256(path, reporter=reporter) for path in files}
