"""The report: one file, complete, honest about what is missing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from knowledge_store.errors import InputError
from student_train.report import write_report

DUMP = {
    "name": "heldout",
    "store": "store",
    "teacher": "a <teacher> & friends",
    "vocabulary_size": 512,
    "top_k": 5,
    "quantisation_step": 0.125,
    "sequences": 9,
    "positions": 4200,
    "targets": 4000,
    "bytes": 60_000,
}
CONFIG = {"loss": "forward-kl", "ce_weight": 0.2, "temperature": 1.0, "first_c": 0.28, "seed": 0, "dump": None}


def side(nll: float) -> dict:
    bins = np.linspace(0.03, 0.97, 15)
    reliability = {"counts": [10] * 15, "confidence": bins.tolist(), "accuracy": (bins * 0.9).tolist()}
    return {"nll": nll, "accuracy": 0.4, "ece_10": 0.02, "ece_15": 0.0213, "reliability": reliability}


def evaluation(nll: float, kl: float) -> dict:
    return {
        "model": "model",
        "parameters": 1234,
        "dump": DUMP,
        "positions": 4000,
        "sequences": 9,
        "seconds": 3.5,
        "student": {**side(nll), "kl_lower_bound": kl, "top_1_agreement": 0.61},
        "teacher": side(2.0),
        "coverage": {
            "mean_by_rank": [0.3, 0.4, 0.5, 0.55, 0.62],
            "histogram": {"edges": np.linspace(0, 1, 21).tolist(), "counts": [200] * 20},
        },
        "versions": {"python": "3.11"},
    }


def write_run(folder: Path, *, run: bool = True, history: bool = True, measured: tuple[float, float] | None = None) -> Path:
    folder.mkdir(parents=True)
    if run:
        record = {
            "config": CONFIG,
            "dump": {**DUMP, "name": "train"},
            "sequences": {"train": 90, "eval": 4},
            "world_size": 1,
            "parameters": 1234,
            "versions": {"python": "3.11"},
        }
        (folder / "run.json").write_text(json.dumps(record))
    if history:
        entries = [
            {"step": step, "eval_loss": 1.0, "eval_kl": 1 / (step + 1), "eval_nll": 3 / (step + 1), "seconds": step}
            for step in range(5)
        ]
        entries.append({"step": 5, "loss": 0.5, "seconds": 5})
        (folder / "history.json").write_text(json.dumps({"finished": True, "seconds": 83.0, "entries": entries}))
    if measured:
        (folder / "evaluations").mkdir()
        (folder / "evaluations" / "heldout.json").write_text(json.dumps(evaluation(*measured)))
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
    assert re.findall(r'<td class="best">([^<]*)</td>', text)[:2] == ["61.0%", "40.0%"]  # ties are both marked
    assert '<td class="best">3.100</td>' in text and '<td class="best">0.500</td>' in text
    assert "lower bound" in text and "1 min 23 s" in text and "62.0%" in text
    assert "a &lt;teacher&gt; &amp; friends" in text and "<teacher>" not in text
    assert "4,200" in text and "14.3 bytes a position" in text and "python 3.11" in text


def test_it_is_self_contained_and_its_pictures_are_well_formed(tmp_path):
    text = page(tmp_path, write_run(tmp_path / "one", measured=(3.2, 0.8)))
    assert "<script" not in text and "<link" not in text and "@import" not in text
    assert not re.search(r'(?:src|href)="(?!#)', text)
    assert not re.search(r"url\((?!#)", text)
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    names: list[str] = []
    for picture in pictures:
        ElementTree.fromstring(picture)
        own = re.findall(r' id="([^"]*)"', picture)
        assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', picture)) <= set(own)
        names += own
        assert not re.search(r"#0[1-5]0[0-9a-f]{3}", picture)  # every stand-in colour became a variable
    assert len(names) == len(set(names))


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
    assert "no training run here" in text
    bare = page(tmp_path, write_run(tmp_path / "bare", history=False))
    assert "None of these folders has a history" in bare


def test_runs_of_one_name_are_told_apart(tmp_path):
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
    with pytest.raises(InputError, match=r"run\.json cannot be read"):
        write_report([folder], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_it_needs_no_torch():
    code = "import sys, student_train.report; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
