"""Where a model lies, checked and hashed without loading it. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from knowledge_store.errors import InputError
from knowledge_store.model_files import ADAPTER, check_folder_name, check_gguf

ADAPTER_WEIGHTS = "adapter_model.safetensors"
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # what configurations call their number
WIDTHS = ("hidden_size", "n_embd", "d_model")  # and the values of a hidden state


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
    elif (base := adapter_base(folder)) is not None:
        try:
            check_model_folder(base, None)
        except InputError as error:
            raise InputError(
                f"the base_model_name_or_path of {folder / ADAPTER} cannot be used: {error}; write there in which folder the"
                " adapter's base model lies now, or its hub id"
            ) from None
    elif not (folder / "config.json").is_file():
        if (folder / "run.json").is_file():
            raise InputError(
                f"{model} is a run that is not finished: run the same command again, or name one of its checkpoints"
            )
        raise InputError(f"{model} is not a model folder: it has no config.json")


def check_peft(wanted_by: str) -> None:
    """Raises InputError where peft is not installed, which something needs."""
    if find_spec("peft") is None:
        raise InputError(f"{wanted_by} needs peft: pip install 'knowledge-store[lora]'")


def check_adaptable(student: str) -> None:
    """Refuse a student that is an adapter itself (InputError): what is trained would name that as its base, and no adapter of
    an adapter is loaded."""
    folder = Path(student)
    if not (folder / ADAPTER).is_file() or (base := adapter_base(folder)) is None:
        return
    layers = stated_layers(base, None)
    numbers = ",".join(map(str, range(layers))) if layers is not None else "0,1,…"
    raise InputError(
        f"--lora-rank: {student} is an adapter itself, and no adapter of an adapter could be loaded: write both as one model"
        f" with `student-train init --from {student} --keep-layers {numbers} --output FOLDER`, and name that as the --student"
    )


def adapter_base(folder: Path) -> str | None:
    """The folder or hub id of the model that an adapter in a folder belongs to; None where the folder is no adapter's.

    Raises:
        InputError: it is no LoRA adapter, has no weights in safetensors, or names no model that can be its base.
    """
    path = folder / ADAPTER
    if not path.is_file():
        return None
    try:
        settings = json.loads(path.read_bytes())
        kind, base = settings["peft_type"], settings["base_model_name_or_path"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is not the configuration of an adapter: {error}") from None
    if kind != "LORA" or settings.get("megatron_config"):
        raise InputError(f"{folder} is an adapter of another kind than LoRA ({kind}): merge it into its model, and save that")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise InputError(f"{folder} is an adapter without {ADAPTER_WEIGHTS}: weights must be safetensors files")
    if not isinstance(base, str) or not base:
        raise InputError(f"{path} does not name the model that the adapter belongs to (base_model_name_or_path)")
    if (Path(base) / ADAPTER).is_file():
        raise InputError(f"{path} names {base}, which is an adapter itself: merge that into its model first")
    return base


def stated_layers(model: str, gguf_file: str | None) -> int | None:
    """How many layers the configuration in a model's folder says it has; None where that is not plain without the library that
    loads it."""
    return _stated(model, gguf_file, LAYER_COUNTS)


def stated_width(model: str, gguf_file: str | None) -> int | None:
    """The same of the values that a hidden state has."""
    return _stated(model, gguf_file, WIDTHS)


def _stated(model: str, gguf_file: str | None, names: Sequence[str]) -> int | None:
    path = Path(model) / "config.json"
    if gguf_file or not path.is_file():
        return None
    try:
        settings = json.loads(path.read_bytes())
        settings = settings.get("text_config", settings)
        numbers = {settings[name] for name in names if isinstance(settings.get(name), int)}
    except (OSError, ValueError, AttributeError):
        return None  # loading the model says what is wrong with it
    return numbers.pop() if len(numbers) == 1 else None


def model_sha256(model: str) -> str:
    """SHA-256 over the names and contents of a model folder's configuration and weights, of an adapter's base too; of a hub id,
    over the id."""
    folder = Path(model)
    digest = hashlib.sha256(b"" if folder.is_dir() else model.encode())
    for path in sorted(folder.glob("*")):
        if path.suffix in (".safetensors", ".gguf") or path.name in ("config.json", ADAPTER):
            with open(path, "rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    if (base := adapter_base(folder)) is not None:
        digest.update(model_sha256(base).encode())
    return digest.hexdigest()


def weights_sha256(model: str) -> str | None:
    """SHA-256 over the contents of a folder's safetensors files, whatever they are called; None of what is no folder here."""
    digests = []
    for path in Path(model).glob("*.safetensors"):
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest() if digests else None
