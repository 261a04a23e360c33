"""Train students from a knowledge store, without the teacher.

The names below are loaded when they are first used: importing this package costs nothing and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from student_train.calibration import StoreFit, calibrate
    from student_train.configuration import TrainConfig
    from student_train.data import DistillationDataset, check_student, split_ordinals
    from student_train.evaluation import EvaluateConfig, evaluate
    from student_train.initialisation import initialise
    from student_train.losses import (
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
    from student_train.metrics import (
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
    from student_train.questions import Question, corpus_row, read_questions
    from student_train.recalibration import recalibrated
    from student_train.report import write_report
    from student_train.slices import sliced_loss
    from student_train.training import TrainResult, train

_HOMES = {
    "calibration": ("StoreFit", "calibrate"),
    "configuration": ("TrainConfig",),
    "data": ("DistillationDataset", "check_student", "split_ordinals"),
    "evaluation": ("EvaluateConfig", "evaluate"),
    "initialisation": ("initialise",),
    "losses": (
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
    "metrics": (
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
    "questions": ("Question", "corpus_row", "read_questions"),
    "recalibration": ("recalibrated",),
    "report": ("write_report",),
    "slices": ("sliced_loss",),
    "training": ("TrainResult", "train"),
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
