"""Runs side by side on one HTML page: tables with intervals, reliability diagrams, differences, costs, and where it came from.

The page is one file with everything in it: no scripts, pictures as inline SVG, links to the page of a store alone. It reads the
JSON that `run` and `evaluate` leave beside a model, needs no torch, and says so where a piece is missing. Every text from a
file is escaped.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from knowledge_store.errors import InputError
from student_train.report import charts
from student_train.report.evaluations import sections
from student_train.report.overview import overview
from student_train.report.provenance import provenance
from student_train.report.rationales import rationales
from student_train.report.runs import Run, dumps_of, folder_names, listed, read_folder, records
from student_train.report.samples import samples
from student_train.report.style import FRAME, STYLE
from student_train.report.training import costs, learning


def write_report(runs: Iterable[str | Path], output: str | Path) -> Path:
    """Write the page.

    Args:
        runs: folders that `run` or `evaluate` wrote into, in the order in which they are to be shown; all others are
            compared with the first.
        output: the file to write.

    Returns:
        `output`.

    Raises:
        InputError: a folder does not exist or holds neither a run nor an evaluation, or `output` cannot be written.
    """
    folders = [Path(run) for run in runs]
    contents = [read_folder(folder, name) for folder, name in zip(folders, folder_names(folders), strict=True)]
    output = Path(output)
    if output.is_dir():
        raise InputError(f"--output {output} is a folder: name a file, such as {output / 'report.html'}")
    with charts.style():
        page = _page(contents)
    temporary = output.with_name(f".tmp-{output.name}-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(page.encode("utf-8", "backslashreplace"))  # JSON may have half a character
        temporary.replace(output)
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror}") from error
    return output


def _page(runs: list[Run]) -> str:
    parts = [overview(runs), *sections(runs), *samples(runs), rationales(runs), learning(runs), costs(runs)]
    teachers = {str(dump["teacher"]) for run in runs for record in records(run) for dump in dumps_of(record)}
    count = f"{len(runs)} student" + ("s" if len(runs) != 1 else "")
    lead = f"{count} of {listed(sorted(teachers))}" if teachers else count
    return FRAME.format(style=STYLE, lead=lead, sections="\n".join(part for part in parts if part), provenance=provenance(runs))
