"""Files of model weights: which may be loaded, told before any library opens them.

safetensors and GGUF hold numbers alone. A pickle (.bin, .pt, .pth) is a program, and is not loaded even where a library would
take care while it runs it: what a folder's own index or configuration names counts as much as what lies in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from knowledge_store.errors import InputError

MOST_BYTES = 64 * 2**20  # of an index or a configuration


def check_gguf(path: Path) -> None:
    """Make sure that a file is a GGUF file by the magic number it begins with (InputError)."""
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
        found = f": {pickles[0]} is a pickle, which can run code, and is never loaded" if pickles else ""
        raise InputError(f"{folder} has no weights that can be used: weights must be safetensors or GGUF files{found}")
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder} is an adapter to a model that lies elsewhere: merge the two, and save that model")
    named = _read(folder / "config.json").get("transformers_weights")
    for index in sorted(folder.glob("*.safetensors.index.json")):
        shards = _read(index).get("weight_map")
        if not isinstance(shards, dict):
            raise InputError(f"{index} does not say which file holds which weights")
        for name in shards.values():
            _check_name(folder, name, index)
    if named is not None:
        _check_name(folder, str(named).removesuffix(".index.json"), folder / "config.json")


def _check_name(folder: Path, name: Any, where: Path) -> None:
    if not isinstance(name, str) or not name.endswith(".safetensors"):
        raise InputError(f"{where} names weights in {name!r}: weights must be safetensors or GGUF files")
    if "/" in name or "\\" in name or (not where.name.startswith("config") and not (folder / name).is_file()):
        raise InputError(f"{where} names weights in {name!r}, which is no file of {folder}")


def _read(path: Path) -> dict[str, Any]:
    """A JSON object of a model's folder. InputError: it is none."""
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(MOST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be used: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} cannot be used: it is not a JSON object")
    return found
