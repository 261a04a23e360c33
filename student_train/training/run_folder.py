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
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from knowledge_store.model_files import check_weights
from knowledge_store.storage.naming import TEMPORARY_PREFIX
from student_train.training.configuration import TrainConfig
from student_train.training.mixture import Mixture
from student_train.training.model_folder import ADAPTER, ADAPTER_WEIGHTS, weights_sha256
from student_train.training.run_lock import LOCK_FILE, check_unlocked
from student_train.training.settings import settings_identity

Record = dict[str, Any]

RUN_FILE = "run.json"
BASE_WEIGHTS = "base_weights_sha256"  # in it, of the run of an adapter
HISTORY_FILE = "history.json"
COMPLETE_FILE = "complete.json"

_OTHER_LAUNCHERS = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"}

# What may change between an interrupted run and the one that resumes it.
_FREE = {"store", "token_file", "output", "report_to", "save_steps", "workers", "cache_size"}
# What is compared as what follows from it: the number of steps, and of sequences in a step, and the dumps.
_DERIVED = {"epochs", "steps", "batch_size", "gradient_accumulation", "dump", "teachers"}


def run_identity(
    config: TrainConfig,
    store: KnowledgeStore,
    mixture: Mixture,
    sequences_per_step: int,
    steps: int,
    student_sha256: str,
    calibration_sha256: str | None = None,
) -> dict[str, Any]:
    """What makes a run this run: two runs that differ in none of it end with the same weights."""
    facts = {name: value for name, value in asdict(config).items() if name not in _FREE | _DERIVED}
    dumps = (*mixture.dumps, *(dump for dump in (config.reference, config.scores) if dump is not None))
    return {
        **facts,
        "set": settings_identity(config.set),
        "calibration": calibration_sha256,
        "student's files": student_sha256,
        "number of steps": steps,
        "sequences per step": sequences_per_step,
        **mixture.identity,
        **{f"{name} of the dump {dump}": fact for dump in dumps for name, fact in _contents(store, dump).items()},
    }


def _contents(store: KnowledgeStore, dump: str) -> dict[str, Any]:
    knowledge = json.dumps(store.manifest(dump).identity(), sort_keys=True, default=str)
    return {
        "knowledge": hashlib.sha256(knowledge.encode()).hexdigest(),
        "committed sequences": store.sequence_count(dump),
        "snapshot": store.snapshot(dump),
    }


def check_folder(output: Path) -> Record:
    """What the run in a folder wrote of itself; empty where the folder is missing or free.

    Raises:
        InputError: the output is something else than the folder of a run.
    """
    if output.is_file():
        raise InputError(f"{output} is a file: choose another --output")
    # A run that was killed while it wrote its first file leaves that under a temporary name, and nothing else.
    if not output.is_dir() or all(path.name.startswith(TEMPORARY_PREFIX) for path in output.iterdir()):
        return {}
    record = read_run(output)
    if not record:
        raise InputError(f"{output} is not empty and holds no training run: choose another --output")
    return record


def check_output(output: Path, identity: dict[str, Any]) -> None:
    """Refuse an output that is something else, or a run of another configuration (InputError)."""
    if record := check_folder(output):
        _refuse_differences(output, record["identity"], identity)


def check_resume(config: TrainConfig, store: KnowledgeStore, mixture: Mixture, calibration_sha256: str | None) -> None:
    """Refuse an output that is something else, or a run of another configuration, as far as that shows at once: `check_output`
    compares the number of steps and the student's files too.

    Raises:
        InputError: it is, or another process is training into it; says what differs.
    """
    output = Path(config.output)
    check_unlocked(output)
    record = check_folder(output)
    if not record:
        return
    previous = record["identity"]
    known = run_identity(config, store, mixture, 0, config.steps or 0, "", calibration_sha256)
    # Launchers but torchrun say in other ways how many processes there are.
    processes = None if os.environ.keys() & _OTHER_LAUNCHERS else int(os.environ.get("WORLD_SIZE", 1))
    if processes and processes == record.get("world_size"):
        known["sequences per step"] = config.batch_size * config.gradient_accumulation * processes
    else:
        del known["sequences per step"]
    for name in ("student's files", *(() if config.steps else ("number of steps",))):
        del known[name]
    compared = {*known, *mixture.identity, "dumps", "teachers"}
    _refuse_differences(output, {name: fact for name, fact in previous.items() if name in compared}, known)


def _refuse_differences(output: Path, previous: dict[str, Any], identity: dict[str, Any]) -> None:
    # Of a dump that one of them does not read, it suffices that the names of the dumps differ.
    names = [name for name in identity.keys() | previous.keys() if previous.get(name) != identity.get(name)]
    differing = [
        f"{_label(name)} was {previous.get(name)} and is now {identity.get(name)}"
        for name in names
        if (name in previous and name in identity) or " of the dump " not in name
    ]
    if differing:
        raise InputError(f"{output} holds another run ({'; '.join(sorted(differing))}): choose another --output, or remove it")


def _label(name: str) -> str:
    options = TrainConfig.__dataclass_fields__
    return f"--{name.replace('_', '-')}" if name in options else name


class Checkpoint(NamedTuple):
    """Where a run can resume.

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


def _read_checkpoint(path: Path) -> Checkpoint:
    record = read_record(path, ("step", "seconds", "logged_at", "unlogged_loss"), "record of a checkpoint")
    return Checkpoint(folder=path.parent, **{name: record[name] for name in Checkpoint._fields if name != "folder"})


# Of these the library reads no program: never, or (the state of sharded weights and optimizers) tensors alone.
_READ_AS_TENSORS = ("training_args.bin", "optimizer.bin", "pytorch_model_fsdp.bin")


def last_checkpoint(output: Path) -> Checkpoint | None:
    """The last complete checkpoint.

    Raises:
        InputError: it would not be loaded from safetensors files alone.
    """
    last = max((_read_checkpoint(path) for path in output.glob(f"checkpoint-*/{COMPLETE_FILE}")), default=None)
    # Without this file the trainer takes a pickle instead, before safetensors in several files.
    if last and not (last.folder / "model.safetensors").is_file():
        pickles = sorted(path.name for path in last.folder.glob("*.bin*") if path.name not in _READ_AS_TENSORS)
        if pickles:
            raise InputError(
                f"{last.folder} has {pickles[0]} instead of model.safetensors: a pickle can run code, and is never loaded."
                " Remove that folder, and the run resumes from the checkpoint before it"
            )
        if not (last.folder / ADAPTER_WEIGHTS).is_file():
            check_weights(last.folder)
    return last


def tidy_output(output: Path) -> None:
    """Remove checkpoints that were never completed and files that were never finished; the folder's lock must be held."""
    for folder in output.glob("checkpoint-*"):
        if not (folder / COMPLETE_FILE).exists():
            shutil.rmtree(folder)
    for path in output.glob(f"{TEMPORARY_PREFIX}*"):
        if path.name != LOCK_FILE:
            path.unlink()


def read_run(folder: Path) -> Record:
    """What a run wrote of itself before its first step; empty when it wrote nothing. Raises InputError."""
    return read_record(folder / RUN_FILE, ("identity", "config"), "record of a training run")


def learnt_from(model: str, store: KnowledgeStore, dump: str) -> bool:
    """Whether a model, or a checkpoint, is that of a run which learnt from a dump, or from one of the same knowledge."""
    folder = Path(model)
    identity = _known(folder if (folder / RUN_FILE).exists() else folder.absolute().parent).get("identity", {})
    learnt = (value for name, value in identity.items() if name.startswith("knowledge of the dump "))
    return _contents(store, dump)["knowledge"] in learnt


def check_base(folder: Path, base: str) -> None:
    """Refuse the adapter of a run whose base has other weights than when it was trained (InputError)."""
    trained = _known(folder).get(BASE_WEIGHTS)
    if trained is not None and (now := weights_sha256(base)) is not None and trained != now:
        raise InputError(
            f"the adapter in {folder} belongs to other weights than {base} has now ({RUN_FILE} has their SHA-256): bring those"
            f" back, or write in {folder / ADAPTER} where they lie"
        )


def _known(folder: Path) -> Record:
    """What a run wrote of itself; empty where that is nothing, or of another program."""
    try:
        return read_run(folder)
    except InputError:
        return {}


def read_history(folder: Path) -> Record:
    """A run's losses so far; empty before the first log. Raises InputError."""
    return read_record(folder / HISTORY_FILE, ("finished", "seconds", "entries"), "history of a training run")


def read_record(path: Path, names: Sequence[str], description: str) -> Record:
    """The object in a JSON file, which has these keys; empty when there is no such file.

    Raises:
        InputError: it cannot be read, or holds something else than such an object; names the file.
    """
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a JSON file: {error}") from None
    missing = names if not isinstance(record, dict) else [name for name in names if name not in record]
    if missing:
        raise InputError(f"{path} is not the {description}: it has no {missing[0]!r}")
    return record


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a JSON file in one go: a reader sees the old one or the new one. Numbers that are not finite become null."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}")
    temporary.write_text(_json_text(record, "\n") + "\n")
    temporary.replace(path)


def _json_text(value: Any, line: str) -> str:
    """JSON with a line for each key and a line for each list of plain values, however long."""
    inner = f"{line} "
    if isinstance(value, dict) and value:
        items = [f"{json.dumps(key)}: {_json_text(item, inner)}" for key, item in value.items()]
        return "{" + inner + f",{inner}".join(items) + line + "}"
    if isinstance(value, list | tuple) and any(isinstance(item, dict | list | tuple) for item in value):
        return "[" + inner + f",{inner}".join(_json_text(item, inner) for item in value) + line + "]"
    if isinstance(value, list | tuple):
        value = [_finite(item) for item in value]
    return json.dumps(_finite(value), default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """Of what results depend on."""
    names = ("torch", "transformers", "accelerate", "pyarrow", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}
