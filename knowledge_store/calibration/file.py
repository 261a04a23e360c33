"""A calibration: how an over-confident or under-confident teacher is corrected.

    temperature          T of the whole distribution, softmax(z / T); `teacher-dump calibrate` fits it, before a dump is made
    first                c of FIRST, softmax(P / c) over the candidates' probabilities (Shum et al. 2024, arXiv 2408.12168)
    bucket-temperature   T of the candidates and of the tail as one more symbol

The last two are fitted from a dump alone, by `student-train calibrate`. A calibration is a sealed JSON file that says which
teacher and tokenizer it belongs to, what it was fitted on, and what it changes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from knowledge_store.errors import DamageError, InputError, KnowledgeStoreError
from knowledge_store.format.records import MAX_BYTES, check_shape, json_sha256, read_record, seal
from knowledge_store.storage import open_storage
from knowledge_store.storage.local import replace_bytes

FORMAT = "knowledge-store-calibration"
VERSION = 1
METHODS = ("temperature", "first", "bucket-temperature")

_FIGURES = {"nll": int | float, "ece_10": int | float, "ece_15": int | float, "brier": int | float}
_SHAPE = {
    "method": str,
    "teacher": {"name": str, "files": {...: str}},
    "tokenizer": {"vocabulary_sha256": str},
    "fitted_on": {},
    "targets": int,
    "uncovered": int,
    "before": _FIGURES,
    "after": _FIGURES,
    "grid": [[int | float]],
}


@dataclass(frozen=True)
class Calibration:
    """What was fitted, to what, and what it changes.

    Attributes:
        method: one of `METHODS`.
        value: T, or FIRST's c.
        teacher, tokenizer: whose it is, as a dump's manifest describes them.
        fitted_on: corpus files with their SHA-256; of a dump also its name and the split, `column` and `value`.
        targets: how many positions it was fitted on.
        before, after: `nll` (nats per target), `ece_10`, `ece_15` (calibration error with 10 and 15 equal-width bins) and
            `brier`, of the teacher as it is and re-calibrated. Of `temperature` they are over the whole vocabulary; of the
            others, `brier` is over the candidates and everything else as one more class.
        uncovered: of `first`, the targets whose token is not among the candidates and has no probability; `nll` leaves
            them out.
        grid: what was tried and how it did, as [value, figure]: of `first`, `ece_10`, which is what it is fitted by.
    """

    method: str
    value: float
    teacher: dict[str, Any]
    tokenizer: dict[str, Any]
    fitted_on: dict[str, Any]
    targets: int
    before: dict[str, float]
    after: dict[str, float]
    uncovered: int = 0
    grid: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"there is no calibration method {self.method!r}: it is one of {', '.join(METHODS)}")
        if not 0 < self.value < float("inf") or (self.method == "first" and self.value > 1):
            raise InputError(f"a calibration of method {self.method} cannot have the value {self.value}")

    @property
    def temperature(self) -> float:
        """T. InputError: the method has none."""
        if self.method == "first":
            raise InputError("a calibration of method first has a c, and no temperature")
        return self.value

    @property
    def c(self) -> float:
        """FIRST's c. InputError: the method has none."""
        if self.method != "first":
            raise InputError(f"a calibration of method {self.method} has a temperature, and no c")
        return self.value

    def _record(self) -> dict[str, Any]:
        record = asdict(self)
        del record["value"]
        name = "c" if self.method == "first" else "temperature"
        grid = [list(pair) for pair in self.grid]
        return {"format": FORMAT, "version": VERSION, "method": self.method, name: self.value, **record, "grid": grid}

    @property
    def sha256(self) -> str:
        """Stands for everything in the file: the seal that it carries."""
        return json_sha256(self._record())

    def to_bytes(self) -> bytes:
        """The calibration as the bytes of its file."""
        return seal(self._record())

    def to_manifest(self) -> dict[str, Any]:
        """What the manifest of a dump made with it records.

        Raises:
            InputError: it cannot be used before a dump, only after it.
        """
        if self.method != "temperature":
            raise InputError(
                f"a dump is calibrated with a temperature of the whole distribution, and this calibration is of method"
                f" {self.method}, which students take from the dump alone: `teacher-dump calibrate` makes the other"
            )
        return {"temperature": self.temperature, "sha256": self.sha256}


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write a calibration's file, in place of an older one.

    Raises:
        InputError: it cannot be written.
    """
    try:
        replace_bytes(path, calibration.to_bytes())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def check_output(path: Path) -> None:
    """Make sure, before anything is fitted, that a calibration can be written to `path`.

    Raises:
        InputError: its folder is not there, or something that is no calibration has that name.
    """
    if not path.parent.is_dir():
        raise InputError(f"--output {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise InputError(f"--output {path} is a folder: name a file")
    if path.exists():
        try:
            read_calibration(path)
        except KnowledgeStoreError:
            raise InputError(f"--output {path} is there and is no calibration: name another file, or remove it") from None


def read_calibration(path: Path) -> Calibration:
    """Read a calibration's file.

    Raises:
        InputError: there is no such file, or it is something else, or of a newer version.
        DamageError: it was altered.
    """
    if not path.is_file():
        raise InputError(f"there is no calibration file {path}")
    # Other files, such as a corpus, are not damaged: they are something else.
    if (
        FORMAT.encode() not in _beginning(path)
        or (record := read_record(open_storage(path.parent), path.name)).get("format") != FORMAT
    ):
        raise InputError(f"{path} is not a calibration: `teacher-dump calibrate` and `student-train calibrate` make them")
    version = record.get("version")
    if version != VERSION:
        raise InputError(f"{path} has format version {version}, and this is knowledge-store for version {VERSION}")
    try:
        check_shape(record, _SHAPE, "a calibration")
        value = "c" if record["method"] == "first" else "temperature"
        check_shape(record, {value: int | float}, "a calibration")
        if any(len(pair) != 2 for pair in record["grid"]):
            raise ValueError("its grid is not made of pairs")
        names = ("method", "teacher", "tokenizer", "fitted_on", "targets", "before", "after", "uncovered")
        fields = {name: record[name] for name in names}
        grid = tuple((float(tried), float(figure)) for tried, figure in record["grid"])
        return Calibration(value=float(record[value]), grid=grid, **fields)
    except (ValueError, InputError) as error:
        raise DamageError(f"{path} is damaged: {error}") from None


def _beginning(path: Path) -> bytes:
    """All of a record's file, and no more of another's. InputError: it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(MAX_BYTES)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def check_calibration(calibration: Calibration, teacher: dict[str, Any], tokenizer: dict[str, Any]) -> None:
    """Make sure that a calibration belongs to a teacher.

    Args:
        calibration: the calibration.
        teacher, tokenizer: as a dump's manifest describes them.

    Raises:
        InputError: the weights it was fitted to are others, or the vocabulary is.
    """
    fitted, name = calibration.teacher.get("name"), teacher.get("name")
    if _weights(calibration.teacher) != _weights(teacher):
        raise InputError(
            f"the calibration belongs to another teacher: it was fitted to {fitted!r}, whose weights are not those of {name!r}."
            " Fit one to this teacher"
        )
    if calibration.tokenizer.get("vocabulary_sha256") != tokenizer.get("vocabulary_sha256"):
        raise InputError(
            f"the calibration belongs to another tokenizer: it was fitted to {fitted!r} with a vocabulary that is not that of"
            f" {name!r}. Fit one to this teacher"
        )


def _weights(teacher: dict[str, Any]) -> list[str]:
    """The hashes of a teacher's weights, which may lie in files of any name."""
    return sorted(sha256 for name, sha256 in teacher.get("files", {}).items() if name.endswith((".safetensors", ".gguf")))
