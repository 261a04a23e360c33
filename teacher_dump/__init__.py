"""Runs a teacher once over a corpus and keeps what it knew in a knowledge store.

`dump(config, rank, world_size)` is the whole contract; any engine that can call a function with two integers can run it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teacher_dump.calibration import TemperatureFit, calibrate
    from teacher_dump.checking.agreement import Agreement, check
    from teacher_dump.dumping.configuration import DumpConfig
    from teacher_dump.dumping.estimate import Estimate, estimate
    from teacher_dump.dumping.run import DumpReport, dump

__all__ = ["Agreement", "DumpConfig", "DumpReport", "Estimate", "TemperatureFit", "calibrate", "check", "dump", "estimate"]

_MODULES = {
    "Agreement": "teacher_dump.checking.agreement",
    "check": "teacher_dump.checking.agreement",
    "DumpConfig": "teacher_dump.dumping.configuration",
    "DumpReport": "teacher_dump.dumping.run",
    "dump": "teacher_dump.dumping.run",
    "TemperatureFit": "teacher_dump.calibration",
    "calibrate": "teacher_dump.calibration",
    "Estimate": "teacher_dump.dumping.estimate",
    "estimate": "teacher_dump.dumping.estimate",
}


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import, and `--help` should not.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)
