"""Train students from a knowledge store, without the teacher.

The names below are loaded when they are first used: importing this package costs nothing and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from student_train.calibration.fit import StoreFit, calibrate
    from student_train.calibration.recalibration import recalibrated
    from student_train.evaluation.metrics import (
        FullVocabularyCalibration,
        adaptive_calibration_error,
        bootstrap_calibration_error,
        bootstrap_interval,
        brier,
        expected_calibration_error,
        fit_temperature,
        full_vocabulary_calibration_error,
        negative_log_likelihood,
        reliability,
    )
    from student_train.evaluation.questions import Question, corpus_row, read_questions
    from student_train.evaluation.run import EvaluateConfig, evaluate
    from student_train.losses.divergences import (
        LOSSES,
        Loss,
        Targets,
        adaptive_kl,
        conditional_kl,
        cross_entropy,
        first,
        forward_kl,
        jensen_shannon,
        label_smoothing,
        residual_to_gold,
        reverse_kl,
        select_targets,
        skewed_kl,
        skewed_reverse_kl,
        top_k_renormalised,
        total_variation,
    )
    from student_train.losses.sliced import sliced_loss
    from student_train.report.report import write_report
    from student_train.training.configuration import TrainConfig
    from student_train.training.data import DistillationDataset, check_student, split_ordinals
    from student_train.training.initialisation import initialise
    from student_train.training.run import TrainResult, train

_HOMES = {
    "calibration.fit": ("StoreFit", "calibrate"),
    "training.configuration": ("TrainConfig",),
    "training.data": ("DistillationDataset", "check_student", "split_ordinals"),
    "evaluation.run": ("EvaluateConfig", "evaluate"),
    "training.initialisation": ("initialise",),
    "losses.divergences": (
        "LOSSES",
        "Loss",
        "Targets",
        "adaptive_kl",
        "conditional_kl",
        "cross_entropy",
        "first",
        "forward_kl",
        "jensen_shannon",
        "label_smoothing",
        "residual_to_gold",
        "reverse_kl",
        "select_targets",
        "skewed_kl",
        "skewed_reverse_kl",
        "top_k_renormalised",
        "total_variation",
    ),
    "evaluation.metrics": (
        "FullVocabularyCalibration",
        "adaptive_calibration_error",
        "bootstrap_calibration_error",
        "bootstrap_interval",
        "brier",
        "expected_calibration_error",
        "fit_temperature",
        "full_vocabulary_calibration_error",
        "negative_log_likelihood",
        "reliability",
    ),
    "evaluation.questions": ("Question", "corpus_row", "read_questions"),
    "calibration.recalibration": ("recalibrated",),
    "report.report": ("write_report",),
    "losses.sliced": ("sliced_loss",),
    "training.run": ("TrainResult", "train"),
}

__all__ = [
    "LOSSES",
    "DistillationDataset",
    "EvaluateConfig",
    "FullVocabularyCalibration",
    "Loss",
    "Question",
    "StoreFit",
    "Targets",
    "TrainConfig",
    "TrainResult",
    "adaptive_calibration_error",
    "adaptive_kl",
    "bootstrap_calibration_error",
    "bootstrap_interval",
    "brier",
    "calibrate",
    "check_student",
    "conditional_kl",
    "corpus_row",
    "cross_entropy",
    "evaluate",
    "expected_calibration_error",
    "first",
    "fit_temperature",
    "forward_kl",
    "full_vocabulary_calibration_error",
    "initialise",
    "jensen_shannon",
    "label_smoothing",
    "negative_log_likelihood",
    "read_questions",
    "recalibrated",
    "reliability",
    "residual_to_gold",
    "reverse_kl",
    "select_targets",
    "skewed_kl",
    "skewed_reverse_kl",
    "sliced_loss",
    "split_ordinals",
    "top_k_renormalised",
    "total_variation",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
