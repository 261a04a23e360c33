"""The section of samples: what each student writes on the same few texts, beside what the teacher expected there."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import NamedTuple

from knowledge_store.quantities import percentage
from student_train.report import charts
from student_train.report.runs import Run, listed
from student_train.training.run_folder import Record

# Line breaks in a row that are shown one by one.
MAX_SIGNS = 3
# What is no character, or turns those after it around, is spelled out. Joiners and other marks, which scripts need, stay.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202d\u202e\ufeff\ufff9-\ufffb\ud800-\udfff]")
_LINES = re.compile(r"\n+| +(?=\n|$)|^ +")
_WHITE_SPACE = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}


class Place(NamedTuple):
    """What is continued: samples of one place can be set side by side."""

    sequence_id: int
    start: int
    prompt: str
    text: str


def samples(runs: Sequence[Run]) -> list[str]:
    """A section for each evaluation that has samples."""
    names = dict.fromkeys(name for run in runs for name, result in run.evaluations.items() if result.get("samples"))
    return [_section(runs, name) for name in names]


def _section(runs: Sequence[Run], name: str) -> str:
    measured = [(index, run) for index, run in enumerate(runs) if name in run.evaluations]
    places: dict[Place, list[tuple[int, Run, Record]]] = {}
    for index, run in measured:
        for sample in run.evaluations[name].get("samples", []):
            places.setdefault(Place(*(sample[field] for field in Place._fields)), []).append((index, run, sample))
    missing = [run.name for _, run in measured if not run.evaluations[name].get("samples")]
    warnings = [f"No samples of {listed(missing)}: evaluate again to have some."] if missing else []
    if any(len(written) < len(measured) - len(missing) for written in places.values()):
        warnings.append("These students did not continue the same texts: the dump was another, or had other sequences.")
    parts = "".join(_place(number, place, written) for number, (place, written) in enumerate(places.items(), 1))
    return f"""
<section>
<h2>What they write: {html.escape(name)}</h2>
<p>A few texts of the dump, the same for every student, cut before the answer, or in the middle where there is none. Each
student goes on from there with its likeliest token each time. The candidates are the teacher's, from the store: each row is
what it expected after all of the text before that token, so only the first row is of the place where the students go on.</p>
{"".join(f'<p class="missing">{warning}</p>' for warning in warnings)}
{parts}
</section>"""


def _place(number: int, place: Place, written: Sequence[tuple[int, Run, Record]]) -> str:
    first = written[0][2]
    rows = [
        ("before", ("…" if first["prompt_cut"] else "") + _passage(place.prompt)),
        ("the text", _passage(place.text)),
        *(
            (f"{charts.swatch(index)}{html.escape(run.name)}", _passage(sample["written"]) or "<small>nothing</small>")
            for index, run, sample in written
        ),
    ]
    texts = "".join(f'<dt>{label}</dt><dd dir="auto">{text}</dd>' for label, text in rows)
    return f'<h3>Text {number}</h3><dl class="texts">{texts}</dl>{_candidates(first["positions"])}'


def _candidates(positions: Sequence[Record]) -> str:
    if not any(position["candidates"] for position in positions):
        return '<p class="note">The dump keeps no candidates of the teacher here.</p>'
    rows = "".join(
        f"<tr><th>{shown_token(position['token'])}</th><td>"
        + " ".join(f"<span>{shown_token(token)} {percentage(share)}</span>" for token, share in position["candidates"])
        + "</td></tr>"
        for position in positions
    )
    return (
        '<div class="scroll"><table class="small candidates"><thead><tr><th>The text\'s next token</th>'
        f"<th>What the teacher expected</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def shown_token(text: str) -> str:
    """A token with its white space to be seen, set apart from the direction of the text around it."""
    shown = "".join(_WHITE_SPACE.get(character) or readable(character) for character in text)
    return f"<bdi>{shown}</bdi>"


def readable(text: str) -> str:
    """Characters as HTML; what cannot be seen, or would turn the text around it, is spelled out."""
    return html.escape(_UNSEEN.sub(lambda match: repr(match[0])[1:-1], text))


def _passage(text: str) -> str:
    """Text of a corpus or of a model as HTML: white space at the ends of lines is seen, many empty lines are counted."""
    return _LINES.sub(_signs, readable(text))


def _signs(match: re.Match[str]) -> str:
    signs = "".join(_WHITE_SPACE[character] for character in match[0])
    if match[0][0] != "\n":
        return f"<small>{signs}</small>"
    counted = signs if len(signs) <= MAX_SIGNS else f"{signs[0]} × {len(signs):,}"
    return f"<small>{counted}</small>\n"
