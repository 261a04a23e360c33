"""What becomes of the rows of a corpus: counted before the teacher is loaded, kept in the manifest, and said in words."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
from command_server import forked_command
from conftest import TEXT, write_jsonl
from processes import Notes

from knowledge_store import KnowledgeStore
from knowledge_store.format.corpus_counts import CorpusCounts, LeftOut
from knowledge_store.reporter import Reporter
from teacher_dump import DumpConfig, PreviewConfig, dump, preview
from teacher_dump.corpus.documents import Document
from teacher_dump.corpus.rows import BadRow
from teacher_dump.corpus.tally import MAX_REASONS, OTHER_REASONS, Tally
from teacher_dump.corpus.tokenisation import CorpusTokenizer

TURNS = [{"role": "user", "content": "Far?"}, {"role": "assistant", "content": "As far as somebody looks for it."}]
ROWS: list[dict] = [
    {"text": TEXT},
    {"messages": TURNS},
    {"messages": [*TURNS, *TURNS[:1], {"role": "user", "content": "And farther? " * 9}]},  # only context is cut off
    {"messages": [*TURNS, *TURNS]},  # an answer loses its end
    {"messages": TURNS[:1]},
    {"text": ""},
    {"title": "x"},
    {"prompt": "The lamp " * 20, "completion": "burns"},
]


@pytest.fixture
def config(tmp_path) -> DumpConfig:
    corpus = write_jsonl(tmp_path / "c.jsonl", ROWS * 3)
    return DumpConfig("tiny", (corpus,), tmp_path / "store", max_length=36, shard_size=5, skip_bad_rows=True)


@pytest.mark.parametrize("too_long", ["cut", "skip"])
def test_the_manifest_counts_what_the_shards_hold(config, loaded_teacher, too_long):
    counts = dump(replace(config, too_long=too_long), teacher=loaded_teacher).counts
    store = KnowledgeStore.open(config.store)
    (summary,) = store.info()
    assert summary.counts == counts
    assert (counts.rows, counts.sequences, counts.positions) == (24, summary.sequences, summary.positions)
    assert {reason: left.rows for reason, left in counts.left_out.items()} == summary.skip_reasons
    assert counts.cut == summary.truncated
    (row,) = store.sql("SELECT sum(targets) AS targets, count(DISTINCT row) AS rows FROM sequences").to_pylist()
    assert (counts.targets, counts.rows_used) == (row["targets"], row["rows"])
    assert (counts.cut, counts.answers_cut) == ((6, 3) if too_long == "cut" else (0, 0))


def test_workers_that_start_alone_count_the_same(config, tmp_path, loaded_teacher):
    whole = dump(config, teacher=loaded_teacher)
    parts = [dump(replace(config, store=tmp_path / "shared"), rank, 2, teacher=loaded_teacher) for rank in range(2)]
    assert [part.counts for part in parts] == [whole.counts] * 2


@pytest.mark.parametrize("world_size", [1, 2])
def test_columns_that_no_teacher_sees_are_told(config, loaded_teacher, world_size):
    """Also where workers look through the corpus together."""
    columns: list[dict] = [{"id": 1}, {"id": 2, "tools": [], "system_prompt": "Be brief."}]
    write_jsonl(config.corpus[0], [{"messages": TURNS, **beside} for beside in columns])
    notes = Notes()
    dump(config, 0, world_size, teacher=loaded_teacher, reporter=notes)
    said = "Columns read: messages, tools; kept beside and unseen by the teacher: id, system_prompt"
    assert [note for note in notes.notes if "kept beside" in note] == [said]
    shown = preview(PreviewConfig("tiny", config.corpus, max_length=36), loaded_teacher.tokenizer)
    assert shown.columns == said


def test_where_the_teacher_sees_all_columns_nothing_is_said_of_them(config, loaded_teacher):
    write_jsonl(config.corpus[0], [{"messages": TURNS}])
    notes = Notes()
    dump(config, teacher=loaded_teacher, reporter=notes)
    assert not any("kept beside" in note for note in notes.notes)
    assert preview(PreviewConfig("tiny", config.corpus, max_length=36), loaded_teacher.tokenizer).columns is None


def test_info_tells_the_counts(config, loaded_teacher):
    dump(config, teacher=loaded_teacher)
    shown = forked_command("knowledge_store", "info", config.store)
    assert "12 of 24 rows are used, 12 left out (50%): 3 no message has the role `assistant`" in shown.stdout
    assert "6 rows are cut at 36 tokens (50%); 3 answers lose the end" in shown.stdout
    (record,) = json.loads(forked_command("knowledge_store", "info", config.store, "--json").stdout)
    assert record["counts"]["rows"] == 24 and record["counts"]["left_out"]["nothing to learn from"]["row"] == 6


def test_ctrl_c_while_a_corpus_is_looked_through_leaves_nothing(config, loaded_teacher, monkeypatch):
    def interrupted(tokenizer, document):
        raise KeyboardInterrupt

    monkeypatch.setattr(CorpusTokenizer, "sequences", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dump(config, teacher=loaded_teacher)
    assert not config.store.exists()


def document(row: int) -> Document:
    return Document(row - 1, 0, row, 0, 0)


def test_reasons_are_counted_without_what_differs_from_row_to_row():
    tally = Tally("cut")
    for row, problem in enumerate(["not JSON (line 1)", "not JSON (line 2)", "refused: because", "refused: so"], 1):
        tally.leave_out(document(row), BadRow(problem))
    tally.leave_out(document(5), BadRow("message 3 has the role `x`", reason="a message has an unknown role"))
    assert {reason: (left.rows, left.row) for reason, left in tally.counts.left_out.items()} == {
        "not JSON": (2, 1),
        "refused": (2, 3),
        "a message has an unknown role": (1, 5),
    }


def test_reasons_of_any_number_take_bounded_room():
    tally = Tally("cut")
    for row in range(1, 1001):
        tally.leave_out(document(row), BadRow(f"reason {row}"))
    assert len(tally.counts.left_out) == MAX_REASONS + 1
    assert tally.counts.left_out[OTHER_REASONS].rows == 1000 - MAX_REASONS and tally.counts.rows_left_out == 1000


def left_out(**rows: int) -> dict[str, LeftOut]:
    return {reason: LeftOut(count, True, 0, 1, reason) for reason, count in rows.items()}


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        (CorpusCounts(rows=1), ["1 of 1 row is used"]),
        (CorpusCounts(rows=100, left_out=left_out(a=2, b=3)), ["95 of 100 rows are used, 5 left out (5%): 3 b; 2 a"]),
        (CorpusCounts(rows=100, left_out=left_out(a=6)), ["! 94 of 100 rows are used, 6 left out (6%): 6 a"]),
        (
            CorpusCounts(rows=40, cut=2, answers_cut=1),
            ["40 of 40 rows are used", "2 rows are cut at 512 tokens (5%); 1 answer loses the end"],
        ),
        (CorpusCounts(rows=4, cut=1), ["4 of 4 rows are used", "! 1 row is cut at 512 tokens (25%); no answer loses the end"]),
        (
            CorpusCounts(rows=4, dropped_reasoning=2),
            ["4 of 4 rows are used", "the chat template leaves the reasoning of 2 messages out"],
        ),
        (
            CorpusCounts(rows=4, unfinished=2),
            [
                "4 of 4 rows are used",
                "2 rows were cut off when written, as `finish` or `finish_reason` says: no end is learned there",
            ],
        ),
        (CorpusCounts(), ["0 of 0 rows are used"]),
    ],
)
def test_counts_in_words(counts, said):
    assert [f"{'! ' * each.strong}{each.text}" for each in counts.sentences(512)] == said


def test_a_record_of_counts_is_read_as_it_was_written():
    counts = CorpusCounts(rows=9, cut=1, left_out=left_out(a=2))
    assert CorpusCounts.from_record(json.loads(json.dumps(counts.to_record()))) == counts


class Listener(Reporter):
    """Keeps what it hears of progress."""

    def __init__(self):
        self.titles: list[str] = []
        self.figures: dict[str, str] = {}

    @contextmanager
    def progress(self, title, total, unit=""):
        self.titles.append(title)
        yield lambda amount, **figures: self.figures.update(figures)


def test_progress_says_how_fast_a_corpus_is_looked_through(config, loaded_teacher, monkeypatch):
    monkeypatch.setattr("teacher_dump.corpus.scan.FIGURES_EVERY", 1)
    listener = Listener()
    dump(config, teacher=loaded_teacher, reporter=listener)
    assert listener.titles == ["looking through the corpus", "dumping tiny-c"]
    assert int(listener.figures["tokens/s"].replace(",", "")) > 0
    assert (listener.figures["rows"], listener.figures["left out"]) == ("23", "11")  # before the last
