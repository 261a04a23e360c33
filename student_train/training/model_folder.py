"""Where a model lies, checked and hashed without loading it. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from knowledge_store.errors import InputError
from knowledge_store.model_files import check_folder_name, check_gguf

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # what configurations call their number


def check_model_folder(model: str, gguf_file: str | None) -> None:
    """Refuse a local folder that is missing or holds no model (InputError); what may be a hub id is left to `hub_folder`."""
    folder = Path(model)
    if folder.is_file():
        raise InputError(f"{model} is a file: give the model's folder (and --gguf-file for a GGUF file in it)")
    check_folder_name(model)
    if not folder.is_dir():
        return
    if gguf_file:
        check_gguf(folder, gguf_file)
    elif not (folder / "config.json").is_file():
        raise InputError(f"{model} is not a model folder: it has no config.json")


def stated_layers(model: str, gguf_file: str | None) -> int | None:
    """How many layers the configuration in a model's folder says it has; None where that is not plain without the library that
    loads it."""
    path = Path(model) / "config.json"
    if gguf_file or not path.is_file():
        return None
    try:
        settings = json.loads(path.read_bytes())
        settings = settings.get("text_config", settings)
        counts = {settings[name] for name in LAYER_COUNTS if isinstance(settings.get(name), int)}
    except (OSError, ValueError, AttributeError):
        return None  # loading the model says what is wrong with it
    return counts.pop() if len(counts) == 1 else None


def model_sha256(model: str) -> str:
    """SHA-256 over the names and contents of a model folder's configuration and weights; of a hub id, over the id."""
    digest = hashlib.sha256(b"" if Path(model).is_dir() else model.encode())
    for path in sorted(Path(model).glob("*")):
        if path.suffix in (".safetensors", ".gguf") or path.name == "config.json":
            with open(path, "rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
