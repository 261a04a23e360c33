"""Where a model lies, checked and hashed without loading it. Imports no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

from knowledge_store.errors import InputError
from knowledge_store.model_files import check_folder_name, check_gguf


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


def model_sha256(model: str) -> str:
    """SHA-256 over the names and contents of a model folder's configuration and weights; of a hub id, over the id."""
    digest = hashlib.sha256(b"" if Path(model).is_dir() else model.encode())
    for path in sorted(Path(model).glob("*")):
        if path.suffix in (".safetensors", ".gguf") or path.name == "config.json":
            with open(path, "rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
