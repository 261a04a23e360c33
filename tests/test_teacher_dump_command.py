"""`teacher-dump` as people meet it: what it says, how it ends, and that a mistake leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, story_rows, write_jsonl
from processes import Command, Finished

from knowledge_store import KnowledgeStore


@pytest.fixture
def command(tmp_path, teacher_folder):
    """`teacher-dump` in a folder of its own, with a teacher, a corpus and a store unless others are given."""
    write_jsonl(tmp_path / "corpus.jsonl", story_rows(6))

    def run(*arguments: object, store: object = tmp_path / "store", teacher: object = teacher_folder, **options) -> Finished:
        given = {"teacher": teacher, "max_length": 40, **options}
        line = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
        if "--corpus" not in arguments:
            line += ["--corpus", tmp_path / "corpus.jsonl"]
        return Command("run", store, *line, *arguments, folder=tmp_path.parent / f"{tmp_path.name}-log").wait()

    return run


def refused(result: Finished, *says: str) -> None:
    """Exit code 2, and one line that says what is wrong."""
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.returncode == 2, result
    assert len(errors) == 1 and result.stdout == "" and "Traceback" not in result.stderr, result
    for words in says:
        assert words in errors[0]


def test_a_run_says_what_it_did_and_a_second_one_that_nothing_was_left_to_do(command, tmp_path):
    first = command(shard_size=4)
    assert first.returncode == 0 and first.stdout == ""
    assert "tiny-corpus: 2 of 2 shards dumped;" in first.stderr and "positions/s" in first.stderr
    for figure in ("bytes/position", "mass of the candidates", "100%"):
        assert figure in first.stderr
    second = command(shard_size=4)
    assert second.returncode == 0
    assert "tiny-corpus: 0 of 2 shards dumped, 2 existed; 0 positions" in second.stderr
    assert KnowledgeStore.open(tmp_path / "store").info()[0].complete


def test_several_corpus_files_after_one_option(command, tmp_path):
    for name in "abc":
        write_jsonl(tmp_path / f"{name}.jsonl", story_rows(2))
    result = command("--corpus", *(tmp_path / f"{name}.jsonl" for name in "abc"), "--name", "three")
    assert result.returncode == 0, result
    files = KnowledgeStore.open(tmp_path / "store").sql("SELECT DISTINCT file FROM sequences ORDER BY file")
    assert files["file"].to_pylist() == ["a.jsonl", "b.jsonl", "c.jsonl"]


LONG = {"prompt": "Far?", "completion": " As far" * 40}


def test_rows_that_are_left_out_are_counted_by_reason_and_rows_that_are_cut_too(command, tmp_path):
    rows = ['{"text": "The lamp burns."}', "broken", "worse", "{}", json.dumps(LONG)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(rows))
    missing = "none of the columns that a row is read by"
    more = f"(2 more rows cannot be used: 1 not JSON; 1 {missing})"
    refused(command(), "corpus.jsonl, line 2: not JSON", more, "--skip-bad-rows")
    assert not (tmp_path / "store").exists()
    result = command("--skip-bad-rows")
    assert result.returncode == 0, result
    assert f"Warning: 2 of 5 rows are used, 3 left out (60%): 2 not JSON; 1 {missing}" in result.stderr
    assert "Warning: 1 row is cut at 40 tokens (50%); 1 answer loses the end" in result.stderr
    [summary] = KnowledgeStore.open(tmp_path / "store").info()
    assert summary.truncated == 1 and list(summary.skip_reasons.items()) == [("not JSON", 2), (missing, 1)]
    assert summary.counts.rows_used == summary.sequences == 2 and summary.counts.positions == summary.positions
    record = json.loads((tmp_path / "store/tiny-corpus/commits/00000.json").read_text())
    assert [(row["row"], row["reason"], row["detail"].split(" (")[0].split(": ")[0]) for row in record["skipped"]] == [
        (2, "not JSON", "not JSON"),
        (3, "not JSON", "not JSON"),
        (4, missing, missing),
    ]


def test_rows_that_are_too_long_can_be_left_out_or_refused(command, tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", [{"text": "The lamp burns. " * 20}, LONG, LONG])
    longer = "longer than --max-length"
    refused(command(too_long="refuse"), f"corpus.jsonl, line 2: {longer} (it has", f"(1 more row cannot be used: 1 {longer})")
    refused(command("--skip-bad-rows", too_long="refuse"), "Give a larger --max-length, or use --too-long cut or skip")
    refused(command(too_long="burn"), "--too-long is 'burn'; it must be cut, skip or refuse")
    result = command(too_long="skip")
    assert result.returncode == 0, result
    assert f"1 of 3 rows is used, 2 left out (67%): 2 {longer}" in result.stderr
    [summary] = KnowledgeStore.open(tmp_path / "store").info()
    assert (summary.truncated, summary.counts.cut, summary.skip_reasons) == (0, 0, {longer: 2})
    refused(command(), "--too-long was skip and is now cut")


def test_more_rows_left_out_than_allowed_stop_a_run_before_the_teacher_is_loaded(command, tmp_path, teacher_folder):
    (tmp_path / "corpus.jsonl").write_text('{"text": "The lamp burns."}\nbroken\n' + '{"text": "A boat."}\n' * 8)
    no_weights = shutil.copytree(teacher_folder, tmp_path / "tiny")
    (no_weights / "model.safetensors").write_bytes(b"not weights at all")
    refused(
        command("--skip-bad-rows", max_skipped=0.05, teacher=no_weights),
        "1 of 10 rows would be left out (10%), and --max-skipped allows 5%: 1 not JSON (the first: ",
        "corpus.jsonl, line 2: not JSON",
    )
    assert not (tmp_path / "store").exists()
    assert command("--skip-bad-rows", max_skipped=0.1).returncode == 0


# --- mistakes -----------------------------------------------------------------------------------------------------------

TOO_LONG = json.dumps({"prompt": "The lamp " * 60, "completion": "burns"})

CORPORA = {
    "nothing in it": (b"", "corpus.jsonl is empty"),
    "blank lines alone": (b"\n\n", "no row that can be used"),
    "empty texts alone": (b'{"text": ""}\n', "corpus.jsonl, line 1: nothing to learn from"),
    "no such columns": (b'{"text": "x"}\n{"title": "x"}\n', "corpus.jsonl, line 2: none of the columns"),
    "not UTF-8": (b'{"text": "x"}\n{"text": "\xff"}\n', "corpus.jsonl, line 2: not UTF-8 (byte 11 of the line)"),
    "a prompt too long": (b'{"text": "x"}\n' + TOO_LONG.encode(), "corpus.jsonl, line 2: the prompt leaves no room"),
    "no assistant": (b'{"messages": [{"role": "user", "content": "x"}]}', "corpus.jsonl, line 1: no message has the role"),
}


@pytest.mark.parametrize("case", CORPORA)
def test_a_corpus_that_cannot_be_used(command, tmp_path, case):
    content, message = CORPORA[case]
    (tmp_path / "corpus.jsonl").write_bytes(content)
    refused(command(), message)
    assert not (tmp_path / "store").exists()


OPTIONS = [
    ({"top_k": 409}, "--top-k 409 is above the teacher's vocabulary of 408"),
    ({"top_k": 0}, "--top-k is 0"),
    ({"max_length": 257}, "--max-length 257 is above the 256 positions"),
    ({"batch_size": 0}, "--batch-size is 0"),
    ({"shard_size": -1}, "--shard-size is -1"),
    ({"rank": 2, "world_size": 2}, "--rank 2 is not one of --world-size 2"),
    ({"dtype": "int8"}, "--dtype is 'int8'; it must be auto, float32, bfloat16 or float16"),
    ({"device": "abacus"}, "torch has no device 'abacus'"),
    ({"name": "../up"}, "'../up' cannot name a dump"),
    ({"name": ".hidden"}, "cannot name a dump"),
    ({"teacher": "no/such-teacher"}, "there is no folder no/such-teacher"),
    ({"gguf_file": "x.gguf"}, "there is no GGUF file"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_an_option_that_cannot_be_used(command, tmp_path, options, message):
    refused(command(**options), message)
    assert not (tmp_path / "store").exists()


def test_a_corpus_file_that_is_not_there(command, tmp_path):
    refused(command("--corpus", tmp_path / "none.jsonl"), "there is no file", "none.jsonl")
    refused(command("--corpus", tmp_path), "is a folder")
    assert not (tmp_path / "store").exists()


def test_a_teacher_that_cannot_be_loaded(command, tmp_path, teacher_folder):
    broken = shutil.copytree(teacher_folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not weights at all")
    refused(command(teacher=broken), "the teacher in", "cannot be loaded")
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    refused(command(teacher=broken), "weights must be safetensors or GGUF files")
    assert not (tmp_path / "store").exists()


def test_a_store_path_that_is_something_else_is_left_as_it_is(command, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(command(store=tmp_path / "file"), "is a file, not a store")
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    refused(command(store=tmp_path / "photos"), "photos is not a knowledge store")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_an_empty_folder_becomes_a_store(command, tmp_path):
    (tmp_path / "store").mkdir()
    assert command().returncode == 0


def test_resuming_with_something_else_is_refused_and_what_differs_is_said(command):
    assert command().returncode == 0
    refused(command(top_k=4), "--top-k was 5 and is now 4", "another --name")


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_a_missing_extra_is_named(tmp_path, missing):
    """In a fresh interpreter that cannot find the package, as where it was never installed."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class Without(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        f"        return None if name.split('.')[0] == {missing!r} else PathFinder.find_spec(name, path, target)\n"
        "sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]\n"
    )
    line = [sys.executable, "-m", "teacher_dump.cli", "run", "s", "--teacher", "t", "--corpus", "c.jsonl"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    result = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert result.stderr == f"Error: teacher-dump needs {missing}: pip install 'knowledge-store[teacher]'\n"
    assert not Path(tmp_path / "s").exists()
