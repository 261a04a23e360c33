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
import math
import os
import platform
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from knowledge_store.format.records import check_shape
from knowledge_store.model_files import check_weights
from knowledge_store.storage.local import TEMPORARY_PREFIX
from student_train.evaluation.results import RUN_FILE, printable, read_object
from student_train.training.configuration import TrainConfig

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
    record = read_object(output / RUN_FILE)
    if record is None or not isinstance(before := record.get("identity"), dict):
        raise InputError(f"{output} is not empty and holds no training run: choose another --output")
    differing = [
        f"{_label(name)} was {before.get(name)} and is now {identity.get(name)}"
        for name in identity.keys() | before.keys()
        if before.get(name) != identity.get(name)
    ]
    if differing:
        found = printable("; ".join(sorted(differing)))
        raise InputError(f"{output} holds another run ({found}): choose another --output, or remove it")


def _label(name: str) -> str:
    options = TrainConfig.__dataclass_fields__
    return f"--{name.replace('_', '-')}" if name in options else name


class Checkpoint(NamedTuple):
    """Where a run can go on.

    Attributes:
        step: after which it was written.
        folder: where it is.
        seconds: that the run had taken.
        logged_at: the step of the last logged loss before it.
        unlogged_loss: sum of the losses of the steps since.
    """

    step: int
    folder: Path
    seconds: float
    logged_at: int
    unlogged_loss: float

    def write(self) -> None:
        """Make it complete."""
        write_json(self.folder / COMPLETE_FILE, {name: getattr(self, name) for name in self._fields if name != "folder"})


def _read_checkpoint(path: Path) -> Checkpoint | None:
    """None: its record cannot be read, so it is not complete."""
    with suppress(InputError, ValueError):
        record = {"unlogged_loss": 0.0, **(read_object(path) or {})}
        check_shape(record, {"step": int, "seconds": int | float, "unlogged_loss": int | float})
        record.setdefault("logged_at", record["step"])  # earlier versions kept neither of the two
        check_shape(record, {"logged_at": int})
        if 0 <= record["logged_at"] <= record["step"] and 0 <= record["seconds"] < math.inf:
            return Checkpoint(folder=path.parent, **{name: record[name] for name in Checkpoint._fields if name != "folder"})
    return None


def last_checkpoint(output: Path) -> Checkpoint | None:
    """The last complete checkpoint.

    Raises:
        InputError: it would not be loaded from safetensors files alone.
    """
    found = [_read_checkpoint(path) for path in output.glob(f"checkpoint-*/{COMPLETE_FILE}")]
    last = max((each for each in found if each), default=None)
    # Without this file the trainer takes a pickle instead, before safetensors in several files.
    if last and not (last.folder / "model.safetensors").is_file():
        pickles = sorted(path.name for path in last.folder.glob("*.bin*") if path.name != "training_args.bin")
        if pickles:
            raise InputError(
                f"{last.folder} has {pickles[0]} instead of model.safetensors: a pickle can run code, and is never loaded."
                " Remove that folder, and the run goes on from what was kept before it"
            )
        check_weights(last.folder)
    return last


def prepare_output(output: Path, checkpoint: Checkpoint | None) -> None:
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
