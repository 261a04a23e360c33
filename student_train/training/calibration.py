"""What a run's `--calibration` changes: the configuration, or the teacher's targets, which the kind `positions` keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from knowledge_store import Manifest
from knowledge_store.calibration.file import Calibration, check_calibration, read_calibration
from knowledge_store.errors import InputError
from knowledge_store.kinds.positions import positions_of
from student_train.losses.table import Loss
from student_train.training.configuration import TrainConfig

if TYPE_CHECKING:
    from student_train.losses.targets import Targets


def configured(
    config: TrainConfig, manifest: Manifest, loss: Loss
) -> tuple[TrainConfig, Callable[[Targets], Targets] | None, str | None]:
    """What a run's `--calibration` comes to.

    Returns:
        the configuration, with FIRST's c from the file where it is of that method; what to make of targets (None: leave them
        as they are); the calibration's SHA-256 (None without one).

    Raises:
        InputError: the calibration cannot be used on this dump, or with this loss; says why.
    """
    calibration = usable_calibration(config, manifest, loss)
    if calibration is None:
        return config, None, None
    if calibration.method == "first":
        return with_scale(config, calibration), None, calibration.sha256
    from student_train.losses.recalibration import recalibrated

    return config, partial(recalibrated, calibration=calibration), calibration.sha256


def with_scale(config: TrainConfig, calibration: Calibration | None) -> TrainConfig:
    """The configuration, with FIRST's c from a calibration of that method."""
    return replace(config, first_c=calibration.c) if calibration and calibration.method == "first" else config


def usable_calibration(config: TrainConfig, manifest: Manifest, loss: Loss) -> Calibration | None:
    """The calibration of a run's `--calibration`; None without one. Imports no torch.

    Raises:
        InputError: it cannot be used on this dump, or with this loss; says why.
    """
    if config.calibration is None:
        return None
    path = Path(config.calibration)
    calibration = read_calibration(path)
    check_calibration(calibration, manifest.teacher, manifest.tokenizer)
    if calibration.method != "first":
        _check_temperature(config, manifest, loss, calibration, path)
    elif config.loss != "first":
        raise InputError(f"{path} is a calibration of FIRST: it is for --loss first, not {config.loss}")
    elif config.first_c != TrainConfig.first_c:
        raise InputError(f"give --first-c or --calibration, not both: {path} has a c of its own, {calibration.c:g}")
    return calibration


def _check_temperature(config: TrainConfig, manifest: Manifest, loss: Loss, calibration: Calibration, path: Path) -> None:
    """Raises InputError where targets cannot be brought to the calibration's temperature."""
    dump, kept, temperature = manifest.dump, positions_of(manifest).temperature, calibration.temperature
    if config.loss == "first":
        raise InputError(f"{path} has a temperature; the loss first re-calibrates by its own c, which `--method first` fits")
    if loss.whole_batch or not loss.recalibrated:
        raise InputError(f"the loss {config.loss} takes no --calibration: it does not learn from the teacher's probabilities")
    if not positions_of(manifest).selection.candidates:
        raise InputError(f"--calibration: the dump {dump} has no candidates, and draws work at temperature 1 only")
    if config.tail == "draws":
        raise InputError(
            "--tail draws works at temperature 1 only: leave it out, since the tail is a bucket with --calibration"
        )
    if calibration.method != "temperature":
        return
    if kept is None:
        raise InputError(
            f"{path} has a temperature of the whole distribution, and the dump {dump} keeps none: make it with"
            " `teacher-dump run --calibration`, or fit one to it with `student-train calibrate --method temperature`"
        )
    if not math.isclose(kept, temperature, rel_tol=1e-9):
        raise InputError(f"{path} has the temperature {temperature:g}, and the dump {dump} was made for {kept:g}")
