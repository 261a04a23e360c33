"""A corpus that grows: the next dump of a family, with every setting of the last one, whoever asks and however often."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import save_teacher, story_rows, write_jsonl
from processes import Notes
from typer.testing import CliRunner

from knowledge_store import InputError, KnowledgeStore, MismatchError
from knowledge_store.calibration.file import Calibration, write_calibration
from teacher_dump import DumpConfig, RunConfig, append, dump
from teacher_dump.cli import app
from teacher_dump.corpus.tokenisation import describe_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TEMPLATE = (
    "{{ strftime_now('%Y') }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
)
SETTINGS = {
    "max_length": 40,
    "shard_size": 4,
    "too_long": "skip",
    "columns": "messages=turns",
    "selection": "top-p",
    "top_p": 0.5,
    "max_k": 7,
    "draw_weight": 0.25,
    "draw_seed": 3,
    "keep_context": True,
    "template_date": "2020-02-02",
    "train_on": "last",
}


def corpus(folder: Path, name: str, start: int, count: int = 7) -> Path:
    def turns(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "And then?"}, {"role": "assistant", "content": text[:60]}]

    return write_jsonl(folder / f"{name}.jsonl", [{"turns": turns(row["text"])} for row in story_rows(count, start)])


@pytest.fixture(scope="module")
def first(tmp_path_factory, loaded_teacher, teacher_folder) -> Path:
    """A folder with a store, whose dump `news` has none of the default settings, and corpora beside it."""
    folder = tmp_path_factory.mktemp("family")
    (folder / "template.jinja").write_text(TEMPLATE)
    figures = {"nll": 1.0, "ece_10": 0.1, "ece_15": 0.1, "brier": 0.5}
    vocabulary = describe_tokenizer(loaded_teacher.tokenizer)
    fit = Calibration("temperature", 1.5, loaded_teacher.description, vocabulary, {}, 300, figures, figures)
    write_calibration(folder / "calibration.json", fit)
    files = (corpus(folder, "january", 0),)
    options = {**SETTINGS, "chat_template": folder / "template.jinja", "calibration": folder / "calibration.json"}
    dump(DumpConfig(str(teacher_folder), files, folder / "store", "news", **options), teacher=loaded_teacher)
    for month, start in (("february", 10), ("march", 20)):
        corpus(folder, month, start)
    (folder / "template.jinja").unlink()
    (folder / "calibration.json").unlink()
    return folder


@pytest.fixture
def family(first, tmp_path) -> Path:
    return shutil.copytree(first, tmp_path / "family")


@pytest.fixture
def grow(family, teacher_folder, loaded_teacher):
    """Appends a month; gives the report and what was noted."""

    def grow(month: str, **options):
        notes = Notes()
        config = RunConfig(corpus=family / f"{month}.jsonl", store=family / "store", append="news", teacher=str(teacher_folder))
        ranks = [options.pop(name) for name in ("rank", "world_size") if name in options]
        report = append(replace(config, **options), *ranks, teacher=loaded_teacher, reporter=notes)
        return report, notes.notes

    return grow


def identity(store: KnowledgeStore, name: str) -> dict:
    return {key: value for key, value in store.manifest(name).identity().items() if not key.startswith("corpus.files")}


def test_a_dump_is_appended_with_all_settings(family, grow):
    report, notes = grow("february")
    assert report.dump == "news-2" and report.shards == report.shards_planned == 2
    assert "news-2 is begun with the settings of news" in notes and not any("Warning" in note for note in notes)
    store = KnowledgeStore.open(family / "store")
    assert identity(store, "news-2") == identity(store, "news")
    assert store.manifest("news-2").plan["chat"]["date"] == "2020-02-02"
    assert store.manifest("news-2").kinds["positions"]["calibration"]["temperature"] == 1.5
    assert grow("march")[0].dump == "news-3"
    assert store.manifest("news").kinds["positions"]["selection"] == {
        "name": "top-p",
        "p": 0.5,
        "max_k": 7,
        "draw_weight": 0.25,
        "draw_seed": 3,
    }


def test_parameters_of_every_kind_are_taken_over(tmp_path, teacher_folder, loaded_teacher):
    """None of them the default; and what a kind asks of a corpus, or may take, holds for the next dump too."""
    rows = [{"prompt": f"Who lit lamp {number}?", "completion": " The keeper."} for number in range(4)]
    january, february = write_jsonl(tmp_path / "january.jsonl", rows[:2]), write_jsonl(tmp_path / "february.jsonl", rows[2:])
    options = {
        "kinds": ("positions", "saliency", "vectors", "hidden"), "saliency_method": "input-x-gradient",
        "saliency_of": "teacher", "vectors_layer": 1, "vectors_pooling": "last", "vectors_over": "all", "hidden_layers": "1,-1",
        "hidden_where": "all", "hidden_every": 2, "hidden_precision": "float16", "max_length": 40,
    }  # fmt: skip
    dump(DumpConfig(str(teacher_folder), (january,), tmp_path / "store", "news", **options), teacher=loaded_teacher)
    config = RunConfig(corpus=february, store=tmp_path / "store", append="news", teacher=str(teacher_folder))
    text = write_jsonl(tmp_path / "text.jsonl", story_rows(1))
    for changes, words in (({"corpus": text}, "no context stands before"), ({"max_bytes": 10}, "--max-bytes allows 10 B")):
        with pytest.raises(InputError, match=words):
            append(replace(config, **changes), teacher=loaded_teacher)
    assert append(config, teacher=loaded_teacher).dump == "news-2"
    store = KnowledgeStore.open(tmp_path / "store")
    assert store.dumps == ("news", "news-2") and identity(store, "news-2") == identity(store, "news")
    assert store.manifest("news").kinds["saliency"] == {"method": "input-x-gradient", "of": "teacher"}


def test_the_same_command_resumes_and_never_begins_a_third(family, grow):
    assert grow("february")[0].dump == "news-2"
    (family / "store/news-2/commits/00001.json").unlink()
    report, notes = grow("february")
    assert (report.dump, report.shards, report.shards_existing) == ("news-2", 1, 1)
    assert "news-2 is the dump of this corpus, and is resumed" in notes
    report, notes = grow("february")
    assert (report.dump, report.shards, report.shards_existing) == ("news-2", 0, 2)
    assert any("is finished: nothing is left to do" in note for note in notes)
    assert grow("january")[0].dump == "news"
    assert grow("march")[0].dump == "news-3"
    assert grow("february")[0].dump == "news-2"
    assert KnowledgeStore.open(family / "store").dumps == ("news", "news-2", "news-3")


def test_workers_agree_on_the_name(family, grow):
    first, second = (grow("february", rank=rank, world_size=2)[0] for rank in (0, 1))
    assert first.dump == second.dump == "news-2" and first.shards == second.shards == 1


class Rival(Notes):
    """Appends another month while the corpus is looked through, when the name has been chosen."""

    def __init__(self, begin) -> None:
        super().__init__()
        self.begin = begin

    @contextmanager
    def progress(self, title, total, unit=""):
        if title == "looking through the corpus" and self.begin:
            begin, self.begin = self.begin, None
            begin()
        yield lambda amount, **figures: None


@pytest.mark.parametrize(("rivals", "wins"), [("march", False), ("february", True)])
def test_two_commands_at_once(family, grow, teacher_folder, loaded_teacher, rivals, wins):
    """Of one corpus, both make it; of two, one has the name and the other says so, and gets the next."""
    config = RunConfig(corpus=family / "february.jsonl", store=family / "store", append="news", teacher=str(teacher_folder))
    reporter = Rival(lambda: grow(rivals))
    if wins:
        report = append(config, teacher=loaded_teacher, reporter=reporter)
        assert report.dump == "news-2" and report.shards == 0
    else:
        with pytest.raises(MismatchError, match=r"another command has begun news-2 in .* with another corpus meanwhile"):
            append(config, teacher=loaded_teacher, reporter=reporter)
        assert grow("february")[0].dump == "news-3"
    assert not reporter.begin


def test_what_the_family_has_already_is_said(family, grow):
    (family / "store/news/commits/00000.json").unlink()
    files = (family / "january.jsonl", family / "march.jsonl")
    report, notes = grow("march", corpus=files)
    assert report.dump == "news-2"
    assert f"Warning: {files[0]} is in news already: its documents will be in the family twice" in notes
    assert any("news is not finished, 1 shard of it is missing" in note for note in notes)


def test_a_file_that_has_grown_is_refused_and_what_is_new_is_appended(family, grow):
    old, added = ((family / f"{month}.jsonl").read_bytes() for month in ("january", "february"))
    whole = family / "everything.jsonl"
    whole.write_bytes(old + added)
    with pytest.raises(InputError, match=rf"begins with all of january\.jsonl, which is in news: .*tail -c \+{len(old) + 1} "):
        grow("everything")
    whole.write_bytes(whole.read_bytes()[len(old) :])
    grow("everything")
    whole.write_bytes(added + old)  # begins with what is in news-2
    with pytest.raises(InputError, match="which is in news-2"):
        grow("everything")
    store = KnowledgeStore.open(family / "store")
    assert [(summary.dump, summary.documents) for summary in store.info()] == [("news", 7), ("news-2", 7)]


def test_another_teacher_is_refused_before_anything_is_written(family, grow, tmp_path):
    from teacher_dump.teachers.local import load_teacher

    other = save_teacher(tmp_path / "tiny", seed=5)
    config = RunConfig(corpus=family / "march.jsonl", store=family / "store", append="news", teacher=str(other))
    with pytest.raises(MismatchError, match=r"the teacher's file model\.safetensors has other contents") as caught:
        append(config, teacher=load_teacher(str(other), device="cpu"))
    assert "begin another family" in str(caught.value)
    assert not (family / "store/news-2").exists()


def test_another_teacher_of_a_finished_dump_is_refused(family, grow, teacher_folder, loaded_teacher, tmp_path):
    """By its files, and without being loaded; the dump's own teacher may lie anywhere, and need not be named."""
    config = RunConfig(corpus=family / "january.jsonl", store=family / "store", append="news", teacher="")
    assert append(config).shards == 0 and append(config, teacher=loaded_teacher).shards == 0
    moved = shutil.copytree(teacher_folder, tmp_path / "elsewhere")
    assert append(replace(config, teacher=str(moved))).shards == 0
    other = save_teacher(tmp_path / teacher_folder.name, seed=5)
    line = ["run", str(family / "store"), "--append", "news", "--corpus", str(family / "january.jsonl"), "--teacher"]
    done = CliRunner().invoke(app, [*line, str(other)])
    [error] = done.stderr.splitlines()
    assert done.exit_code == 2 and "the teacher's file model.safetensors has other contents" in error
    with pytest.raises(InputError, match="there is no folder"):
        append(replace(config, teacher=str(tmp_path / "nowhere")))


def test_families_are_told_apart(family, grow):
    shutil.copytree(family / "store/news", family / "store/newsroom-7")
    manifest = family / "store/newsroom-7/manifest.json"
    manifest.unlink()
    (family / "store/news-5").mkdir()
    assert grow("february")[0].dump == "news-2"
    KnowledgeStore.open(family / "store").rename("news-2", "news-41")
    assert grow("march")[0].dump == "news-42"
    KnowledgeStore.open(family / "store").rename("news", "news-1")
    assert grow("january")[0].dump == "news-1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"append": "absent"}, "there is no dump absent or absent-1 in .* under --name absent"),
        ({"teacher": ""}, "the teacher of news is called 'tiny', and no dump knows where it is kept: say where with --teacher"),
    ],
)
def test_bad_input(grow, family, options, message):
    notes = Notes()
    config = RunConfig(corpus=family / "march.jsonl", store=family / "store", append="news", teacher="")
    with pytest.raises(InputError, match=message):
        append(replace(config, **options), reporter=notes)
    assert not any("is begun" in sentence for sentence in notes.notes)


@pytest.mark.parametrize(
    "setting",
    [
        ("--top-k", "8"),
        ("--top-k", "5"),  # what is taken without being given, and not what the family has
        ("--max-length", "512"),
        ("--name", "mine"),
        ("--kind", "positions"),
        ("--template-date", "2026-01-31"),
        ("--dtype", "auto"),
        ("--repair",),
    ],
)
def test_settings_are_refused_beside_it(family, setting):
    line = ["run", str(family / "store"), "--append", "news", "--corpus", str(family / "march.jsonl"), *setting]
    done = CliRunner().invoke(app, line)
    [error] = done.stderr.splitlines()
    assert done.exit_code == 2 and error.startswith(f"Error: {setting[0]} cannot be given beside --append")


def test_the_command(family, teacher_folder):
    line = ["run", str(family / "store"), "--append", "news", "--corpus", str(family / "march.jsonl")]
    missing = CliRunner().invoke(app, [*line[:2], *line[4:]])
    assert missing.exit_code == 2 and "Error: --teacher is missing" in missing.stderr
    done = CliRunner().invoke(app, [*line, "--teacher", str(teacher_folder), "--batch-size", "2"])
    assert done.exit_code == 0 and "news-2: 2 of 2 shards dumped" in done.stderr
    manifest = json.loads((family / "store/news-2/manifest.json").read_text())
    assert manifest["corpus"]["columns"] == {"messages": "turns"}


def test_a_setting_is_refused_from_python():
    with pytest.raises(InputError, match="--max-length cannot be given beside --append"):
        RunConfig(corpus="march.jsonl", store="store", append="news", max_length=64)
