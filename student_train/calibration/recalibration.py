"""A calibration at work: the teacher's targets, put right while a student learns. `calibration` fits one from a store."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from knowledge_store import Manifest
from knowledge_store.calibration.file import Calibration, check_calibration, read_calibration
from knowledge_store.errors import InputError
from knowledge_store.kinds.positions import positions_of
from student_train.losses.divergences import Loss, Targets
from student_train.training.configuration import TrainConfig


def recalibrated(targets: Targets, calibration: Calibration) -> Targets:
    """Targets with the teacher's distribution at the calibration's temperature T in place of the one at 1.

    * method `temperature`: softmax of [candidates / T, `tail_logsumexp`], which is exactly softmax(z / T) of the teacher's
      own logits z, apart from the rounding of what is stored: log p = z − log Z, and Z drops out.
    * method `bucket-temperature`: softmax of [candidates / T, tail / T]; a token in the tail keeps its share of it.

    Draws from the tail serve temperature 1 and are dropped: the tail is a bucket.

    Args:
        targets: of N positions, at temperature 1, with `tail_logsumexp` at T for the method `temperature`.
        calibration: of a method with a temperature.

    Raises:
        ValueError: there is no `tail_logsumexp`, or the method has no temperature.
    """
    if calibration.method == "first":
        raise ValueError("a calibration of method first is for the loss first, as its c")
    temperature, own = calibration.temperature, calibration.method == "temperature"
    if own and targets.tail_logsumexp is None:
        raise ValueError("these targets keep no tail at another temperature")
    tail = targets.tail_logsumexp if own and targets.tail_logsumexp is not None else targets.tail_logprob / temperature
    scaled = torch.cat([targets.candidate_logprobs / temperature, tail.unsqueeze(-1)], dim=-1)
    logprobs = torch.log_softmax(scaled, dim=-1)
    candidates, tail_logprob = logprobs[:, :-1], logprobs[:, -1]
    found = (targets.candidate_ids == targets.token_ids.unsqueeze(-1)) & (targets.candidate_logprobs > -math.inf)
    if own:
        total = torch.logsumexp(scaled, dim=-1)
        outside = torch.minimum(targets.token_logprob / temperature - total, tail_logprob)
    else:
        share = (targets.token_logprob - targets.tail_logprob).clamp(max=0)  # rounding may put it a hair above
        outside = share + tail_logprob
    inside = torch.where(found, candidates, -math.inf).amax(dim=-1) if candidates.shape[-1] else outside
    return targets._replace(
        token_logprob=torch.where(found.any(dim=-1), inside, outside),
        candidate_logprobs=candidates,
        tail_logprob=tail_logprob,
        draw_ids=None,
        draw_weights=None,
        tail_logsumexp=None,
    )


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
    if config.calibration is None:
        return config, None, None
    path = Path(config.calibration)
    calibration = read_calibration(path)
    check_calibration(calibration, manifest.teacher, manifest.tokenizer)
    if calibration.method == "first":
        if config.loss != "first":
            raise InputError(f"{path} is a calibration of FIRST: it is for --loss first, not {config.loss}")
        if config.first_c != TrainConfig.first_c:
            raise InputError(f"give --first-c or --calibration, not both: {path} has a c of its own, {calibration.c:g}")
        return replace(config, first_c=calibration.c), None, calibration.sha256
    _check_temperature(config, manifest, loss, calibration, path)
    return config, partial(recalibrated, calibration=calibration), calibration.sha256


def _check_temperature(config: TrainConfig, manifest: Manifest, loss: Loss, calibration: Calibration, path: Path) -> None:
    """Raises InputError where targets cannot be brought to the calibration's temperature."""
    dump, kept, wanted = manifest.dump, positions_of(manifest).temperature, calibration.temperature
    if loss.whole_batch or "candidate_logprobs" not in loss.columns:
        raise InputError(f"the loss {config.loss} takes no --calibration: it does not learn from the teacher's probabilities")
    if config.loss == "first":
        raise InputError(f"{path} has a temperature; the loss first re-calibrates by its own c, which `--method first` fits")
    if not positions_of(manifest).selection.candidates:
        raise InputError(f"--calibration: the dump {dump} has no candidates, and draws serve temperature 1 alone")
    if config.tail == "draws":
        raise InputError("--tail draws serves temperature 1 alone: leave it out, and with --calibration the tail is a bucket")
    if calibration.method != "temperature":
        return
    if kept is None:
        raise InputError(
            f"{path} has a temperature of the whole distribution, and the dump {dump} keeps none: make it with"
            " `teacher-dump run --calibration`, or fit one to it with `student-train calibrate --method temperature`"
        )
    if not math.isclose(kept, wanted, rel_tol=1e-9):
        raise InputError(f"{path} has the temperature {wanted:g}, and the dump {dump} was made for {kept:g}")
