"""The report: one file, complete, honest about what is missing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from knowledge_store.calibration.expected_calibration_error import expected_calibration_error
from knowledge_store.errors import InputError
from student_train.evaluation.bootstrap import calibration_gaps, group_sizes, group_sums
from student_train.evaluation.kinds import FIGURES, measurements
from student_train.evaluation.metrics import describe_answers
from student_train.evaluation.question_figures import QUESTION_FIGURES
from student_train.report.html import write_report

DUMP = {
    "name": "heldout",
    "store": "store",
    "teacher": "a <teacher> & friends",
    "vocabulary_size": 512,
    "kinds": {"positions": {"selection": "top-k 5 + draws of weight 0.05", "dense_bytes": 4000 * 512 * 4}, "vectors": {}},
    "lines": [["selection", "top-k 5 + draws of weight 0.05, in steps of 0.125 nats"]],
    "sequences": 9,
    "positions": 4200,
    "targets": 4000,
    "bytes": 60_000,
    "bytes_read": 50_400,
}
CONFIG = {"loss": "forward-kl", "ce_weight": 0.2, "temperature": 1.0, "first_c": 0.28, "seed": 0, "dump": None}

RATIONALE = {
    "of": "saliency", "tokens": 3, "sequences": 20, "dump": None,
    "example": {
        "sequence_id": 7, "cut": 3, "tokens": [" The", " <i>lamp", "\n", "?", " Ada"], "rationale": [1, 2],
        "shares": [0.1, 0.6, 0.3, 0.0, 0.0], "answer": [4],
    },
}  # fmt: skip


def answers_of(seed: int, boast: float = 0.0, count: int = 400) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Confidence, correct and scores of a model that is surer than it should be by `boast`, on one and the same questions."""
    easy = np.random.default_rng(0).uniform(0.3, 0.9, count)
    correct = np.random.default_rng(1).uniform(size=count) < easy
    confidence = np.clip(easy + boast + np.random.default_rng(seed).normal(0, 0.01, count), 0.01, 0.99)
    right = np.where(correct, confidence, 1 - confidence)
    return confidence, correct, {"nll": -np.log(right), "brier": 2 * (1 - right) ** 2}


def evaluation(nll: float, kl: float, boast: float = 0.0) -> dict:
    """A result on a dump, with a loss on the text and a divergence of exactly these means."""
    confidence, correct, scores = answers_of(3, boast)
    sequence = np.repeat(np.arange(20), 20)
    spread = np.random.default_rng(2).normal(0, 0.2, 400)
    scores |= {"nll": nll + spread - spread.mean(), "kl_lower_bound": np.full(400, kl), "top_1_agreement": np.arange(400) < 244}
    sums = {name: group_sums(values, sequence).tolist() for name, values in {**scores, "accuracy": correct}.items()}
    return {
        "model": "model",
        "parameters": 1234,
        "dump": DUMP,
        "sequences": 20,
        "seconds": 3.5,
        "figures": {
            "positions": {
                "positions": 4000,
                "student": {**describe_answers(confidence, correct, scores, sequence), "full_ece": 0.1234},
                "teacher": describe_answers(confidence, correct, {"nll": scores["nll"]}, sequence),
                "per_sequence": {
                    "targets": group_sizes(400, sequence).tolist(),
                    **sums,
                    "gaps_15": calibration_gaps(confidence, correct, 15, groups=sequence).tolist(),
                },
                "coverage": {
                    "mean_by_rank": [0.3, 0.4, 0.5, 0.55, 0.62],
                    "histogram": {"edges": np.linspace(0, 1, 21).tolist(), "counts": [200] * 20},
                },
            }
        },
        "config": {"store": "store", "questions": None},
        "versions": {"python": "3.11"},
    }


def confidence_of(seed: int, boast: float, **more: float) -> dict:
    confidence, correct, scores = answers_of(seed, boast)
    kept = {"confidence": confidence, "correct": correct.astype(int), **scores}
    kept = {name: values.tolist() for name, values in kept.items()}
    return {"questions": 400, **describe_answers(confidence, correct, scores), "answers": kept, **more}


def answered(boast: float, temperature: float | None = 1.8, clashing: int = 0, **changes: object) -> dict:
    """A result on questions."""
    names = ("sequence",) if clashing == 400 else ("first_token", "options", "sequence")
    result = {
        "model": "model",
        "parameters": 1234,
        "questions": {
            "name": "exam",
            "file": "exam.jsonl",
            "answer_as": "text" if clashing else "letter",
            "count": 400,
            "options": [4, 5],
            "shared_first_token": clashing,
            "sha256": "00",
            **changes,
        },
        "headline": "sequence" if clashing else "first_token",
        "seconds": 12.0,
        **{name: confidence_of(4, boast) for name in names},
        "config": {"store": None, "questions": "exam.jsonl"},
        "versions": {"python": "3.11"},
    }
    if temperature:
        scaled = {name: confidence_of(4, boast / 4, temperature=temperature) for name in names}
        result["post_hoc"] = {"questions": 90, **scaled}
        result["config"]["post_hoc_temperature"] = "other.jsonl"
    return result


def write_run(
    folder: Path,
    *,
    run: bool = True,
    history: bool = True,
    measured: tuple[float, float] | None = None,
    exam: dict | None = None,
    rationale: dict | None = None,
) -> Path:
    folder.mkdir(parents=True)
    if run:
        record = {
            "identity": {"number of steps": 40, "sequences per step": 4},
            "config": CONFIG,
            "dumps": [{**DUMP, "name": "train", "weight": None}],
            "sequences": {"train": 90, "eval": 4},
            "world_size": 1,
            "parameters": 1234,
            "versions": {"python": "3.11"},
            **({"rationale": rationale} if rationale else {}),
        }
        (folder / "run.json").write_text(json.dumps(record))
    if history:
        entries = [
            {"step": step, "eval_loss": 1.0, "eval_kl": 1 / (step + 1), "eval_nll": 3 / (step + 1), "seconds": step}
            for step in range(5)
        ]
        entries += [{"step": 39, "loss": 0.5, "seconds": 5}, {"step": 40, "eval_loss": 0.625, "seconds": 5}]
        record = {"finished": True, "seconds": 83.0, "step": 40, "tokens": 9600, "entries": entries}
        (folder / "history.json").write_text(json.dumps(record))
    (folder / "evaluations").mkdir()
    if measured:
        (folder / "evaluations" / "heldout.json").write_text(json.dumps(evaluation(*measured)))
    if exam:
        (folder / "evaluations" / "exam.json").write_text(json.dumps(exam))
    return folder


def sample(written: str, sequence_id: int = 3, **changes: object) -> dict:
    """A text that a model continued."""
    return {
        "sequence_id": sequence_id,
        "start": 4,
        "prompt": "Who lit the lamp?\n",
        "prompt_cut": True,
        "text": " The keeper did.",
        "written": written,
        "positions": [
            {"token": " The", "candidates": [[" The", 0.625], [" His\n", 0.0312]]},
            {"token": " keeper", "candidates": [[" daughter", 0.4]]},
        ],
        **changes,
    }


def with_samples(folder: Path, *samples: dict) -> Path:
    """An evaluated run that has these samples besides."""
    change_record(folder / "evaluations" / "heldout.json", samples=list(samples))
    return folder


def page(tmp_path: Path, *folders: Path) -> str:
    return write_report(folders, tmp_path / "pages" / "report.html").read_text()


def test_a_full_page(tmp_path):
    text = page(
        tmp_path,
        write_run(tmp_path / "fine-tuned", measured=(3.2, 0.8)),
        write_run(tmp_path / "distilled", measured=(3.1, 0.5)),
    )
    assert text.count("<svg") == 3 + 1 + 1  # reliability of two students and the teacher, coverage, curves
    best = re.findall(r'<td class="best">([^<]*)<', text)
    assert best[:2] == [
        "61.0%",
        f"{evaluation(3.2, 0.8)['figures']['positions']['student']['accuracy']:.1%}",
    ]  # ties are both marked
    assert "3.100" in best and "0.50000" in best and "3.200" not in best
    assert "lower bound" in text and "1 min 23 s" in text and "62.0%" in text and "12.34%" in text
    assert "a &lt;teacher&gt; &amp; friends" in text and "<teacher>" not in text
    assert "4,200" in text and "14.3 bytes a position" in text and "12.0 of what its loss reads" in text


def cells(text: str, heading: str) -> dict[str, list[str]]:
    """Of the first table after a heading: the text of each row's cells, by the row's name; "" for the head."""
    table = text[text.index(heading) :]
    table = table[: table.index("</table>")]
    rows = re.findall(r"<tr.*?>(.*?)</tr>", table, re.DOTALL)
    plain = [[re.sub("<[^>]*>", " ", cell).split() for cell in re.split(r"<t[hd][^>]*>", row)[1:]] for row in rows]
    return {" ".join(row[0]): [" ".join(cell) for cell in row[1:]] for row in plain}


def test_what_a_run_cost(tmp_path):
    text = page(tmp_path, write_run(tmp_path / "distilled", measured=(3.1, 0.5)), write_run(tmp_path / "bare", history=False))
    costs = cells(text, "What it cost")
    dense = f"{4000 * 512 * 4 / 60_000:,.0f}×"
    assert costs["distilled"] == [
        "train positions: top-k 5 + draws of weight 0.05; vectors",
        "14.3 12.0 of what its loss reads",
        "0.06 MB",
        dense,
    ]
    assert costs["bare"] == costs["distilled"]


def test_what_each_run_was_trained_with(tmp_path):
    folders = [write_run(tmp_path / "distilled"), write_run(tmp_path / "bare", history=False)]
    text = page(tmp_path, *folders, write_run(tmp_path / "base", run=False, history=False, measured=(4.0, 2.0)))
    runs = cells(text, "The runs")
    assert list(runs) == ["", "distilled", "bare"]
    assert runs["distilled"] == [
        "forward-kl, 0.2 cross-entropy validation loss 0.625",
        "train 90 sequences",
        "40 of 4 sequences",
        "9,600",
        "1 min 23 s",
        "1,234",
    ]
    assert runs["bare"][2:5] == ["– of 4 sequences", "–", "–"]
    assert "not trained alike" not in text and "Not finished" not in text
    change_record(folders[0] / "run.json", config={**CONFIG, "hidden_weight": 0.1, "hidden_loss": "cosine"})
    assert "forward-kl, 0.2 cross-entropy, 0.1 hidden states (cosine)" in page(tmp_path, *folders)


def change_record(path: Path, **changes: object) -> None:
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, **changes}))


def warnings_of(text: str) -> str:
    """The warnings of the section on the runs, as plain text."""
    section = text[text.index("The runs</h2>") : text.index("</section>")]
    return " ".join(re.sub("<[^>]*>", "", words) for words in re.findall(r'<p class="missing">(.*?)</p>', section))


def test_runs_that_were_not_trained_alike_are_told(tmp_path):
    one, other = write_run(tmp_path / "one", measured=(3.2, 0.8)), write_run(tmp_path / "two", measured=(3.1, 0.5))
    assert warnings_of(page(tmp_path, one, other)) == ""
    change_record(other / "history.json", tokens=9_700)  # another seed
    assert warnings_of(page(tmp_path, one, other)) == ""
    change_record(other / "history.json", step=20, tokens=4_800)
    warning = warnings_of(page(tmp_path, one, other))
    assert "not trained alike: optimiser steps: one 40, two 20; tokens seen: one 9,600, two 4,800." in warning
    assert "dump" not in warning
    change_record(other / "history.json", step=40, tokens=9_600)
    change_record(other / "run.json", identity={"knowledge of the dump train": "another"})
    assert "they read different states of the dump train" in warnings_of(page(tmp_path, one, other))
    change_record(
        other / "run.json", dumps=[{**DUMP, "name": name, "weight": share} for name, share in (("train", 0.7), ("code", 0.3))]
    )
    assert "dumps: one train, two train 0.7, code 0.3." in warnings_of(page(tmp_path, one, other))
    change_record(other / "history.json", finished=False, step=12)
    change_record(other / "run.json", identity={"number of steps": 40})
    text = page(tmp_path, one, other)
    assert "Not finished: two." in warnings_of(text) and cells(text, "The runs")["two"][2] == "12 of 40"


def test_dumps_with_weights_and_what_was_chosen_of_them(tmp_path):
    one, other, many = (write_run(tmp_path / name) for name in ("one", "two", "many"))
    where, condition = "SELECT dump, sequence_id FROM sequences WHERE file < 'b'", "exp(tail_logprob) > 0.05"
    dumps = [{**DUMP, "name": name, "weight": share} for name, share in (("news", 0.7), ("news-2", 0.3))]
    change_record(other / "run.json", dumps=dumps, config={**CONFIG, "where": where, "positions_where": condition})
    counts = {"where": {"sequences": 45, "of": 90}, "positions_where": {"targets": 1200, "of": 6000, "sequences_left_out": 2}}
    change_record(other / "run.json", choice=counts)
    change_record(many / "run.json", dumps=[{**DUMP, "name": f"news-{number}", "weight": None} for number in range(9)])
    text = page(tmp_path, one, other, many)
    assert "documents that were kept out of them are not the same" in text
    assert "kept out of them are not the same" not in page(tmp_path, one, one)
    runs = cells(text, "The runs")
    assert runs["two"][1] == "news 0.7 news-2 0.3 90 sequences"
    assert runs["many"][1] == "news-0 news-1 news-2 news-3 and 5 more 90 sequences"
    warning = warnings_of(text)
    assert "dumps: one train, two news 0.7, news-2 0.3, many news-0, news-1, news-2, news-3, and 5 more" in warning
    escaped = where.replace("<", "&lt;").replace("'", "&#x27;")
    for what in ("sequences", "targets"):
        assert f"other {what} were chosen for some than for others (below the table)" in warning
    plain = re.sub("<[^>]*>", "", text)
    sequences, targets = f"45 of 90 sequences (50%) chosen by {escaped}", "1,200 of 6,000 targets (20%) chosen by exp("
    assert f"two was trained on {sequences}, and on {targets}tail_logprob) &gt; 0.05." in plain
    change_record(other / "run.json", several_teachers=True)
    assert "news 0.7 news-2 0.3 teachers of one corpus" in cells(page(tmp_path, other), "The runs")["two"][1]


def passages(text: str) -> list[tuple[str, str]]:
    """What stands beside what in the section of samples, as plain text."""
    section = text[text.index("What they write") :]
    pairs = re.findall(r"<dt>(.*?)</dt><dd.*?>(.*?)</dd>", section[: section.index("</section>")], re.DOTALL)
    return [(re.sub("<[^>]*>", "", label), re.sub("<[^>]*>", "", words)) for label, words in pairs]


def test_what_students_write_stands_beside_the_text_and_the_teacher(tmp_path):
    folders = [write_run(tmp_path / name, measured=(3.2, 0.8)) for name in ("one", "two", "old")]
    with_samples(folders[0], sample(" The daughter.\n\n\n\n\nNo"), sample("x", 9))
    with_samples(folders[1], sample(""), sample("y", 9))
    text = page(tmp_path, *folders)
    assert passages(text)[:4] == [
        ("before", "…Who lit the lamp?↵\n"),
        ("the text", "·The keeper did."),
        ("one", "·The daughter.↵ × 5\nNo"),
        ("two", "nothing"),
    ]
    assert passages(text)[6:] == [("one", "x"), ("two", "y")]
    expected = cells(text, "What they write")
    assert expected["·The"] == ["·The 62% ·His↵ 3.1%"] and expected["·keeper"] == ["·daughter 40%"]
    assert "No samples of <b>old</b>" in text and "did not continue the same texts" not in text
    with_samples(folders[1], sample("", text="Another text"), sample("y", 9, positions=[{"token": "a", "candidates": []}]))
    assert "did not continue the same texts" in page(tmp_path, *folders)
    assert "keeps no candidates of the teacher" in page(tmp_path, folders[1], folders[0])
    assert "What they write" not in page(tmp_path, folders[2])


def test_rationales_are_shaded_marked_and_said_in_words(tmp_path):
    without = {name: value for name, value in RATIONALE["example"].items() if name != "shares"}
    plain, shaded = write_run(tmp_path / "plain"), write_run(tmp_path / "shaded", rationale=RATIONALE)
    text = page(tmp_path, plain, shaded)
    assert '<mark style="--share:100%" title="60.00% of the saliency">&lt;i&gt;lamp</mark>' in text
    assert '<span style="--share:17%" title="10.00% of the saliency">The</span>' in text and " <b>Ada</b>" in text
    assert "<bdi>·&lt;i&gt;lamp</bdi> 60%, <bdi>↵</bdi> 30% (and 1 that stand before what is shown)" in text
    assert "3 tokens stand before these" in text
    text = page(tmp_path, write_run(tmp_path / "random", rationale={**RATIONALE, "of": "random", "example": without}))
    assert "<mark>&lt;i&gt;lamp</mark>" in text and "drawn at random" in text and "of the saliency" not in text
    assert "No sequence of this run" in page(tmp_path, write_run(tmp_path / "none", rationale={**RATIONALE, "example": None}))
    assert "rationales are made of" not in page(tmp_path, plain)


def test_samples_in_any_script(tmp_path):
    """Joiners and marks, without which some scripts are misspelt, stay; what turns or hides text around it is spelled out."""
    scripts = ["الحارس\u200cها", "चिराग़ क्\u200dष", "ភ្លើង\u200bបំភ្លឺ", "灯台守", "👩\u200d👧", "שלום"]
    odd = ["\x00\x1b[31m", "\u202etxt.exe", "\ud800", "\x85"]
    written = "".join(scripts + odd)
    folder = with_samples(write_run(tmp_path / "one", measured=(3.2, 0.8)), sample(written))
    change_record(folder / "run.json", versions={"half a character": "\ud800"})
    text = page(tmp_path, folder)
    [shown] = [words for label, words in passages(text) if label == "one"]
    assert shown == "".join(scripts) + r"\x00\x1b[31m\u202etxt.exe\ud800\x85"
    assert text.count('<dd dir="auto">') == 3 and "<bdi>" in text


class Boxes(HTMLParser):
    """The classes of the elements around each table and picture, innermost last."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.around: list[tuple[str, str]] = []
        self.found: list[tuple[str, list[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in ("table", "svg"):
            self.found.append((tag, [name for _, name in self.around if name]))
        if tag in ("div", "section", "figure", "main", "details", "table"):
            self.around.append((tag, dict(attributes).get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        if self.around and self.around[-1][0] == tag:
            self.around.pop()


def test_nothing_is_wider_than_a_phone(tmp_path):
    """Tables and wide pictures lie in boxes that scroll by themselves; the small pictures are in rows that become columns."""
    folders = [
        write_run(tmp_path / name, measured=(3.2, 0.8), exam=answered(0.2)) for name in ("one", "a-run-with-a-long-name" * 3)
    ]
    text = page(tmp_path, *(with_samples(folder, sample("word" * 200)) for folder in folders))
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    boxes = Boxes(text)
    assert boxes.around == []
    assert {tag for tag, _ in boxes.found} == {"table", "svg"}
    for tag, around in boxes.found:
        assert around and around[-1] in (("scroll",) if tag == "table" else ("scroll", "row"))
    style = text[text.index("<style>") : text.index("</style>")]
    assert ".scroll { overflow-x: auto; }" in style and "overflow-wrap: break-word" in style
    narrow = style[style.index("@media (max-width: 640px)") :]
    for rule in ("position: sticky", "dl { grid-template-columns: minmax(0, 1fr); }", "minmax(min(200px, 100%), 1fr)"):
        assert rule in narrow
    for rule in ("dl.texts dd { white-space: pre-wrap; }", "dd { margin: 0; white-space: normal; overflow-wrap: anywhere; }"):
        assert rule in style


def test_differences_are_paired(tmp_path):
    """The losses of the two on the text spread far more than they differ; on the same sequences, they differ exactly."""
    first, other = write_run(tmp_path / "one", measured=(3.2, 0.8)), write_run(tmp_path / "two", measured=(3.15, 0.8))
    text = page(tmp_path, first, other)
    found = cells(text, "more than chance")
    assert list(found) == ["against one", "two"]
    assert found["two"][0] == "−0.050 −0.050 to −0.050"
    assert found["two"][1] == "+0.00000 +0.00000 to +0.00000"
    assert '<td class="better">−0.050' in text and '<td class="worse"' not in text


def test_a_figure_that_one_of_the_runs_lacks(tmp_path):
    """Of fewer than ten sequences there is no standard error."""
    runs = [write_run(tmp_path / name, measured=(2.0, kl)) for name, kl in (("few", 0.2), ("many", 0.3), ("more", 0.4))]
    for folder, error in zip(runs, (None, 0.01, 0.02), strict=True):
        path = folder / "evaluations" / "heldout.json"
        record = json.loads(path.read_text())
        record["figures"]["positions"]["student"] |= {"kl": 0.5, "kl_standard_error": error}
        path.write_text(json.dumps(record))
    assert page(tmp_path, *runs)


def test_questions(tmp_path):
    text = page(
        tmp_path,
        write_run(tmp_path / "boastful", exam=answered(0.3)),
        write_run(tmp_path / "honest", exam=answered(0.0, None)),
    )
    assert text.count("<svg") == 2 * 3 + 1  # two confidences, three sides each; curves
    table = cells(text, "Questions: exam")
    assert list(table)[1:5] == [
        "First token: the full-vocabulary probability of the option's first token",
        "boastful",
        "boastful at T = 1.8",
        "honest",
    ]
    assert "Whole sequence" not in text and "A letter is one token" in text
    assert "400 questions of <b>exam</b>. Each has 4 or 5 options and is answered by letter." in text
    # Against the first run as it is, and against it at its temperature: the control.
    plain, control = (
        cells(table, "<table") for table in re.findall(r'<table class="differences">.*?</table>', text, re.DOTALL)
    )
    assert list(plain) == ["against boastful", "boastful at T = 1.8", "honest"]
    assert list(control) == ["against boastful at T = 1.8", "boastful", "honest"]
    _, correct, scores = answers_of(4, 0.3)
    _, _, honest = answers_of(4, 0.0)
    gain = (honest["nll"] - scores["nll"]).mean()
    assert plain["honest"][1].startswith(f"{gain:+.3f}".replace("-", "−"))
    assert f"{correct.mean():.1%}" in table["honest"][0]


def test_questions_whose_options_begin_alike(tmp_path):
    some = page(tmp_path, write_run(tmp_path / "some", exam=answered(0.1, clashing=7)))
    assert "The options of 7 questions share their first token" in some
    assert some.index("Whole sequence") < some.index("First token:")
    every = page(tmp_path, write_run(tmp_path / "every", exam=answered(0.1, clashing=400)))
    assert "Whole sequence" in every and "First token:" not in every


def test_results_that_cannot_be_compared_are_not(tmp_path):
    exams = [answered(0.1, None), answered(0.2, None, sha256="11")]
    folders = [write_run(tmp_path / f"run-{index}", exam=exam) for index, exam in enumerate(exams)]
    text = page(tmp_path, *folders)
    assert "do not compare them" in text and "more than chance" not in text
    one, other, on_text, again = (
        measurement for result in (*exams, evaluation(3, 1), evaluation(4, 2)) for measurement in measurements(result)
    )
    assert not one.comparable(other) and not one.comparable(on_text) and on_text.comparable(again)


def test_a_dump_without_candidates(tmp_path):
    folder = write_run(tmp_path / "one", measured=(3.2, 0.8))
    path = folder / "evaluations" / "heldout.json"
    result = json.loads(path.read_text())
    figures = result["figures"]["positions"]
    del figures["coverage"]
    for name in ("kl_lower_bound", "top_1_agreement"):
        del figures["student"][name], figures["per_sequence"][name]
    figures["teacher"] = {"nll": 2.0}
    path.write_text(json.dumps(result))
    text = page(tmp_path, folder)
    assert text.count("<svg") == 1 + 1  # one student, curves
    assert "Agreement" not in cells(text, "On the text of a dump")[""] and "Top-k coverage" not in text


@pytest.mark.parametrize("boast", [0.0, 0.2])
def test_differences_on_questions_and_on_sequences(boast):
    one, other = confidence_of(5, boast)["answers"], confidence_of(6, 0.0)["answers"]
    found = QUESTION_FIGURES.differences(one, other)
    gap = expected_calibration_error(*answers_of(5, boast)[:2], 10) - expected_calibration_error(*answers_of(6)[:2], 10)
    assert found["ece_10"].value == pytest.approx(gap)
    assert found["nll"].value == pytest.approx(np.mean(one["nll"]) - np.mean(other["nll"]))
    assert found["accuracy"].value == 0 and not found["accuracy"].clear
    assert found["ece_15"].clear == (boast > 0)
    kept = (evaluation(3, 1, size)["figures"]["positions"]["per_sequence"] for size in (boast, 0.0))
    found = FIGURES["positions"].differences(*kept)
    mine, theirs = (expected_calibration_error(*answers_of(3, each)[:2]) for each in (boast, 0.0))
    assert found["ece_15"].value == pytest.approx(mine - theirs)
    assert found["ece_15"].low <= found["ece_15"].value <= found["ece_15"].high


def test_it_is_self_contained_and_its_pictures_are_well_formed(tmp_path):
    text = page(tmp_path, write_run(tmp_path / "one", measured=(3.2, 0.8), exam=answered(0.2)))
    assert "<script" not in text and "<link" not in text and "@import" not in text
    assert not re.search(r'(?:src|href)="(?!#|http://127\.0\.0\.1:8816/)', text)
    assert not re.search(r"url\((?!#)", text)
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    names: list[str] = []
    for picture in pictures:
        ElementTree.fromstring(picture)
        own = re.findall(r' id="([^"]*)"', picture)
        assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', picture)) <= set(own)
        names += own
        assert not re.search(r"#0[1-7]0[0-9a-f]{3}", picture)  # every stand-in colour became a variable
    assert len(names) == len(set(names))


def test_it_leads_to_the_page_of_the_store(tmp_path):
    folder = write_run(tmp_path / "a student", measured=(3.2, 0.8))
    change_record(
        folder / "evaluations/heldout.json", config={"store": "my store", "questions": None, "keep_positions": "q.parquet"}
    )
    text = page(tmp_path, folder)
    assert "knowledge-store browse &#x27;my store&#x27; --with=a_student=q.parquet" in text
    assert 'href="http://127.0.0.1:8816/#/ask/student?dump=heldout"' in text


def test_the_same_input_gives_the_same_page(tmp_path):
    folder = write_run(tmp_path / "one", measured=(3.2, 0.8))
    assert page(tmp_path, folder) == page(tmp_path, folder)


def test_missing_pieces_are_named(tmp_path):
    text = page(
        tmp_path,
        write_run(tmp_path / "unmeasured"),
        write_run(tmp_path / "base", run=False, history=False, measured=(4.0, 2.0)),
    )
    assert "Not evaluated: <b>unmeasured</b>" in text
    assert "No curve for <b>base</b>" in text
    assert "no training run here" not in text and "What it cost" in text
    bare = page(tmp_path, write_run(tmp_path / "bare", history=False))
    assert "None of these folders has a history" in bare


def test_runs_of_one_name_are_distinguished(tmp_path):
    text = page(
        tmp_path, write_run(tmp_path / "a" / "run", measured=(3, 1)), write_run(tmp_path / "b" / "run", measured=(3, 1))
    )
    assert "a/run" in text and "b/run" in text


def test_bad_input(tmp_path):
    with pytest.raises(InputError, match="there is no run"):
        write_report([tmp_path / "absent"], tmp_path / "report.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither a training run nor an evaluation"):
        write_report([tmp_path / "empty"], tmp_path / "report.html")
    folder = write_run(tmp_path / "one")
    with pytest.raises(InputError, match="is a folder"):
        write_report([folder], tmp_path)
    (folder / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json is not a JSON file"):
        write_report([folder], tmp_path / "report.html")
    (folder / "run.json").write_text("5")
    with pytest.raises(InputError, match=r"run\.json is not the record of a training run: it has no 'identity'"):
        write_report([folder], tmp_path / "report.html")
    (folder / "run.json").unlink()
    (folder / "evaluations" / "notes.json").write_text("{}")
    with pytest.raises(InputError, match=r"notes\.json is not the result of `student-train evaluate`"):
        write_report([folder], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_it_needs_no_torch():
    code = "import sys, student_train.report.html; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def strings(value: object, place: tuple = ()) -> Iterator[tuple]:
    """Where there is text in a JSON value."""
    if isinstance(value, str):
        yield place
    elif isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from strings(each, (*place, key))


def changed(value: dict, place: tuple, new: object) -> dict:
    """A copy of a JSON value with one place of it replaced."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = new
    return copy


def test_no_text_of_a_file_gets_into_the_page_as_it_is(tmp_path):
    """Every text in the three files, the names of folders and files, and keys that are free to choose."""
    hostile = "<script>alert(1)</script>\"'"
    folder = write_run(tmp_path / "<script>$\\x$", measured=(3.2, 0.8), exam=answered(0.2), rationale=RATIONALE)
    with_samples(folder, sample("x"))
    for path in (folder / "run.json", *folder.glob("evaluations/*.json")):
        record = json.loads(path.read_text())
        if path.name == "run.json":
            record["config"] |= {"tail": "draws", "calibration": "c.json", "where": "a", "positions_where": "b", hostile: 1}
            record["sequences"][hostile] = 1
        record["versions"][hostile] = "1"
        for place in strings(record):
            record = changed(record, place, hostile)
        path.write_text(json.dumps(record))
    (folder / "evaluations" / "heldout.json").rename(folder / "evaluations" / "<script>.json")
    text = page(tmp_path, folder, write_run(tmp_path / "two", exam=json.loads((folder / "evaluations/exam.json").read_text())))
    assert "<script" not in text and "&lt;script&gt;alert" in text
