"""The options of `teacher-dump`: each is declared once and explained, and a mistake is told before torch is imported for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
from conftest import ROOT, story_rows, write_jsonl
from typer.testing import CliRunner

from knowledge_store.errors import InputError
from knowledge_store.options import flag_of, option, option_of
from teacher_dump import CalibrateConfig, CheckConfig, DumpConfig, EstimateConfig
from teacher_dump.cli import app
from teacher_dump.configuration import RunConfig
from teacher_dump.extraction import EXTRACTORS, Extractor, option_classes
from teacher_dump.extraction.extractor import NoOptions

COMMANDS = {"run": RunConfig, "estimate": EstimateConfig, "calibrate": CalibrateConfig, "check": CheckConfig}


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained_in_whole_sentences_and_the_help_names_an_example(command):
    # What `append` alone sets, and what the teacher's abilities decide, are no options.
    options = [field for field in fields(COMMANDS[command]) if field.name not in ("like", "tail")]
    for field in options:
        declared = option_of(field)
        assert declared is not None and declared.help[0].isupper() and declared.help.endswith("."), field.name
    result = CliRunner().invoke(app, [command, "--help"], terminal_width=200)
    text = " ".join(result.stdout.split())
    store = "knowledge/ " if command in ("run", "check") else ""
    assert result.exit_code == 0 and f"Example: teacher-dump {command} {store}--teacher" in text
    for field in options:
        assert field.name == "store" or flag_of(field) in text, field.name


def test_the_version():
    result = invoke("--version")
    assert result.exit_code == 0 and result.stdout.startswith("knowledge-store 0.")


@pytest.mark.parametrize("command", ["run", "estimate", "calibrate"])
def test_an_option_given_twice_is_refused(command):
    store = ["store"] if command == "run" else []
    result = invoke(command, *store, "--teacher", "a", "--teacher", "b", "--corpus", "c.jsonl")
    assert result.exit_code == 2 and "--teacher is given 2 times" in result.stderr


@pytest.mark.parametrize("corpus", [["books.jsonl", "knowledge/"], ["books.jsonl"]])
def test_a_store_that_was_forgotten_is_asked_for(corpus):
    result = invoke("run", "--teacher", "t", "--corpus", *corpus)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("Error: STORE is missing: name the store before the options")
    assert "what follows --corpus are files of the corpus" in result.stderr


@pytest.mark.parametrize("given", ["a.jsonl", Path("a.jsonl"), ["a.jsonl"], ("a.jsonl",), (Path("a.jsonl"),)])
def test_from_python_paths_are_text_or_paths_and_a_corpus_is_one_file_or_several(given):
    config = DumpConfig(teacher=Path("models/tiny"), corpus=given, store="store", calibration="fit.json")
    assert config == DumpConfig("models/tiny", (Path("a.jsonl"),), "store", calibration=Path("fit.json"))
    assert config.dump_name == "tiny-a"
    assert CalibrateConfig("tiny", given, output="o.json").output == Path("o.json")
    assert CheckConfig("store", "tiny").store == "store"


def test_several_kinds_are_chosen_by_repeating_the_option():
    config = DumpConfig("t", (Path("c.jsonl"),), Path("s"))
    result = invoke("run", "s", "--teacher", "t", "--corpus", "c.jsonl", "--kind", "positions", "--kind", "moods")
    assert result.exit_code == 2 and "there is no --kind moods: choose from positions" in result.stderr
    result = invoke("estimate", "--teacher", "t", "--corpus", "c.jsonl", "--kind", "moods")
    assert result.exit_code == 2 and "there is no --kind moods" in result.stderr
    result = invoke("estimate", "--teacher", "t", "--corpus", "c.jsonl", "--kind", "")
    assert result.exit_code == 2 and "there is no --kind '': choose from positions" in result.stderr
    result = invoke("estimate", "--teacher", "t", "--corpus", "c.jsonl", "--kind", "positions", "--kind", "positions")
    assert result.exit_code == 2 and "--kind positions is given 2 times: name each kind once" in result.stderr
    with pytest.raises(InputError, match="at least one --kind"):
        replace(config, kinds=())


@dataclass(frozen=True, kw_only=True)
class Depth:
    top_k: int = option(1, help="A depth.")


def test_the_options_of_a_kind_go_with_the_kind(monkeypatch):
    depths = Extractor(frozenset(), lambda batch: [], options=Depth)
    with monkeypatch.context() as patch, pytest.raises(TypeError, match="'positions' and 'depths' both have an option 'top_k'"):
        patch.setitem(EXTRACTORS, "depths", depths)
        option_classes()
    monkeypatch.setitem(EXTRACTORS, "moods", replace(depths, options=NoOptions))
    config = DumpConfig("t", (Path("c.jsonl"),), Path("s"), kinds=("moods",))
    with pytest.raises(InputError, match="--top-k is an option of --kind positions, which is not given"):
        replace(config, top_k=3)
    assert replace(config, kinds=("moods", "positions"), top_k=3).kind_options("positions").rule.candidates == 3


def mood(frozen: bool) -> type:
    @dataclass(frozen=frozen)
    class Mood:
        mood: int = option(1, help="A mood.")

    return Mood


@pytest.mark.parametrize("options", [mood(frozen=True), dataclass(kw_only=True)(mood(frozen=False)), int])
def test_options_of_a_kind_that_no_command_can_have(monkeypatch, options):
    """They would take places among the positional fields of a command, or break its class."""
    monkeypatch.setitem(EXTRACTORS, "moods", Extractor(frozenset(), lambda batch: [], options=options))
    with pytest.raises(TypeError, match=r"of the kind 'moods' .*declare \w+ with @dataclass\(frozen=True, kw_only=True\)"):
        option_classes()


# --- what is told before torch is imported --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory) -> dict[str, str]:
    """An environment in which importing torch or transformers fails, though both are installed."""
    folder = tmp_path_factory.mktemp("stubs")
    for name in ("torch", "transformers"):
        (folder / f"{name}.py").write_text("raise AssertionError('imported too early')\n")
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


# Runs command lines one after the other, each in a fork of a process that has imported the commands, which takes longest.
ONE_AFTER_ANOTHER = """
import json, os, sys
from teacher_dump.cli import main
for arguments in json.load(open(sys.argv[1])):
    output = sys.argv[1] + ".output"
    pid = os.fork()
    if pid == 0:
        out, err = (os.open(output + end, os.O_CREAT | os.O_WRONLY | os.O_TRUNC) for end in (".out", ".err"))
        os.dup2(out, 1), os.dup2(err, 2)
        sys.argv = ["teacher-dump", *arguments]
        main()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    # Flushed: what is still in the buffer would be written by the next fork too.
    print(json.dumps([code, open(output + ".out").read(), open(output + ".err").read()]), flush=True)
"""


def told(without_torch, folder: Path, commands: list[list[object]]) -> list[str]:
    """The one line that each command says in such an environment."""
    lines = folder / "commands.json"
    lines.write_text(json.dumps([list(map(str, arguments)) for arguments in commands]))
    program = [sys.executable, "-c", ONE_AFTER_ANOTHER, str(lines)]
    result = subprocess.run(program, capture_output=True, text=True, env=without_torch, cwd=folder, check=True)
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(answers) == len(commands)
    for code, out, err in answers:
        assert code == 2 and out == "", (code, out, err)
        assert err.count("\n") == 1 and err.startswith("Error: "), err
    return [err for _, _, err in answers]


def test_mistakes_are_told_before_torch_is_imported(without_torch, store_folder, teacher_folder, tmp_path):
    write_jsonl(tmp_path / "c.jsonl", story_rows(2))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").touch()
    (tmp_path / "broken").mkdir()
    shutil.copy(teacher_folder / "config.json", tmp_path / "broken/config.json")
    shutil.copytree(store_folder, tmp_path / "store")
    corpus, teacher = ["--corpus", "c.jsonl"], ["--teacher", teacher_folder]
    train = ["--corpus", store_folder.parent / "train.jsonl", "--name", "train", *teacher]
    mistakes = (
        (["run", "new", *teacher, "--corpus", "none.jsonl"], "there is no file none.jsonl"),
        (["run", "new", *teacher, *corpus, "--name", "../up"], "cannot name a dump"),
        (["run", "new", *teacher, *corpus, "--rank", 3], "--rank 3 is given without --world-size"),
        (["run", "new", *teacher, *corpus, "--calibration", "none.json"], "there is no calibration file none.json"),
        (["run", "new", "--teacher", "broken", *corpus], "broken has no weights that can be used"),
        (["run", "new", "--teacher", "./nosuch", *corpus], "there is no folder ./nosuch, and"),
        (["run", "new", "--teacher", "nosuch", *corpus], "there is no folder nosuch, and"),
        (["run", "new", *teacher, *corpus, "--topk", 3], "no such option: --topk"),
        (["run", "new", "--teacher", "nosuch/a/b", *corpus], "there is no folder nosuch/a/b, and"),
        (["estimate", "--teacher", "broken/nosuch", *corpus], "there is no folder broken/nosuch, and"),
        (["run", "photos", *teacher, *corpus], "photos is not a knowledge store"),
        (["run", "store", *teacher, *corpus, "--repair", "--name", "other"], "there is no dump 'other' in store to repair"),
        (["run", "store", *train, "--max-length", 48, "--shard-size", 8, "--top-k", 6], "--top-k was 5 and is now 6. Use"),
        (["run", "store", *train, "--max-length", 48], "--shard-size was 8 and is now 512. Use"),
        (
            ["run", "store", *corpus, "--name", "train", *teacher, "--max-length", 48, "--shard-size", 8],
            "c.jsonl has other con",
        ),
        (["run", "store", *train, "--dtype", "bfloat16"], "--dtype was float32 and is now bfloat16"),
        (["estimate", *teacher, "--corpus", "none.jsonl"], "there is no file none.jsonl"),
        (["estimate", "--teacher", "broken", *corpus], "broken has no weights that can be used"),
        (["calibrate", *teacher, "--corpus", "none.jsonl"], "there is no file none.jsonl"),
        (["calibrate", *teacher, *corpus, "--max-length", 48, "--output", "c.jsonl"], "is no calibration"),
        (["calibrate", *teacher, *corpus], "--max-length 512 is above the 256 positions the teacher knows"),
        (["run", "new", *teacher, *corpus, "--max-length", 257], "--max-length 257 is above the 256 positions"),
        (["estimate", *teacher, *corpus, "--max-length", 48, "--top-k", 409], "--top-k 409 is above the teacher's vocabulary"),
        (["check", "none", *teacher], "there is no store at none"),
        (["check", "store", *teacher], "name a dump"),
        (["check", "store", *teacher, "--dump", "other"], "has no dump 'other'"),
    )
    answers = told(without_torch, tmp_path, [arguments for arguments, _ in mistakes])
    for (arguments, message), answer in zip(mistakes, answers, strict=True):
        assert message in answer, arguments
    assert not (tmp_path / "new").exists()


def test_that_check_can_fail(without_torch, teacher_folder, tmp_path):
    write_jsonl(tmp_path / "c.jsonl", story_rows(2))
    line = [sys.executable, "-m", "teacher_dump.cli", "run", "new", "--teacher", teacher_folder, "--corpus", "c.jsonl"]
    line += ["--max-length", "48"]
    result = subprocess.run(line, capture_output=True, text=True, env=without_torch, cwd=tmp_path, check=False)
    assert "imported too early" in result.stderr


def test_the_protocol_of_teachers_and_the_corpus_import_no_torch(without_torch):
    modules = [
        *("teacher_dump.teachers.protocol", "teacher_dump.teachers.files", "teacher_dump.corpus.tokenisation"),
        *("teacher_dump.dumping.run", "teacher_dump.dumping.repair", "teacher_dump.checking.run", "teacher_dump.cli"),
    ]
    code = "\n".join(f"import {module}" for module in modules)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=without_torch, check=False)
    assert result.returncode == 0, result.stderr
