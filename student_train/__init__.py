"""Train students from a knowledge store, without the teacher.

The names below are loaded when they are first used: importing this package costs nothing and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from knowledge_store.calibration.expected_calibration_error import (
        adaptive_calibration_error,
        expected_calibration_error,
        reliability,
    )
    from knowledge_store.calibration.temperature import fit_temperature
    from student_train.calibration.fit import StoreFit, calibrate
    from student_train.evaluation.bootstrap import bootstrap_calibration_error, bootstrap_interval
    from student_train.evaluation.configuration import EvaluateConfig
    from student_train.evaluation.metrics import (
        FullVocabularyCalibration,
        brier,
        full_vocabulary_calibration_error,
        negative_log_likelihood,
    )
    from student_train.evaluation.questions import Question, corpus_row, read_questions
    from student_train.evaluation.run import evaluate
    from student_train.losses.divergences import (
        adaptive_kl,
        conditional_kl,
        cross_entropy,
        first,
        forward_kl,
        jensen_shannon,
        label_smoothing,
        residual_to_gold,
        reverse_kl,
        skewed_kl,
        skewed_reverse_kl,
        top_k_renormalised,
        total_variation,
    )
    from student_train.losses.preference import dpo, pro, rrhf
    from student_train.losses.recalibration import recalibrated
    from student_train.losses.sliced import sliced_loss
    from student_train.losses.table import LOSSES, Loss
    from student_train.losses.targets import Targets, select_targets
    from student_train.losses.teachers import teachers_of
    from student_train.report.html import write_report
    from student_train.training.collator import DistillationCollator
    from student_train.training.configuration import TrainConfig
    from student_train.training.dataset import DistillationDataset
    from student_train.training.divergence import DivergenceError
    from student_train.training.initialisation import initialise
    from student_train.training.length_groups import LengthGroupSampler
    from student_train.training.mixin import DistillationMixin, DistillationTrainer
    from student_train.training.preferences import Preferences, preferences
    from student_train.training.run import TrainResult, train
    from student_train.training.split import split_ordinals
    from student_train.training.vocabulary import check_student

# Where each name is defined, one module a line.
_HOMES = {
    "knowledge_store.calibration.expected_calibration_error": (
        "adaptive_calibration_error expected_calibration_error reliability"
    ),
    "knowledge_store.calibration.temperature": "fit_temperature",
    "student_train.calibration.fit": "StoreFit calibrate",
    "student_train.evaluation.bootstrap": "bootstrap_calibration_error bootstrap_interval",
    "student_train.evaluation.configuration": "EvaluateConfig",
    "student_train.evaluation.metrics": (
        "FullVocabularyCalibration brier full_vocabulary_calibration_error negative_log_likelihood"
    ),
    "student_train.evaluation.questions": "Question corpus_row read_questions",
    "student_train.evaluation.run": "evaluate",
    "student_train.losses.divergences": (
        "adaptive_kl conditional_kl cross_entropy first forward_kl jensen_shannon label_smoothing residual_to_gold "
        "reverse_kl skewed_kl skewed_reverse_kl top_k_renormalised total_variation"
    ),
    "student_train.losses.preference": "dpo pro rrhf",
    "student_train.losses.recalibration": "recalibrated",
    "student_train.losses.sliced": "sliced_loss",
    "student_train.losses.table": "LOSSES Loss",
    "student_train.losses.targets": "Targets select_targets",
    "student_train.losses.teachers": "teachers_of",
    "student_train.report.html": "write_report",
    "student_train.training.configuration": "TrainConfig",
    "student_train.training.collator": "DistillationCollator",
    "student_train.training.dataset": "DistillationDataset",
    "student_train.training.divergence": "DivergenceError",
    "student_train.training.vocabulary": "check_student",
    "student_train.training.initialisation": "initialise",
    "student_train.training.mixin": "DistillationMixin DistillationTrainer",
    "student_train.training.preferences": "Preferences preferences",
    "student_train.training.run": "TrainResult train",
    "student_train.training.length_groups": "LengthGroupSampler",
    "student_train.training.split": "split_ordinals",
}

__all__ = [
    "LOSSES",
    "DistillationCollator",
    "DistillationDataset",
    "DistillationMixin",
    "DistillationTrainer",
    "DivergenceError",
    "EvaluateConfig",
    "FullVocabularyCalibration",
    "LengthGroupSampler",
    "Loss",
    "Preferences",
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
    "dpo",
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
    "preferences",
    "pro",
    "read_questions",
    "recalibrated",
    "reliability",
    "residual_to_gold",
    "reverse_kl",
    "rrhf",
    "select_targets",
    "skewed_kl",
    "skewed_reverse_kl",
    "sliced_loss",
    "split_ordinals",
    "teachers_of",
    "top_k_renormalised",
    "total_variation",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names.split():
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
