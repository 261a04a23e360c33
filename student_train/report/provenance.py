"""The section that says where everything on the page comes from: dumps, options, versions."""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from knowledge_store.quantities import duration
from student_train.report.runs import Run, dumps_of, records
from student_train.report.training import knowledge
from student_train.training.run_folder import Record

PAGE = "http://127.0.0.1:8816/"  # where `knowledge-store browse` is, unless it is told otherwise


def provenance(runs: list[Run]) -> str:
    dumps: dict[str, Record] = {}
    for run in runs:
        for record in records(run):
            for dump in dumps_of(record):
                dumps[dump["name"]] = dump
    stored = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(dump['teacher']))}</td><td>{dump['sequences']:,}</td>"
        f"<td>{dump['positions']:,}</td><td>{_bytes(dump)}</td><td>{dump['vocabulary_size']:,}</td></tr>"
        for name, dump in dumps.items()
    )
    store_table = (
        '<div class="scroll"><table class="small"><thead><tr><th>Dump</th><th>Teacher</th><th>Sequences</th><th>Positions'
        "</th><th>Size</th><th>Vocabulary</th></tr></thead>"
        f"<tbody>{stored}</tbody></table></div>"
        if stored
        else ""
    )
    held = [_details(f"dump {name}", [("knowledge", knowledge(dump)), *dump["lines"]]) for name, dump in dumps.items()]
    return "".join([store_table, *_looking(runs), *held, *(_run_details(run) for run in runs)])


def _looking(runs: list[Run]) -> list[str]:
    """How to look into the stores that the students were judged on, with what was kept of each position."""
    kept: dict[str, dict[str, str]] = {}
    dumps: dict[str, str] = {}
    for run in runs:
        for name, result in run.evaluations.items():
            store = result["config"].get("store")
            if store:
                files = kept.setdefault(str(store), {})
                dumps.setdefault(str(store), name)
                if result["config"].get("keep_positions"):
                    student = re.sub(r"\W", "_", run.name, flags=re.ASCII)
                    files[f"student_{student}" if student[:1].isdigit() else student] = str(result["config"]["keep_positions"])
    parts = []
    for store, files in kept.items():
        words = ["knowledge-store", "browse", store, *(f"--with={name}={path}" for name, path in files.items())]
        place = f"ask/student?dump={quote(dumps[store])}" if files else ""
        parts.append(
            f"<p>Look into the store, token by token: run <code>{html.escape(shlex.join(words))}</code>, which opens"
            f' <a href="{PAGE}#/{html.escape(place)}">its page</a>.</p>'
        )
    return parts


def _bytes(dump: Record) -> str:
    size = dump.get("bytes")
    if not size:
        return "–"
    return f"{size / 1e6:,.2f} MB ({size / max(dump['positions'], 1):.1f} bytes a position)"


def _run_details(run: Run) -> str:
    facts: Record = {}
    if run.run:
        facts |= {name: value for name, value in run.run["config"].items() if value is not None}
        facts["parameters"] = f"{run.run['parameters']:,}"
        facts["sequences"] = ", ".join(f"{count:,} {side}" for side, count in run.run["sequences"].items())
        facts["processes"] = run.run["world_size"]
    elif run.evaluations:
        facts["parameters"] = f"{next(iter(run.evaluations.values()))['parameters']:,}"
    for name, result in run.evaluations.items():
        size = f"{result['questions']['count']:,} questions" if "questions" in result else f"{result['sequences']:,} sequences"
        facts[f"evaluated on {name}"] = f"{size} in {duration(result['seconds'])}"
        if result["config"].get("post_hoc_temperature"):
            facts[f"temperature for {name}"] = f"from {result['config']['post_hoc_temperature']}"
    sources = [record["versions"] for record in records(run) if "versions" in record]
    if sources:
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in sources[0].items())
    return _details(run.name, facts.items())


def _details(title: str, facts: Iterable[tuple[str, Any]]) -> str:
    items = "".join(
        f"<dt>{html.escape(name.replace('_', ' '))}</dt><dd>{html.escape(str(value))}</dd>" for name, value in facts
    )
    return f"<details><summary>{html.escape(title)}</summary><dl>{items}</dl></details>"
