"""What `student-train calibrate` is asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from knowledge_store.options import option

FIT_METHODS = ("first", "temperature")


@dataclass(frozen=True)
class CalibrateConfig:
    """A calibration of a dump's teacher; each field is an option of `student-train calibrate`."""

    store: str = option(argument=True, metavar="STORE", help="The store's folder.")
    dump: str | None = option(None, help="Name of the dump. It may be left out when the store has only one.")
    method: str = option(
        "first",
        choices=FIT_METHODS,
        help="What is fitted: first (the c of FIRST's rescaling) or temperature (of the candidates and the tail).",
    )
    split: str | None = option(
        None, metavar="COLUMN=VALUE", help="Fit on the sequences of this split only, such as split=calibration."
    )
    output: str = option("calibration.json", help="File to write. An existing calibration is replaced.")
