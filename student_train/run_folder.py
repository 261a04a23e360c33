"""A run's folder: what makes a run this run, where it stands, and what it has measured.

    run.json         the configuration and what it was used on, written before the first step
    history.json     losses by step and second, and whether the run is finished
    checkpoint-N/    the last two, while the run is not finished; complete when `complete.json` stands in them

Once finished the folder is a model that `from_pretrained` loads.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from knowledge_store.publication import TEMPORARY_PREFIX
from knowledge_store.weights import check_weights
from student_train.configuration import TrainConfig

RUN_FILE = "run.json"
HISTORY_FILE = "history.json"
COMPLETE_FILE = "complete.json"

# What may change between an interrupted run and the one that goes on with it.
_FREE = {"store", "output", "report_to", "save_steps", "workers", "cache_size"}
# What is compared as what follows from it: the number of steps, and of sequences in a step.
_DERIVED = {"epochs", "steps", "batch_size", "gradient_accumulation"}


def run_identity(
    config: TrainConfig,
    store: KnowledgeStore,
    dump: str,
    sequences_per_step: int,
    steps: int,
    calibration_sha256: str | None = None,
) -> dict[str, Any]:
    """What makes a run this run: two runs that differ in none of it end with the same weights."""
    facts = {name: value for name, value in asdict(config).items() if name not in _FREE | _DERIVED}
    knowledge = json.dumps(store.manifest(dump).identity(), sort_keys=True, default=str)
    return {
        **facts,
        "calibration": calibration_sha256,
        "dump": dump,
        "student's files": model_sha256(config.student),
        "number of steps": steps,
        "sequences per step": sequences_per_step,
        "knowledge": hashlib.sha256(knowledge.encode()).hexdigest(),
        "committed sequences": store.sequence_count(dump),
        "snapshot of the dump": store.snapshot(dump),
    }


def model_sha256(model: str) -> str:
    """SHA-256 over the names and contents of a model folder's configuration and weights; of a hub id, over the id."""
    digest = hashlib.sha256(b"" if Path(model).is_dir() else model.encode())
    for path in sorted(Path(model).glob("*")):
        if path.suffix in (".safetensors", ".gguf") or path.name == "config.json":
            with open(path, "rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def check_output(output: Path, identity: dict[str, Any]) -> None:
    """Refuse an output that is something else, or a run of another configuration."""
    if output.is_file():
        raise InputError(f"{output} is a file: choose another --output")
    # A run that was killed while it wrote its first file leaves that under a temporary name, and nothing else.
    if not output.is_dir() or all(path.name.startswith(TEMPORARY_PREFIX) for path in output.iterdir()):
        return
    try:
        before = json.loads((output / RUN_FILE).read_text())["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{output} is not empty and holds no training run: choose another --output") from None
    differing = [
        f"{_label(name)} was {before.get(name)} and is now {identity.get(name)}"
        for name in identity.keys() | before.keys()
        if before.get(name) != identity.get(name)
    ]
    if differing:
        raise InputError(f"{output} holds another run ({'; '.join(sorted(differing))}): choose another --output, or remove it")


def _label(name: str) -> str:
    options = TrainConfig.__dataclass_fields__
    return f"--{name.replace('_', '-')}" if name in options else name


def last_checkpoint(output: Path) -> tuple[int, Path, float] | None:
    """Step, folder and seconds of the last complete checkpoint.

    Raises:
        InputError: it would not be loaded from safetensors files alone.
    """
    found = []
    for path in output.glob(f"checkpoint-*/{COMPLETE_FILE}"):
        # One that cannot be read is not complete.
        with suppress(OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
            record = json.loads(path.read_text())
            found.append((int(record["step"]), path.parent, float(record["seconds"])))
    last = max(found, default=None)
    # Without this file the trainer takes a pickle instead, before safetensors in several files.
    if last and not (last[1] / "model.safetensors").is_file():
        pickles = sorted(path.name for path in last[1].glob("*.bin*") if path.name != "training_args.bin")
        if pickles:
            raise InputError(
                f"{last[1]} has {pickles[0]} instead of model.safetensors: a pickle can run code, and is never loaded."
                " Remove that folder, and the run goes on from what was kept before it"
            )
        check_weights(last[1])
    return last


def prepare_output(output: Path, checkpoint: tuple[int, Path, float] | None) -> None:
    """Make the folder, and remove checkpoints that were never completed and files that were never finished."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create {output}: {error.strerror}") from error
    for folder in output.glob("checkpoint-*"):
        if not (folder / COMPLETE_FILE).exists():
            shutil.rmtree(folder)
    for path in output.glob(f"{TEMPORARY_PREFIX}*"):
        path.unlink()


def read_history(output: Path) -> dict[str, Any]:
    """A run's history.json; empty before the first log."""
    try:
        return dict(json.loads((output / HISTORY_FILE).read_text()))
    except (OSError, ValueError):
        return {}


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a JSON file in one go: a reader sees the old one or the new one."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}")
    temporary.write_text(_json_text(record, "\n") + "\n")
    temporary.replace(path)


def _json_text(value: Any, line: str) -> str:
    """JSON with a line for each key and a line for each list of plain values, however long."""
    inner = f"{line} "
    if isinstance(value, dict) and value:
        items = [f"{json.dumps(key)}: {_json_text(each, inner)}" for key, each in value.items()]
        return "{" + inner + f",{inner}".join(items) + line + "}"
    if isinstance(value, list | tuple) and any(isinstance(each, dict | list | tuple) for each in value):
        return "[" + inner + f",{inner}".join(_json_text(each, inner) for each in value) + line + "]"
    return json.dumps(value, default=str)


def versions() -> dict[str, str]:
    """Of what results depend on."""
    names = ("torch", "transformers", "accelerate", "pyarrow", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}
