"""The section of rationales: a sequence of each run that learnt some, its tokens shaded by the teacher's saliency.

What shade shows is said in words too: each shaded token has its share as a title, and those of the rationale are marked and
listed with theirs.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from knowledge_store.quantities import percentage
from student_train.report import charts
from student_train.report.runs import Run
from student_train.report.samples import readable, shown_token
from student_train.training.run_folder import Record

_OF = {
    "saliency": "the most salient tokens of the context",
    "masked": "the most salient tokens of the context that are not of the answer",
    "random": "tokens of the context, drawn at random",
}


def rationales(runs: Sequence[Run]) -> str:
    """The section; empty where no run learnt rationales."""
    shown = [(index, run, run.run["rationale"]) for index, run in enumerate(runs) if run.run.get("rationale")]
    if not shown:
        return ""
    parts = "".join(_example(index, run, facts) for index, run, facts in shown)
    return f"""
<section>
<h2>What rationales are made of</h2>
<p>These runs learnt a second task besides the answer: to write some tokens of the context, the rationale, in the order of the
text. Of each, one sequence of its dump. The stronger a token's shade, the larger its share of the teacher's saliency: of how
far all of the context moves what the teacher says of the answer. Tokens of the rationale are underlined, and the answer stands
in bold.</p>
{parts}
</section>"""


def _example(index: int, run: Run, facts: Record) -> str:
    count, of = facts.get("tokens", "?"), _OF.get(facts.get("of", ""), "tokens of the context")
    head = f"<h3>{charts.swatch(index)}{html.escape(run.name)}</h3><p>{html.escape(str(count))} tokens: {of}.</p>"
    example = facts.get("example")
    if not example:
        return f'{head}<p class="missing">No sequence of this run was kept to be shown.</p>'
    tokens, shares = example["tokens"], example.get("shares")
    largest = max([*(shares or ()), 1e-9])
    rationale, answer = set(example["rationale"]), set(example["answer"])
    words = []
    for place, text in enumerate(tokens):
        word = text.lstrip(" ") or text  # the space before a word stays unshaded: it may end a line
        space, word = text[: len(text) - len(word)], readable(word)
        if place in answer:
            words.append(f"{space}<b>{word}</b>")
            continue
        share = shares[place] if shares else 0
        shade = f' style="--share:{share / largest:.0%}" title="{share:.2%} of the saliency"' if share else ""
        words.append(f"{space}<mark{shade}>{word}</mark>" if place in rationale else f"{space}<span{shade}>{word}</span>")
    cut = f"<small>{example['cut']:,} tokens stand before these.</small>" if example["cut"] else ""
    listed = ", ".join(
        shown_token(tokens[place]) + (f" {percentage(shares[place])}" if shares else "") for place in example["rationale"]
    )
    unseen = count - len(example["rationale"]) if isinstance(count, int) else 0
    before = f" (and {unseen} that stand before what is shown)" if unseen > 0 else ""
    return f'{head}{cut}<p class="shaded" dir="auto">{"".join(words)}</p><p class="listed">The rationale: {listed}{before}</p>'
