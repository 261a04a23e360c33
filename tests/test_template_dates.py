"""The date that a chat template gets: whoever begins a dump fixes it, with the other options of conversations."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path

import pytest
import transformers.utils.chat_template_utils as transformers_templates
from command_server import forked_command
from conftest import CHAT_TEMPLATE, run_command, write_jsonl
from stores import read_whole
from test_conversations import ANSWER, ASK, chat, shown
from torture import workers

from knowledge_store import InputError, KnowledgeStore, MismatchError
from knowledge_store.format.manifest import read_manifest
from knowledge_store.storage import open_storage
from teacher_dump import DumpConfig, dump, repair
from teacher_dump.corpus.chat import options as chat_options

DATED_TEMPLATE = "{{ '<|system|>' + strftime_now('%d %b %Y, %A 100%%') + '<|end|>\n' }}" + CHAT_TEMPLATE


def at(monkeypatch: pytest.MonkeyPatch, day: str) -> None:
    """Move this process's clock."""
    moment = datetime.datetime.fromisoformat(day)

    class Moved(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return moment

    class MovedDate(datetime.date):
        @classmethod
        def today(cls):
            return moment.date()

    monkeypatch.setattr(transformers_templates, "datetime", Moved)
    monkeypatch.setattr(chat_options, "date", MovedDate)


def test_a_template_gets_its_date_from_the_options(monkeypatch):
    at(monkeypatch, "2030-12-24")
    text = shown(chat("  \n" + DATED_TEMPLATE), [ASK, ANSWER])
    assert text.startswith("  \n<|system|>31 Jan 2026, Saturday 100%<|end|>\n<|user|>")


def dated_dump(folder: Path, teacher_folder: Path, store: str, **options) -> DumpConfig:
    rows = [{"messages": [ASK, {"role": "assistant", "content": f"As far as ship {number}."}]} for number in range(6)]
    template = folder / "dated.jinja"
    template.write_text(DATED_TEMPLATE)
    corpus = write_jsonl(folder / "chat.jsonl", rows)
    options = {"chat_template": template, **options}
    return DumpConfig(str(teacher_folder), (corpus,), folder / store, "d", max_length=96, shard_size=2, **options)


def check_same_shards(one: Path, other: Path) -> None:
    names = {path.relative_to(one) for path in one.rglob("0*.parquet")}
    assert len(names) == 6
    for name in names:
        assert read_whole(one / name).equals(read_whole(other / name))


def test_workers_of_two_days_make_the_same_shards(tmp_path, monkeypatch, teacher_folder, loaded_teacher):
    at(monkeypatch, "2026-02-27")
    config = dated_dump(tmp_path, teacher_folder, "one")
    dump(config, teacher=loaded_teacher)
    others = dated_dump(tmp_path, teacher_folder, "many", chat_template=config.chat_template)
    dump(others, 0, 3, teacher=loaded_teacher)
    at(monkeypatch, "2026-02-28")
    untold = dated_dump(tmp_path, teacher_folder, "many", chat_template=None)  # the manifest has the template
    dump(untold, 1, 3, teacher=loaded_teacher)
    at(monkeypatch, "2027-03-01")
    dump(untold, 2, 3, teacher=loaded_teacher)
    shard = next((others.store / "d/positions").glob("*00001*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-100])
    repair(untold, teacher=loaded_teacher)
    check_same_shards(config.store, others.store)
    plan = read_manifest(open_storage(others.store), "d").plan
    assert plan["chat"]["date"] == "2026-02-27" and plan["chat"]["train_on"] == "all"
    positions = KnowledgeStore.open(others.store).sql("SELECT DISTINCT document FROM sequences").num_rows
    assert positions == 6
    shown_text = forked_command("knowledge_store", "info", others.store).stdout
    sha256 = plan["chat"]["template_sha256"][:12]
    expected = f"conversations           train on all, a chat template of its own (SHA-256 {sha256}…), template date 2026-02-27"
    assert expected in shown_text
    at(monkeypatch, "2030-01-01")
    for wrong, said in (
        ({"template_date": "2027-01-01"}, "--template-date was 2026-02-27 and is now 2027-01-01"),
        ({"train_on": "last"}, "--train-on was all and is now last"),
    ):
        with pytest.raises(MismatchError, match=said):
            dump(dated_dump(tmp_path, teacher_folder, "many", **wrong), teacher=loaded_teacher)
    (tmp_path / "other.jinja").write_text(CHAT_TEMPLATE)
    with pytest.raises(MismatchError, match="the text of --chat-template was"):
        dump(dated_dump(tmp_path, teacher_folder, "many", chat_template=tmp_path / "other.jinja"), teacher=loaded_teacher)


@pytest.mark.skipif(workers.FAKETIME is None, reason="libfaketime is not installed (Debian: apt-get install libfaketime)")
def test_a_command_of_another_day_makes_the_same_shards(tmp_path, monkeypatch, teacher_folder, loaded_teacher):
    """By the clock of its process, which has its templates rendered as on the day on which the dump began."""
    config = dated_dump(tmp_path, teacher_folder, "many")
    at(monkeypatch, "2026-02-27")
    dump(config, 0, 2, teacher=loaded_teacher)
    options = ["--teacher", config.teacher, "--corpus", config.corpus[0], "--name", "d", "--max-length", 96, "--shard-size", 2]
    with monkeypatch.context() as later:
        for name, value in (("DONT_FAKE_MONOTONIC", "1"), ("LD_PRELOAD", str(workers.FAKETIME)), ("FAKETIME", "+3d")):
            later.setenv(name, value)
        ended = run_command("teacher_dump", "run", config.store, *options, "--rank", 1, "--world-size", 2)
        assert ended.returncode == 0, ended.stderr
    assert read_manifest(open_storage(config.store), "d").plan["chat"]["date"] == "2026-02-27"
    alone = replace(config, store=tmp_path / "one")
    dump(alone, teacher=loaded_teacher)
    check_same_shards(alone.store, config.store)


def test_a_damaged_manifest_is_made_again_with_the_date_of_its_dump(tmp_path, monkeypatch, teacher_folder, loaded_teacher):
    at(monkeypatch, "2026-02-27")
    config = dated_dump(tmp_path, teacher_folder, "one")
    dump(config, teacher=loaded_teacher)
    manifest = config.store / "d/manifest.json"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:100])
    at(monkeypatch, "2026-02-28")
    with pytest.raises(MismatchError, match="pass the day of the dump's beginning as --template-date"):
        repair(config, teacher=loaded_teacher)
    repair(replace(config, template_date="2026-02-27"), teacher=loaded_teacher)
    assert manifest.read_bytes() == whole


def test_a_template_that_asks_for_no_date_has_none_in_the_manifest(tmp_path, teacher_folder, loaded_teacher):
    config = dated_dump(tmp_path, teacher_folder, "one", chat_template=None, train_on="last")
    dump(config, teacher=loaded_teacher)
    assert read_manifest(open_storage(config.store), "d").plan["chat"] == {"train_on": "last"}


@pytest.mark.parametrize(
    "options, said",
    [
        ({"template_date": "31 January"}, "--template-date 31 January is no date"),
        ({"template_date": "2026-02-30"}, "no date"),
        ({"train_on": "first"}, "--train-on"),
    ],
)
def test_options_that_cannot_be_used_are_named(tmp_path, teacher_folder, options, said):
    with pytest.raises(InputError, match=said):
        dated_dump(tmp_path, teacher_folder, "one", **options)


def test_a_template_file_that_cannot_be_used_is_named(tmp_path, teacher_folder, loaded_teacher):
    missing = dated_dump(tmp_path, teacher_folder, "one", chat_template=tmp_path / "missing.jinja")
    with pytest.raises(InputError, match=r"cannot read --chat-template .*missing.jinja"):
        dump(missing, teacher=loaded_teacher)
