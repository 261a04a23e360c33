"""What `student-train calibrate` is asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from knowledge_store.configuration import CalibrationOptions, DumpOptions, StoreOptions
from knowledge_store.options import option

FIT_METHODS = ("first", "temperature")


@dataclass(frozen=True)
class CalibrateConfig(CalibrationOptions, DumpOptions, StoreOptions):
    """A calibration of a dump's teacher; each field is an option of `student-train calibrate`."""

    method: str = option(
        "first",
        choices=FIT_METHODS,
        help="What is fitted: first (the c of FIRST's rescaling) or temperature (of the candidates and the tail).",
    )
    split: str | None = option(
        None, metavar="COLUMN=VALUE", help="Fit on the sequences of this split only, such as split=calibration."
    )
