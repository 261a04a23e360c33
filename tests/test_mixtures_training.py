"""Runs over several dumps and several teachers: what they read, what they refuse, and that they resume anywhere."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from conftest import make_tokenizer, save_teacher, story_rows, write_jsonl
from processes import Notes, run_ranks
from safetensors.torch import load_file
from typer.testing import CliRunner

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from student_train.cli import app
from student_train.training.configuration import TrainConfig
from student_train.training.run import train
from student_train.training.split import split_dumps
from teacher_dump import DumpConfig, dump
from teacher_dump.teachers.local import load_teacher

pytestmark = pytest.mark.usefixtures("one_thread")

# Name of the dump: which teacher, which rows of the corpus, and what is kept.
DUMPS = {
    "news-1": ("tiny", range(3), {}),
    "news-2": ("tiny", range(3, 8), {}),
    "code": ("tiny", range(8, 14), {}),
    "other": ("large", range(3), {}),  # another teacher of news-1
    "bare": ("tiny", range(3), {"draw_weight": 0.0, "top_k": 8}),
    "drawn": ("tiny", range(3), {"selection": "threshold", "draw_weight": 0.2}),
    "foreign": ("foreign", range(3), {}),
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, loaded_teacher) -> Path:
    """A store with all of them."""
    folder = tmp_path_factory.mktemp("mixed")
    save_teacher(folder / "large", seed=5)
    save_teacher(folder / "foreign", seed=6)
    make_tokenizer(extra_words=("zebra",)).save_pretrained(folder / "foreign")
    teachers = {"tiny": loaded_teacher} | {
        name: load_teacher(str(folder / name), device="cpu") for name in ("large", "foreign")
    }
    for name, (teacher, rows, options) in DUMPS.items():
        corpus = write_jsonl(folder / f"rows-{rows.start}-{rows.stop}.jsonl", story_rows(len(rows), start=rows.start))
        config = DumpConfig(teacher, (corpus,), folder / "store", name, max_length=40, batch_size=4, shard_size=2, **options)
        dump(config, teacher=teachers[teacher])
    return folder / "store"


@pytest.fixture
def options(mixed, student, tmp_path) -> dict:
    """Of a short run."""
    return {
        "store": str(mixed),
        "student": str(student),
        "output": str(tmp_path / "run"),
        "batch_size": 4,
        "learning_rate": 1e-3,
        "steps": 3,
        "eval_fraction": 0.0,
    }


def weights(output: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(output) / "model.safetensors")


def losses(output: str | Path) -> dict[int, float]:
    entries = json.loads((Path(output) / "history.json").read_text())["entries"]
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


def run(options: dict, *words: str):
    """The command, with these words after the options."""
    named = [part for name, value in options.items() if name != "store" for part in (f"--{name.replace('_', '-')}", str(value))]
    return CliRunner().invoke(app, ["run", options["store"], *named, *words])


# --- several dumps as one corpus --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [{"dump": ("code=3",)}, {"teachers": "code=0.2"}, {"dump": ("cod*",)}])
def test_one_dump_is_one_dump_whatever_its_weight(options, named, tmp_path):
    train(TrainConfig(**options, dump="code"))
    train(TrainConfig(**options | {"output": str(tmp_path / "again")}, **named))
    one, other = weights(tmp_path / "run"), weights(tmp_path / "again")
    assert all(torch.equal(one[name], other[name]) for name in one)
    identities = [json.loads((tmp_path / name / "run.json").read_text())["identity"] for name in ("run", "again")]
    assert identities[0] == identities[1]


def test_what_is_read_of_one_dump_is_told(options, mixed):
    count, reporter = KnowledgeStore.open(mixed).sequence_count("code"), Notes()
    train(TrainConfig(**options | {"steps": None, "epochs": 2, "dump": "code"}), reporter=reporter)
    steps = -(-count // 4)
    read = f"Of code it reads all of its {count} sequences in an epoch; in the run about {2 * count} sequences and "
    [note] = [note for note in reporter.notes if read in note]
    assert note.startswith(f"An epoch has {steps} step{'s' * (steps > 1)}, and the run {2 * steps}. ")


def test_weights_are_shares_of_an_epoch_and_are_told_before_it_starts(options, mixed, tmp_path):
    store = KnowledgeStore.open(mixed)
    counts = {name: store.sequence_count(name) for name in ("news-1", "news-2", "code")}
    total, reporter = sum(counts.values()), Notes()
    steps = 2 * -(-total // 4)
    named = ("news-1=5", "news-2=3", "code=2")
    train(TrainConfig(**options | {"steps": None, "epochs": 2, "dump": named}), reporter=reporter)
    shares = [round(total * share) for share in (0.5, 0.3, 0.2)]
    assert sum(shares) == total
    began = reporter.notes.index("3 dumps are read as one corpus.")
    notes = reporter.notes[began + 1 : began + 5]
    assert notes[0] == f"An epoch has {steps // 2} steps, and the run {steps}. Of each dump it reads:"
    for note, (name, count), share in zip(notes[1:], counts.items(), shares, strict=True):
        read = f"{share} sequences in an epoch, {share / count:.2f} times its {count}; in the run about {2 * share} sequences"
        assert note.startswith(f"{name}: {read} and ")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [(facts["name"], facts["weight"], facts["snapshot"]) for facts in record["dumps"]] == [
        (name, weight, store.snapshot(name)) for name, weight in (("news-1", 0.5), ("news-2", 0.3), ("code", 0.2))
    ]
    assert [facts["read"]["epoch"] for facts in record["dumps"]] == shares and not record["several_teachers"]
    assert record["sequences"] == {"train": total, "eval": 0}


def test_held_out_documents_are_held_out_of_all_dumps(options, mixed, tmp_path):
    """news-1 and bare are of the same rows: what one holds out, the other does not train on."""
    train(TrainConfig(**options | {"eval_fraction": 0.3, "evaluations": 1, "dump": ("news-1", "bare")}))
    record, store = json.loads((tmp_path / "run" / "run.json").read_text()), KnowledgeStore.open(mixed)
    assert record["sequences"]["eval"] % 2 == 0 and record["sequences"]["eval"]
    assert sum(record["sequences"].values()) == 2 * store.sequence_count("news-1")
    entries = json.loads((tmp_path / "run" / "history.json").read_text())["entries"]
    assert all(entry["eval_kl_lower_bound"] > 0 for entry in entries if "eval_loss" in entry)


def test_texts_are_held_out_of_all_dumps_wherever_they_come_from(tmp_path, loaded_teacher):
    """A copy of the corpus in another order, with some rows twice; and one of the same name that lacks the first row."""
    rows = story_rows(40)
    corpora = {"plain": rows, "copy": [*reversed(rows), *rows[:20]], "moved": rows[1:]}
    for name, texts in corpora.items():
        (tmp_path / name).mkdir()
        corpus = write_jsonl(tmp_path / name / f"{name.replace('moved', 'plain')}.jsonl", texts)
        config = DumpConfig("tiny", (corpus,), tmp_path / "store", name, max_length=40, batch_size=4, shard_size=20)
        dump(config, teacher=loaded_teacher)
    store = KnowledgeStore.open(tmp_path / "store")
    sides = split_dumps(store, [*corpora], eval_fraction=0.2)
    trained, held_out = (
        {name: {*store.sequences(name, ["row"])["row"].to_numpy()[np.asarray(of[name])]} for name in corpora} for of in sides
    )
    assert len(held_out["plain"]) in (8, 9)  # a fifth of the texts, in whichever dump; the last has one less to choose from
    assert held_out["copy"] == {row for old in held_out["plain"] for row in (41 - old, 40 + old) if row <= 60}
    assert held_out["moved"] == {row - 1 for row in held_out["plain"]} - {0}
    alone = split_dumps(store, ["plain"], eval_fraction=0.2)[1]["plain"]
    assert {*alone} <= {*sides[1]["plain"]}  # what else is read changes nothing
    assert not any(trained[name] & held_out[name] for name in corpora)


def test_a_pattern_is_resolved_once(options, mixed, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(mixed, store)
    options |= {"store": str(store), "dump": ("news-*",)}
    train(TrainConfig(**options))
    KnowledgeStore.open(store).rename("code", "news-3")
    again = train(TrainConfig(**options))
    assert again.finished and again.began_at == 3
    assert train(TrainConfig(**options | {"dump": ("news-1", "news-2")})).began_at == 3
    with pytest.raises(InputError, match=r"dumps was news-1, news-2 and is now news-1, news-2, news-3\)"):
        train(TrainConfig(**options | {"dump": ("news-1", "news-2", "news-3")}))
    reporter = Notes()
    train(TrainConfig(**options | {"output": str(tmp_path / "new")}), reporter=reporter)
    assert "3 dumps are read as one corpus." in reporter.notes
    assert not any("--teachers" in note for note in reporter.notes)


def test_dumps_of_the_same_texts_are_named_before_they_are_read(options, mixed):
    dumps, reporter = ("news-1", "code", "other"), Notes()
    train(TrainConfig(**options | {"steps": 1, "dump": dumps}), reporter=reporter)
    [note] = [note for note in reporter.notes if "--teachers" in note]
    assert note == (
        "news-1 and other are dumps of the same texts, which are read once from each: --teachers news-1,other reads them once,"
        " with what all of these say of them."
    )


def test_dumps_of_one_file_as_other_sequences_are_named_before_they_are_read(options, loaded_teacher, tmp_path):
    corpus, store = write_jsonl(tmp_path / "stories.jsonl", story_rows(8)), tmp_path / "store"
    for name, max_length in {"short": 40, "long": 60}.items():
        dump(DumpConfig("tiny", (corpus,), store, name, max_length=max_length), teacher=loaded_teacher)
    reporter = Notes()
    train(TrainConfig(**options | {"steps": 1, "store": str(store), "dump": ("short", "long")}), reporter=reporter)
    assert (
        "short and long are both dumps of the file stories.jsonl, whose texts are read once from each, as other sequences"
        " or with other targets."
    ) in reporter.notes


def test_other_teachers_are_named_where_dumps_are_mixed(options, mixed):
    told = "The teacher is tiny in news-1 and large in other."
    for named, expected in (({"dump": ("news-1", "code", "other")}, True), ({"teachers": "news-1,other"}, False)):
        reporter = Notes()
        output = f"{options['output']}-{expected}"
        train(TrainConfig(**options | {"steps": 1, "output": output} | named), reporter=reporter)
        assert (told in reporter.notes) is expected and sum("The teacher" in note for note in reporter.notes) == expected


def test_a_dump_of_which_no_target_is_chosen_is_named(options, mixed):
    reporter, condition = Notes(), "dump = 'news-1' AND position > 2"
    train(TrainConfig(**options | {"steps": 1, "dump": ("news-1", "code"), "positions_where": condition}), reporter=reporter)
    told = "No target of code meets it; a column that a dump does not keep is null in all its rows."
    assert told in reporter.notes and "code: none of its sequences is trained on." in reporter.notes


def test_killed_in_the_middle_of_a_mixture_on_any_number_of_ranks(options, tmp_path):
    """SIGKILL of one of 1 and 4 processes in the second epoch of three dumps, and the same command again."""
    options |= {"steps": 7, "save_steps": 2, "dump": ("news-1=0.5", "news-2=0.3", "code=0.2")}
    train(TrainConfig(**options))
    expected = losses(tmp_path / "run")
    assert list(expected) == list(range(1, 8))
    for world_size in (1, 4):
        output = tmp_path / f"run-{world_size}"
        changed = options | {"batch_size": 4 // world_size, "output": str(output)}
        killed = run_ranks(world_size, ranks.train, changed, 5, folder=tmp_path / "said")
        assert killed[-1].returncode == -signal.SIGKILL and not (output / "model.safetensors").exists(), killed
        resumed = run_ranks(world_size, ranks.train, changed, folder=tmp_path / "said")
        assert [rank.returncode for rank in resumed] == [0] * world_size, resumed
        found = losses(output)
        assert found == (expected if world_size == 1 else pytest.approx(expected, abs=1e-4)), world_size


# --- several teachers -------------------------------------------------------------------------------------------------------


def test_several_teachers_are_learned_from(options, tmp_path):
    """The first step's loss is the weighted sum of what it is with each of them alone."""
    options |= {"steps": 1, "batch_size": 64, "ce_weight": 0.2}
    reporter = Notes()
    train(TrainConfig(**options, teachers="news-1=7,other=3"), reporter=reporter)
    first = losses(options["output"])[1]
    alone = []
    for name in ("news-1", "other"):
        train(TrainConfig(**options | {"output": str(tmp_path / name), "dump": name}))
        alone.append(losses(tmp_path / name)[1])
    assert alone[0] != pytest.approx(alone[1], rel=1e-3)
    assert first == pytest.approx(0.7 * alone[0] + 0.3 * alone[1], rel=1e-5)
    assert "Each sequence of news-1 is read with what 2 teachers said, by weights: news-1 0.7, other 0.3." in reporter.notes
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [facts["name"] for facts in record["dumps"]] == ["news-1", "other"] and record["several_teachers"]


def test_other_divergences_are_told_for_what_they_are(options):
    reporter = Notes()
    train(TrainConfig(**options | {"steps": 1}, loss="jensen-shannon", teachers="news-1,other"), reporter=reporter)
    notes = " ".join(reporter.notes)
    assert "jensen-shannon is the weighted sum of its values for each teacher, not its value for their mixture" in notes


# --- mistakes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dump", "absent"], "has no dump 'absent'"),
        (["--dump", "news-1", "--dump", "absent"], "has no dump 'absent'"),
        (["--dump", "old-*"], "matches 'old-*' (it has bare, code,"),
        (["--dump", "news-1", "--dump", "news-1"], "names the dump news-1 twice"),
        (["--dump", "news-*", "--dump", "news-1"], "names the dump news-1 twice"),
        (["--dump", "news-1=0", "--dump", "code=1"], "give a finite number above 0"),
        (["--dump", "news-1=nan", "--dump", "code=1"], "give a finite number above 0"),
        (["--dump", "news-1=inf"], "give a finite number above 0"),
        (["--dump", "news-1=much"], "'much' is no weight"),
        (["--dump", "news-1=0.7", "--dump", "code"], "gives no weight to code: give weights to all dumps, or to none"),
        (["--dump", "news-1=0.7,code=0.3"], "give --dump news-1=0.7 --dump code=0.3"),
        (["--dump", "news-*=0.5"], "gives a weight to a pattern"),
        (["--dump", "news-1=1e-9", "--dump", "code=1"], "is less than one of the"),
        (["--dump", "news-1", "--dump", "foreign"], "different vocabularies"),
        (["--dump", "news-1", "--dump", "bare", "--tail", "draws"], "--tail draws: the dump bare keeps no draws"),
        ([], "name a dump of"),
        (["--dump", "code", "--teachers", "news-1,other"], "give --dump or --teachers, not both"),
        (["--teachers", "news-1^0.7,other^0.3"], "a geometric mixture of teachers needs probabilities of tokens outside"),
        (["--teachers", "news-*"], "name each teacher's dump"),
        (["--teachers", "news-1,"], "has no dump ''"),
        (["--teachers", "news-1,code"], "code"),
        (["--teachers", "news-1,other", "--loss", "ce"], "the loss ce learns nothing from a teacher"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing_behind(options, words, message):
    done = run(options, *words)
    assert done.exit_code == 2 and done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr
    assert not Path(options["output"]).exists()
