"""The first section: what each run was trained with, and how the runs differ in that."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from functools import partial

from knowledge_store.quantities import counted, duration, percentage
from student_train.report import charts
from student_train.report.runs import Run, dumps_of, listed

# Runs of one length differ a little in tokens, by the sequences that their seeds put into it.
ALIKE = 1.05

SHOWN_DUMPS = 5

# Options of a run that choose what of its dumps counts, and what they choose.
CHOICES = {"where": "sequences", "positions_where": "targets"}

# Options of a run that are worth a word where they matter: the field, the loss that takes it (None: any), and its word.
_OPTIONS = [
    ("first_c", "first", "c"),
    ("beta", "jensen-shannon", "β"),
    ("skew", "skewed-kl", "λ"),
    ("skew", "skewed-reverse-kl", "λ"),
    ("smoothing", "label-smoothing", "smoothing"),
]


def overview(runs: Sequence[Run]) -> str:
    """A row for each run that was trained: loss, dump, steps, tokens, time; and warnings where they differ."""
    trained = [(index, run) for index, run in enumerate(runs) if run.run or run.history]
    if not trained:
        return ""
    rows = [
        f"<tr><th>{charts.swatch(index)}{html.escape(run.name)}</th>"
        f'<td class="words">{_objective(run)}{_small(_validation(run))}</td>'
        f'<td class="words">{_dumps_shown(run)}{_small(_sequences(run))}</td>'
        f"<td>{_steps(run)}{_small(_step_size(run))}</td><td>{_tokens(run)}</td><td>{_time(run)}</td><td>{_parameters(run)}</td>"
        "</tr>"
        for index, run in trained
    ]
    warnings = _warnings([run for _, run in trained])
    choices = [f'<p class="note">{words}</p>' for _, run in trained if (words := _choice(run))]
    body = "\n".join(rows)
    return f"""
<section>
<h2>The runs</h2>
<p>The validation loss is the run's own objective on documents that were kept out of its training: runs with different losses
cannot be compared by it. Tokens seen are those that the student ran on, each time it did, without padding.</p>
{"".join(f'<p class="missing">{warning}</p>' for warning in warnings)}
<div class="scroll"><table><thead><tr><th></th><th>Loss<small>what is minimised</small></th>
<th>Dumps<small>with their weights</small></th><th>Steps</th><th>Tokens seen</th>
<th>Time<small>wall clock, training</small></th><th>Parameters</th></tr></thead>
<tbody>{body}</tbody></table></div>
{"".join(choices)}
</section>"""


def _small(text: str) -> str:
    return f"<small>{html.escape(text)}</small>" if text else ""


def _objective(run: Run) -> str:
    config = run.run.get("config", {})
    if not config:
        return "–"
    words = [str(config["loss"])]
    if config["loss"] != "ce" and config["ce_weight"]:
        words.append(f"{config['ce_weight']:g} cross-entropy")
    if config["temperature"] != 1:
        words.append(f"temperature {config['temperature']:g}")
    words += [f"{word} {config[field]:g}" for field, loss, word in _OPTIONS if config["loss"] == loss and field in config]
    if config.get("tail", "auto") != "auto":
        words.append(f"tail as {config['tail']}")
    if config.get("calibration"):
        words.append("re-calibrated")
    if config.get("rationale", "none") != "none":
        words.append(f"{config['rationale_weight']:g} rationales ({config['rationale']})")
    if config.get("hidden_weight"):
        words.append(f"{config['hidden_weight']:g} hidden states ({config['hidden_loss']})")
    return html.escape(", ".join(words))


def _validation(run: Run) -> str:
    losses = [entry["eval_loss"] for entry in run.history.get("entries", []) if entry.get("eval_loss") is not None]
    return f"validation loss {losses[-1]:.3f}" if losses else ""


def _weighted(run: Run) -> list[str]:
    """Which dumps it learned from, each with its weight where it has one: "news 0.7"."""
    dumps = dumps_of(run.run)
    return [f"{dump['name']} {dump['weight']:.3g}" if dump.get("weight") else str(dump["name"]) for dump in dumps]


def _dump(run: Run) -> str:
    """All of them in words: "news 0.7, code 0.3"."""
    words = ", ".join(_weighted(run)) or "–"
    return f"{words}, several teachers" if run.run.get("several_teachers") else words


def _dumps_shown(run: Run, between: str = "<br>") -> str:
    """The dumps, or the first of many, as HTML."""
    words = _weighted(run)
    if len(words) > SHOWN_DUMPS:
        words = [*words[: SHOWN_DUMPS - 1], f"and {len(words) - SHOWN_DUMPS + 1:,} more"]
    if run.run.get("several_teachers"):
        words.append("teachers of one corpus")
    return between.join(map(html.escape, words)) or "–"


def _chosen(run: Run, option: str) -> str:
    """What an option chose of the dumps, as HTML; "all" where it was not given."""
    condition = run.run.get("config", {}).get(option)
    return f"<code>{html.escape(str(condition))}</code>" if condition else "all"


def _choice(run: Run) -> str:
    """Which sequences and targets it was trained on, where they were chosen; as HTML."""
    parts = []
    for option, what in CHOICES.items():
        if (condition := _chosen(run, option)) != "all":
            counts = run.run.get("choice", {}).get(option)
            share = f" ({percentage(counts[what] / counts['of'])})" if counts and counts["of"] else ""
            number = f"{counts[what]:,} of {counts['of']:,} {what}{share}" if counts else what
            parts.append(f"on {number} chosen by {condition}")
    return f"<b>{html.escape(run.name)}</b> was trained {', and '.join(parts)}." if parts else ""


def _sequences(run: Run) -> str:
    return counted(run.run["sequences"]["train"], "sequence", "sequences") if "train" in run.run.get("sequences", {}) else ""


def _done(run: Run) -> int | None:
    """The steps it has made."""
    step: int | None = run.history.get("step")
    return step


def _planned(run: Run) -> int | None:
    steps: int | None = run.run.get("identity", {}).get("number of steps")
    return steps


def _steps(run: Run) -> str:
    done, planned = _done(run), _planned(run)
    if done is None or run.history.get("finished") or planned is None:
        return "–" if done is None else f"{done:,}"
    return f"{done:,} of {planned:,}"


def _step_size(run: Run) -> str:
    size = run.run.get("identity", {}).get("sequences per step")
    unit = ("group", "groups") if "preferences" in run.run else ("sequence", "sequences")
    return f"of {counted(size, *unit)}" if size else ""


def _tokens(run: Run) -> str:
    return f"{run.history['tokens']:,}" if "tokens" in run.history else "–"


def _time(run: Run) -> str:
    if not run.history:
        return "–"
    return duration(run.history.get("seconds", 0.0))


def _parameters(run: Run) -> str:
    if "parameters" not in run.run:
        return "–"
    everything, trained = run.run["parameters"], run.run.get("trained_parameters", run.run["parameters"])
    return f"{everything:,}{_small(f'{trained:,} trained') if trained != everything else ''}"


def _warnings(runs: Sequence[Run]) -> list[str]:
    """What keeps a comparison of the students from being one of their losses, as HTML."""
    unfinished = [run.name for run in runs if run.history and not run.history.get("finished")]
    warnings = [f"Not finished: {listed(unfinished)}."] if unfinished else []
    differences = [_different_steps(runs), _different_tokens(runs), _different_dumps(runs)]
    if differences := [text for text in (*differences, *_different_choices(runs)) if text]:
        warnings.append(
            f"These runs were not trained alike: {'; '.join(differences)}. Differences between the students may come from that."
        )
    return warnings


def _different_steps(runs: Sequence[Run]) -> str:
    return (
        _by_run("optimiser steps", runs, _steps) if len({step for run in runs if (step := _done(run)) is not None}) > 1 else ""
    )


def _different_tokens(runs: Sequence[Run]) -> str:
    tokens = [run.history["tokens"] for run in runs if "tokens" in run.history]
    return _by_run("tokens seen", runs, _tokens) if tokens and max(tokens) > ALIKE * min(tokens) else ""


def _different_dumps(runs: Sequence[Run]) -> str:
    names = {_dump(run) for run in runs if run.run}
    if len(names) > 1:
        return _by_run("dumps", runs, partial(_dumps_shown, between=", "))
    contents = {
        tuple(str(fact) for name, fact in run.run["identity"].items() if name.startswith(("knowledge of", "committed")))
        for run in runs
        if run.run
    }
    return f"they read different states of the dump {listed(sorted(names))}" if len(contents) > 1 else ""


def _different_choices(runs: Sequence[Run]) -> list[str]:
    return [
        f"other {what} were chosen for some than for others (below the table)"
        for option, what in CHOICES.items()
        if len({_chosen(run, option) for run in runs if run.run}) > 1
    ]


def _by_run(what: str, runs: Sequence[Run], shown: Callable[[Run], str]) -> str:
    """How runs differ, as HTML: "optimiser steps: one 40, other 20"."""
    return f"{what}: " + ", ".join(f"<b>{html.escape(run.name)}</b> {shown(run)}" for run in runs if shown(run) != "–")
