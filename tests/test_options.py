"""Options declared once: the limits of a configuration's fields, what is said of a value outside them, and files of options."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from knowledge_store.errors import InputError
from knowledge_store.options import check_options, option
from knowledge_store.terminal.commands import application, command
from knowledge_store.terminal.configuration_file import file_text, option_values


@dataclass(frozen=True)
class Settings:
    share: float = option(0.5, min=0, below=1, help="A share.")
    scale: float | None = option(None, above=0, max=1000, help="A scale.")
    batch_size: int = option(8, min=1, flag="--batch", help="A size.")
    tail: str = option("auto", choices=("auto", "draws", "bucket"), help="A choice.")
    exact: bool = option(True, min=2, help="A switch, which has no size.")
    internal: int = -1


@pytest.mark.parametrize("changes", [{}, {"share": 0}, {"scale": 1000}, {"batch_size": 1}, {"tail": "bucket"}, {"internal": 7}])
def test_values_within_the_limits(changes):
    check_options(replace(Settings(), **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 1.0}, "--share is 1.0; it must be at least 0 and below 1"),
        ({"share": -0.1}, "--share is -0.1; it must be at least 0 and below 1"),
        ({"share": float("nan")}, "--share is nan; it must be at least 0 and below 1"),
        ({"scale": 0.0}, "--scale is 0.0; it must be above 0 and at most 1,000"),
        ({"scale": float("inf")}, "--scale is inf; it must be above 0 and at most 1,000"),
        ({"batch_size": 0}, "--batch is 0; it must be at least 1"),
        ({"tail": "head"}, "--tail is 'head'; it must be auto, draws or bucket"),
    ],
)
def test_values_outside_the_limits_are_refused_by_name(changes, message):
    with pytest.raises(InputError) as caught:
        check_options(replace(Settings(), **changes))
    assert str(caught.value) == message


class Format(StrEnum):
    short = "short"
    long = "long"


@dataclass(frozen=True)
class Work:
    """Options of every type that a command takes."""

    place: str = option(argument=True, help="Where.")
    name: str = option(help="What.")
    share: float = option(0.5, min=0, max=1, help="A share.")
    count: int | None = option(None, help="A number.")
    exact: bool = option(False, flag="--to-the-bit", help="A switch.")
    path: Path = option(Path("out"), help="A file.")
    format: Format = option(Format.short, help="A choice.")
    settings: tuple[str, ...] = option((), flag="--set", help="NAME=VALUE.")


def work(*words: object, file: str | None = None, folder: Path | None = None):
    """What a command of these options got, and how it ended."""
    app = application("Work.")
    got = []

    @command(app, Work, configuration_file=True)
    def run(config: Work) -> None:
        got.append(config)

    @command(app, Settings)
    def other(config: Settings) -> None: ...

    if file is not None and folder is not None:
        (folder / "run.yaml").write_text(file, encoding="utf-8")
        words = ("--config", folder / "run.yaml", *words)
    return got, CliRunner().invoke(app, ["run", *map(str, words)])


FILE = """
place: here  # as the option is called on a command line, with dashes or underscores
name: 007
to-the-bit: true
share: 1e-1
count:
format: long
set: {optim: sgd, of: {least: 1e-5, most: [true, big]}, size: 3}
"""
READ = Work(
    "here",
    "007",
    0.1,
    None,
    True,
    Path("out"),
    Format.long,
    ("optim=sgd", 'of={"least": 1e-05, "most": [true, "big"]}', "size=3"),
)


def test_a_command_takes_its_options_from_a_file_and_prints_one_that_says_the_same(tmp_path):
    [got], _ = work(file=FILE, folder=tmp_path)
    assert got == READ
    got, printed = work("--print-config", file=FILE, folder=tmp_path)
    assert not got and printed.exit_code == 0
    [got], _ = work(file=printed.stdout, folder=tmp_path)
    assert got == READ and "count" not in printed.stdout


def test_the_command_line_wins_over_a_file(tmp_path):
    [got], _ = work("there", "--share", 1, "--set", "optim=adam", "--set", "size=4", file=FILE, folder=tmp_path)
    assert got == replace(READ, place="there", share=1.0, settings=("optim=adam", "size=4"))


@given(st.text(), st.floats(0, 1), st.none() | st.integers(), st.booleans(), st.lists(st.text()))
def test_any_values_come_back_from_a_printed_file(tmp_path_factory, name, share, count, exact, settings):
    configuration = Work(name, name, share, count, exact, settings=tuple(settings))
    path = tmp_path_factory.getbasetemp() / "printed.yaml"
    path.write_text(file_text(configuration), encoding="utf-8")
    read = option_values(path, Work)
    assert (read["place"], float(read["share"]), read["exact"] == "true") == (name, share, exact)
    assert read.get("count") == (None if count is None else str(count)) and tuple(read["settings"]) == tuple(settings)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("shares: 1", "has the key 'shares', which is no option of this command: do you mean share?"),
        ("exact: true", "has the key 'exact', which is no option of this command"),
        ("config: other.yaml", "has the key 'config', which is no option of this command"),
        ("share: 1\nshare: 0", "has the key 'share' twice"),
        ("to-the-bit: true\nto_the_bit: true", "says twice what to_the_bit is"),
        ("share: [1, 2]", "gives several values for share, which takes one"),
        ("place: p\nname: n\nshare: 2", "--share is 2.0; it must be at least 0 and at most 1"),
        ("place: p\nname: n\ncount: 2.5", "invalid value for '--count'"),
        ("place: p\nname: n\ncount: true", "invalid value for '--count'"),
        ("place: p\nname: n\nformat: wide", "'wide' is not one of 'short', 'long'"),
        ("name: {a: 1", "is not a YAML file: while parsing a flow mapping"),
        ("- share", "must be a mapping of options to values"),
        ("share: 1", "missing argument 'place'"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(file, message, tmp_path):
    got, result = work(file=file, folder=tmp_path)
    assert not got and result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_a_missing_file_and_a_missing_package_are_one_line(tmp_path, monkeypatch):
    _, result = work("--config", tmp_path / "absent.yaml")
    assert result.exit_code == 2 and "absent.yaml cannot be read: No such file or directory" in result.stderr
    monkeypatch.setitem(sys.modules, "yaml", None)
    _, result = work(file=FILE, folder=tmp_path)
    assert (result.exit_code, result.stderr) == (2, "Error: a file of options needs PyYAML: pip install pyyaml\n")
