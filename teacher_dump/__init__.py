"""Runs a teacher once over a corpus and keeps what it knew in a knowledge store.

`dump(config, rank, world_size)` is the whole contract; any engine that can call a function with two integers can run it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teacher_dump.calibration import TemperatureFit, calibrate
    from teacher_dump.checking.agreement import Agreement
    from teacher_dump.checking.run import check
    from teacher_dump.configuration import CalibrateConfig, CheckConfig, DumpConfig, EstimateConfig, PreviewConfig, RunConfig
    from teacher_dump.dumping.append import append
    from teacher_dump.dumping.estimate import Estimate, estimate
    from teacher_dump.dumping.preview import Preview, preview
    from teacher_dump.dumping.repair import repair
    from teacher_dump.dumping.report import DumpReport
    from teacher_dump.dumping.run import dump
    from teacher_dump.generation.configuration import GenerateConfig
    from teacher_dump.generation.report import GenerateReport
    from teacher_dump.generation.run import generate
    from teacher_dump.importers.configuration import ImportConfig
    from teacher_dump.importers.run import import_dump

_MODULES = {
    "Agreement": "teacher_dump.checking.agreement",
    "CalibrateConfig": "teacher_dump.configuration",
    "CheckConfig": "teacher_dump.configuration",
    "DumpConfig": "teacher_dump.configuration",
    "DumpReport": "teacher_dump.dumping.report",
    "Estimate": "teacher_dump.dumping.estimate",
    "EstimateConfig": "teacher_dump.configuration",
    "GenerateConfig": "teacher_dump.generation.configuration",
    "GenerateReport": "teacher_dump.generation.report",
    "Preview": "teacher_dump.dumping.preview",
    "ImportConfig": "teacher_dump.importers.configuration",
    "PreviewConfig": "teacher_dump.configuration",
    "RunConfig": "teacher_dump.configuration",
    "TemperatureFit": "teacher_dump.calibration",
    "append": "teacher_dump.dumping.append",
    "calibrate": "teacher_dump.calibration",
    "check": "teacher_dump.checking.run",
    "dump": "teacher_dump.dumping.run",
    "estimate": "teacher_dump.dumping.estimate",
    "generate": "teacher_dump.generation.run",
    "import_dump": "teacher_dump.importers.run",
    "preview": "teacher_dump.dumping.preview",
    "repair": "teacher_dump.dumping.repair",
}

__all__ = [
    "Agreement",
    "CalibrateConfig",
    "CheckConfig",
    "DumpConfig",
    "DumpReport",
    "Estimate",
    "EstimateConfig",
    "GenerateConfig",
    "GenerateReport",
    "ImportConfig",
    "Preview",
    "PreviewConfig",
    "RunConfig",
    "TemperatureFit",
    "append",
    "calibrate",
    "check",
    "dump",
    "estimate",
    "generate",
    "import_dump",
    "preview",
    "repair",
]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import, and `--help` should not.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)
