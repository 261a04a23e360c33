"""Habits of all three commands: usage errors of one line, and names of dumps that a shell completes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from command_server import forked_command
from conftest import PATIENCE, ROOT, make_tokenizer, write_jsonl
from stores import write_store
from typer.main import get_command
from typer.testing import CliRunner

import knowledge_store.cli
import student_train.cli
import teacher_dump.cli
from knowledge_store.options import option_of
from student_train.training.configuration import TrainConfig
from teacher_dump.configuration import RunConfig

APPS = {
    "knowledge-store": knowledge_store.cli.app,
    "teacher-dump": teacher_dump.cli.app,
    "student-train": student_train.cli.app,
}


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        ("knowledge-store", ["sqll"], "no such command 'sqll'"),
        ("knowledge-store", ["view", "store"], "missing argument 'DUMP'"),
        ("knowledge-store", ["view", "store", "dump", "more"], "got unexpected extra argument"),
        ("knowledge-store", ["sql", "store", "SELECT 1", "--format", "xml"], "'xml' is not one of 'table', 'csv', 'json'"),
        ("knowledge-store", ["sql", "store", "SELECT 1", "--timeout", "soon"], "invalid value for '--timeout'"),
        ("teacher-dump", ["check", "store"], "missing option '--teacher'"),
        ("teacher-dump", ["check", "store", "--teacher"], "option '--teacher' requires an argument"),
        ("teacher-dump", ["estimate", "--teacher"], "option '--teacher' requires an argument"),
        ("teacher-dump", ["estimate", "--teacher", "t", "--corpus", "c.jsonl", "--topk", "3"], "no such option: --topk"),
        ("teacher-dump", ["check", "store", "--teacher", "t", "--seed", "1", "--seed", "2"], "--seed is given 2 times"),
        ("student-train", ["run", "--teachers", "a", "--teachers", "b"], "write all that it takes in one, with commas"),
        ("student-train", ["run", "store", "--student", "s"], "missing option '--output'"),
        ("student-train", ["report"], "missing argument 'RUN...'"),
    ],
)
def test_a_usage_error_is_one_line_that_names_the_help(program, words, message):
    result = CliRunner().invoke(APPS[program], words, prog_name=program)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    assert result.stderr.startswith("Error: ") and message in result.stderr
    assert f"`{program} {'' if words == ['sqll'] else f'{words[0]} '}--help` lists what it takes" in result.stderr


@pytest.mark.parametrize("program", APPS)
def test_without_a_command_the_help_is_shown(program):
    result = CliRunner().invoke(APPS[program], [], prog_name=program)
    assert result.exit_code == 2 and "Usage: " in result.output and "Error" not in result.output


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("knowledge-store", "view STORE "),
        ("knowledge-store", "sequence STORE 0 --dump "),
        ("teacher-dump", "check STORE --dump "),
        ("student-train", "run STORE --dump s"),
        ("student-train", "evaluate STORE --dump s"),
    ],
)
def test_names_of_dumps_are_completed(program, words, tmp_path, monkeypatch, capsys):
    store = write_store(tmp_path / "store", shards=1)
    monkeypatch.setenv("_COMPLETE", "complete_bash")
    line = f"{program} {words}".replace("STORE", str(store))
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    with pytest.raises(SystemExit):
        get_command(APPS[program]).main([], program, "_COMPLETE")
    assert capsys.readouterr().out.split() == ["small"]


@pytest.mark.parametrize("program", APPS)
def test_help_shows_choices_and_what_is_required_first(program):
    for command in get_command(APPS[program]).commands.values():
        options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
        required = [option.required for option in options]
        assert required == sorted(required, reverse=True), command.name
    shown = CliRunner().invoke(APPS["student-train"], ["evaluate", "--help"], env={"COLUMNS": "200"}).stdout
    assert "letter | text" in shown and "--output                      <path>" in shown


@pytest.mark.parametrize("program", APPS)
def test_help_is_whole_in_80_columns(program):
    """No name, choice or word is cut."""
    commands = get_command(APPS[program]).commands
    for words, parameters in (([], []), *(([name], command.params) for name, command in commands.items())):
        shown = CliRunner().invoke(APPS[program], [*words, "--help"], env={"COLUMNS": "80"}).stdout
        assert "Usage" in shown and "…" not in shown, words
        assert max(map(len, shown.splitlines())) <= 80
        for parameter in parameters:
            name = parameter.opts[0] if parameter.param_type_name == "option" else ""
            for word in (name, *(parameter.metavar or "").split(" | ")):
                assert re.search(rf"(?<!\S){re.escape(word)}(?!\S)", shown), (words, word)


def test_the_help_of_many_options_has_panels():
    for app, config in (("student-train", TrainConfig), ("teacher-dump", RunConfig)):
        shown = CliRunner().invoke(APPS[app], ["run", "--help"], env={"COLUMNS": "80"}).stdout
        titles = re.findall(r"╭─ (.*?) ─", shown)
        assert titles == ["Arguments", "Options", *config.PANELS]
        options = {field.name for field in fields(config) if option_of(field)}
        assert options >= {name for names in config.PANELS.values() for name in names}


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("knowledge-store", "info ADDRESS"),
        ("knowledge-store", "sql ADDRESS FROM\tdumps"),
        ("knowledge-store", "verify ADDRESS"),
        ("knowledge-store", "copy ADDRESS copied"),
        ("knowledge-store", "copy STORE ADDRESS"),
        ("teacher-dump", "run ADDRESS --teacher nobody --corpus nothing.jsonl"),
        ("teacher-dump", "check ADDRESS --teacher nobody"),
        ("student-train", "run ADDRESS --student nobody --output run"),
        ("student-train", "evaluate ADDRESS --model nobody"),
        ("student-train", "calibrate ADDRESS"),
    ],
)
def test_an_address_that_no_storage_serves_is_refused_by_name(program, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_store("store")
    before = sorted(tmp_path.iterdir())
    values = {"ADDRESS": "ftp://bucket/store", "STORE": "store"}
    arguments = [values.get(word, word).replace("\t", " ") for word in words.split(" ")]
    result = CliRunner().invoke(APPS[program], arguments, prog_name=program)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.output
    sentence = (
        "Error: ftp://bucket/store is no address of a store: give a folder, s3://BUCKET/PREFIX (also gs:// and az://), or"
        " grpc+tls://HOST:PORT\n"
    )
    assert result.stderr == sentence
    assert sorted(tmp_path.iterdir()) == before


PREVIEW = ("preview", "--corpus", "rows.jsonl", "--teacher", "tokenizer", "--max-length", "40")


@pytest.fixture
def rows(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_tokenizer().save_pretrained("tokenizer")
    return write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Who lit\tit?", "completion": " Zoë\ndid."}])


@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        ("ascii", ["[[_|Z", "\\xeb", "\\t", "\\n\n", "]]"]),
        ("cp1252", ["[[·|Z", "ë", "]]"]),
        ("utf-8", ["⟦·│Z", "ë", "↵\n", "⟧"]),
    ],
)
def test_signs_that_an_encoding_lacks_are_shown_in_ascii(encoding, words, rows):
    tokenizers = "from transformers import AutoTokenizer"
    shown = forked_command("teacher_dump", *PREVIEW, before=tokenizers, cwd=rows.parent, encoding=encoding)
    assert (shown.returncode, shown.stderr) == (0, "")
    for word in words:
        assert word in shown.stdout


@pytest.mark.parametrize(
    ("program", "words"),
    [("knowledge-store", ["info", "store"]), ("student-train", ["run", "--help"]), ("teacher-dump", ["--version"])],
)
def test_standard_output_that_cannot_be_written_is_one_line(program, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_store("store")
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    command = [sys.executable, "-m", f"{program.replace('-', '_')}.cli", *words]
    with full.open("w") as stdout:
        pipes, environment = {"stdout": stdout, "stderr": subprocess.PIPE}, {**os.environ, "PYTHONPATH": str(ROOT)}
        refused = subprocess.run(command, **pipes, env=environment, text=True, timeout=PATIENCE, check=False)
    sentence = "Error: standard output cannot be written: No space left on device\n"
    assert (refused.returncode, refused.stderr) == (2, sentence)
