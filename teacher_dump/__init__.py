"""Runs a teacher once over a corpus and keeps what it knew in a knowledge store.

`dump(config, rank, world_size)` is the whole contract; any engine that can call a function with two integers can run it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teacher_dump.agreement import Agreement, check
    from teacher_dump.calibration import TemperatureFit, calibrate
    from teacher_dump.configuration import DumpConfig
    from teacher_dump.forecast import Estimate, estimate
    from teacher_dump.teacher_pass import DumpReport, dump

__all__ = ["Agreement", "DumpConfig", "DumpReport", "Estimate", "TemperatureFit", "calibrate", "check", "dump", "estimate"]

_MODULES = {
    "Agreement": "teacher_dump.agreement",
    "check": "teacher_dump.agreement",
    "DumpConfig": "teacher_dump.configuration",
    "DumpReport": "teacher_dump.teacher_pass",
    "dump": "teacher_dump.teacher_pass",
    "TemperatureFit": "teacher_dump.calibration",
    "calibrate": "teacher_dump.calibration",
    "Estimate": "teacher_dump.forecast",
    "estimate": "teacher_dump.forecast",
}


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import, and `--help` should not.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)
