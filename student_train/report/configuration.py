"""What `student-train report` is asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from knowledge_store.options import option


@dataclass(frozen=True)
class ReportConfig:
    """A report; each field is an option of `student-train report`."""

    runs: tuple[str, ...] = option(argument=True, metavar="RUN...", help="Folders of runs or of evaluated models.")
    output: str = option("report.html", metavar="<path>", help="The page to write.")
