"""Corpus files become documents, the same ones wherever reading begins."""

from __future__ import annotations

import gzip
import json
import os
import shlex
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import write_jsonl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from row_files import JSON_WRITERS, write_arrow

from knowledge_store.errors import InputError
from teacher_dump.configuration import DumpConfig
from teacher_dump.corpus import json_list, pieces
from teacher_dump.corpus import text as text_files
from teacher_dump.corpus.documents import check_files, file_names, problem_text, read_documents
from teacher_dump.corpus.rows import BadRow, Start
from teacher_dump.corpus.scan import Scanner, column_value, scan
from teacher_dump.corpus.text import cut_text
from teacher_dump.corpus.tokenisation import TokenSequence
from teacher_dump.dumping.plan import ShardReader

BEGINNING = Start(0, 0, 1, 0, 0)


def documents(*files: Path, start: Start = BEGINNING, limit: int = 1000) -> list:
    return list(read_documents(files, start, limit))


def texts(*files: Path, limit: int = 1000) -> list[str | None]:
    return [document.text for document in documents(*files, limit=limit)]


def compress(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def lines(*rows: dict) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


ROWS = [{"text": "one"}, {"text": "zwei é"}, {"text": "three 🌊"}]


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.jsonl.zst").write_bytes(compress(lines(*ROWS)))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "c.parquet")
    write_arrow(tmp_path / "e.arrow", ROWS)
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(lines(*ROWS)))
    (tmp_path / "g.json").write_text(json.dumps(ROWS))
    (tmp_path / "h.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    (tmp_path / "i.json").write_bytes(lines(*ROWS))
    names = ("a.jsonl", "b.jsonl.zst", "c.parquet", "e.arrow", "f.jsonl.gz", "g.json", "h.json.gz", "i.json")
    check_files(tuple(tmp_path / name for name in names))
    for name in names:
        assert texts(tmp_path / name) == ["one", "zwei é", "three 🌊"]
        assert [document.row for document in documents(tmp_path / name)] == [1, 2, 3]
    (tmp_path / "d.txt").write_text("one\nzwei é\n")
    assert texts(tmp_path / "d.txt") == ["one\nzwei é\n"]


def test_jsonl_takes_windows_lines_blank_lines_a_byte_order_mark_and_no_last_newline(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n   \n{"text": "two\\r\\n"}\r\n{"text": "three"}')
    found = documents(path)
    assert [document.text for document in found] == ["one", "two\r\n", "three"]
    assert [document.row for document in found] == [1, 4, 5]  # as an editor counts lines


def test_zstandard_of_several_frames_is_one_text_even_where_a_frame_ends_inside_a_line(tmp_path):
    data = lines(*ROWS)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(compress(data[:7]) + compress(b"") + compress(data[7:30]) + compress(data[30:]))
    assert texts(path) == [row["text"] for row in ROWS]


@pytest.mark.parametrize("kept", [5, 20, -1])
@pytest.mark.parametrize("ending", [".jsonl.zst", ".jsonl.gz", ".json", ".json.gz", ".arrow"])
def test_a_file_cut_off_anywhere_is_refused_by_name(tmp_path, ending, kept):
    write = {**JSON_WRITERS, ".json.gz": lambda path, rows: path.write_bytes(gzip.compress(json.dumps(rows).encode()))}
    path = tmp_path / f"a{ending}"
    {**write, ".arrow": write_arrow}[ending](path, [{"text": f"row {number} " * 40} for number in range(3000)])
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=rf"a{ending} (ends in the middle|cannot be read as Arrow)"):
        documents(path)


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.gz", "a.json", "a.parquet", "a.arrow"])
def test_a_file_that_is_not_what_its_name_says_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"just some words, long enough to be anything")
    with pytest.raises(InputError, match=name):
        documents(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": ', "not JSON"),
        (b"[1, 2]", "not an object"),
        (b'{"title": "x"}', "none of the columns"),
        (b'{"text": null, "title": "x"}', "`text` is null"),
        (b'{"prompt": null, "completion": null}', "`prompt` and `completion` are null"),
        (b'{"text": 5}', "`text` is not a string"),
        (b'{"prompt": "x"}', "`prompt` and `completion`"),
        (b'{"prompt": "x", "completion": [{"role": "assistant", "content": "y"}]}', "`prompt` and `completion`"),
        (b'{"messages": []}', "`messages` must be"),
        (b'{"messages": [{"content": "x"}]}', "`messages` has a message that cannot be used: message 1 has no `role`"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tools": "["}', "`tools` is text that is not JSON"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tools": 5}', "`tools` is not a list"),
        (b'{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": 5}', "`chat_template_kwargs`"),
        (b'{"text": "\\ud800"}', "sound Unicode"),
        (b'{"text": "x", "title": ["\\ud800"]}', "sound Unicode"),
        (b'{"text": "x", "\\ud800": 1}', "sound Unicode"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_row_that_cannot_be_used_says_why_and_keeps_its_number(tmp_path, line, problem):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    before, bad, after = documents(path)
    assert problem in bad.problem
    assert (bad.number, bad.row) == (1, 2)
    assert (before.text, after.text, after.number) == ("before", "after", 2)
    found, _ = scan(Scanner((path,), RefuseBadRows(), 1000), 2)
    assert (found.documents, found.counts.rows, found.counts.rows_left_out) == (3, 3, 1)
    (left,) = found.counts.left_out.values()
    assert (left.rows, left.bad, left.file, left.row) == (1, True, 0, 2)


characters = st.characters(exclude_categories=["Cs"])
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(characters)
json_rows_of_any_kind = st.lists(
    st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab\\"]},é', max_size=3), inner, max_size=3),
    ),
    min_size=1,
    max_size=6,
)


@given(json_rows_of_any_kind, st.sampled_from([None, 1]), st.booleans(), st.integers(1, 9), st.data())
def test_a_list_is_read_as_in_memory_whatever_is_read_at_once_and_from_any_row(tmp_path, rows, indent, ascii_only, chunk, data):
    path = tmp_path / "a.json"
    path.write_text(f" \n{json.dumps(rows, indent=indent, ensure_ascii=ascii_only)}\n ", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_list, "READ_BYTES", chunk)
        found = list(json_list.json_file_rows(path, BEGINNING))
        assert [row.record for row in found] == rows
        start = data.draw(st.sampled_from(found))
        again = json_list.json_file_rows(path, Start(0, 0, start.number, 0, start.offset))
        assert list(again) == found[start.number - 1 :]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is an empty list"),
        ('[{"text": "a"}, {"text" "b"}]', r"row 2: not JSON \(Expecting ':' delimiter\) at byte 24, and where"),
        ('[{"text": "a"} {"text": "b"}]', "row 1: followed by '{', not by a comma at byte 15"),
        ('[{"text": "a"},]', "row 2: not JSON"),
        ('[{"text": "a"}] {"text": "b"}', "goes on after its list, at byte 16"),
        ('[{"text": "a"}', "ends in the middle"),
        ('{\n "text": "a"\n}', r"line 1: not JSON .*A \.json file is a list of rows"),
        ('[{"text": "é\udcff"}]', r"is not UTF-8 at byte 13"),
        ("[" * 100_000, "row 1: not JSON"),
    ],
)
def test_a_broken_list_is_refused_at_its_row_and_byte(tmp_path, text, message):
    (tmp_path / "a.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=message):
        documents(tmp_path / "a.json")


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_a_name_twice_in_an_object_is_that_row_alone(tmp_path, ending):
    rows = ['{"text": "a"}', '{"text": "b", "text": "c"}', '{"text": "d", "more": {"x": {"y": 1, "y": 1}}}', '{"text": "e"}']
    path = tmp_path / f"a{ending}"
    path.write_text("\n".join(rows) if ending == ".jsonl" else f"[{','.join(rows)}]")
    first, second, third, last = documents(path)
    assert second.problem == "an object with the name `text` twice" and third.problem == "an object with the name `y` twice"
    assert (first.text, last.text, last.row) == ("a", "e", 4)


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_in_a_file_of_lines_is_told_how_to_be_read(tmp_path, indent):
    rows = [{"text": "x"}, {"text": "y"}]
    (tmp_path / "list.jsonl").write_text(json.dumps(rows, indent=indent))
    first = documents(tmp_path / "list.jsonl")[0]
    assert first.problem is not None and "one list of rows is read under the name .json" in first.problem
    assert texts((tmp_path / "list.jsonl").rename(tmp_path / "list.json")) == ["x", "y"]


def test_problems_name_lines_of_lines_and_rows_of_all_else(tmp_path):
    names = {"a.jsonl": "line", "a.jsonl.gz": "line", "a.json": "row", "a.parquet": "row", "a.arrow": "row"}
    for name, word in names.items():
        assert problem_text((tmp_path / name,), 0, 3, "x").endswith(f"{name}, {word} 3: x")


def test_bad_values_in_parquet_are_that_row_alone(tmp_path):
    invalid = pa.array([b"good", b"\xff", b"fine"], pa.binary()).view(pa.string())
    times = pa.array([0, 1, 2**60], pa.timestamp("ms"))
    pq.write_table(pa.table({"text": invalid, "when": times}), tmp_path / "a.parquet")
    good, not_utf8, late = documents(tmp_path / "a.parquet")
    assert good.text == "good"
    assert "UTF-8" in not_utf8.problem
    assert "cannot be read" in late.problem and late.row == 3


def test_invalid_utf8_in_a_text_file_names_the_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("é".encode() * 700_000 + b"\xff tail")
    with pytest.raises(InputError, match=r"a\.txt is not UTF-8 at byte 1400000"):
        documents(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", None, "there is no file"),
        ("a.jsonl", b"", "is empty"),
        ("a.bz2", b"x", "not of a known kind"),
    ],
)
def test_files_are_checked_before_anything_is_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        check_files((tmp_path / name,))
    with pytest.raises(InputError, match="is a folder"):
        check_files((tmp_path,))


@pytest.mark.parametrize("name", ["a.csv", "it's.CSV", '$(exit 3) "b".csv'])
def test_a_csv_file_is_refused_with_the_script_that_makes_one_that_is_read(tmp_path, name):
    (tmp_path / name).write_text('text,topic\n"One, two.",light\n42,007\n')
    with pytest.raises(InputError) as refused:
        check_files((tmp_path / name,))
    python, option, script = shlex.split(str(refused.value).split("of it with ")[1])
    assert (python, option) == ("python", "-c")
    exec(script)
    (first, second) = documents(tmp_path / f"{name}.parquet")
    assert (first.text, first.columns, second.text) == ("One, two.", {"topic": "light"}, "42")
    assert second.columns == {"topic": "007"}


def test_files_of_one_name_are_told_apart_by_their_folder():
    files = (Path("/x/train/a.jsonl"), Path("/x/test/a.jsonl"), Path("/x/b.jsonl"))
    assert file_names(files) == ["train/a.jsonl", "test/a.jsonl", "b.jsonl"]
    deep = (Path("/x/1/d/a.jsonl"), Path("/x/2/d/a.jsonl"), Path("/a.jsonl"), Path("a.jsonl"))
    assert file_names(deep) == ["1/d/a.jsonl", "2/d/a.jsonl", "a.jsonl", f"{Path.cwd().name}/a.jsonl"]


def test_what_is_no_file_is_told_what_to_name(tmp_path):
    (tmp_path / "rows").mkdir()
    for name in ("a.parquet", "b.parquet", "notes.json", "README"):
        (tmp_path / "rows" / name).touch()
    with pytest.raises(InputError, match=r"rows is a folder: name the files in it, such as .*/rows/\*\.parquet"):
        check_files((tmp_path / "rows",))
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(InputError, match=r"pipe\.jsonl is a pipe or a device, .*: write it to a file, and name that"):
        check_files((tmp_path / "pipe.jsonl",))


def test_a_file_that_is_given_twice_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mix.jsonl").write_bytes(lines({"text": "x"}))
    (tmp_path / "copy.jsonl").write_bytes(lines({"text": "x"}))
    (tmp_path / "link.jsonl").symlink_to("mix.jsonl")
    check_files((Path("mix.jsonl"), Path("copy.jsonl")))
    with pytest.raises(InputError, match=r"^mix\.jsonl is given twice"):
        check_files((Path("mix.jsonl"), Path("copy.jsonl"), Path("./mix.jsonl")))
    for other in (tmp_path / "mix.jsonl", Path("link.jsonl"), Path("../") / tmp_path.name / "mix.jsonl"):
        with pytest.raises(InputError, match=r"mix\.jsonl|link\.jsonl is the same file as mix\.jsonl: .* name it once"):
            check_files((Path("mix.jsonl"), other))


# --- parts --------------------------------------------------------------------------------------------------------------

prose = st.lists(st.sampled_from([*"ab é界🌊.\u2028\n \t\r", "\n\n", "\r\n\r\n", "\n \n"]), max_size=200).map("".join)


@given(prose, st.integers(1, 60))
def test_parts_joined_are_the_text_and_none_is_too_long(text, limit):
    parts = list(cut_text(text, limit))
    assert "".join(parts) == text
    assert all(0 < len(part) <= limit for part in parts) or text == ""


def test_parts_end_at_paragraph_ends_or_else_lines_or_else_words():
    paragraph = "A few words here.\nAnd a second line.\n\n"
    assert list(cut_text(paragraph * 3, 45)) == [paragraph] * 3
    assert list(cut_text("first line here\nsecond line here\n", 20)) == ["first line here\n", "second line here\n"]
    assert list(cut_text("several words in a row", 10)) == ["several ", "words in ", "a row"]
    assert list(cut_text("x" * 25, 10)) == ["x" * 10, "x" * 10, "x" * 5]


@given(prose, st.integers(1, 60), st.integers(1, 9), st.booleans())
def test_a_text_file_is_cut_as_it_would_be_in_memory_whatever_is_read_at_once(tmp_path, text, limit, chunk, mark):
    path = tmp_path / "a.txt"
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "READ_BYTES", chunk)
        found = documents(path, limit=limit)
        assert [document.text for document in found] == list(cut_text(text, limit))
        assert [document.last_part for document in found] == [False] * (len(found) - 1) + [True]
        for document in found:  # every offset leads to its own part and no other
            start = Start(document.number, 0, 1, document.part, document.offset)
            assert [each.text for each in documents(path, start=start, limit=limit)] == [
                each.text for each in found[document.number :]
            ]


def test_long_rows_become_numbered_parts_that_share_their_row(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "word " * 50, "title": "long"}, {"text": "short", "title": "small"}])
    found = documents(path, limit=100)
    assert [(document.number, document.row, document.part) for document in found] == [
        (0, 1, 0),
        (1, 1, 1),
        (2, 1, 2),
        (3, 2, 0),
    ]
    assert [document.last_part for document in found] == [False, False, True, True]
    assert found[1].columns == {"title": "long"}


# --- starting anywhere --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed_files(tmp_path_factory) -> tuple[Path, ...]:
    """Good, bad, empty and long rows in files of every kind."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = [{"text": f"row {number}. " * (number * 7 % 30), "n": number} for number in range(23)]
    data = lines(*rows[:9]) + b"\nnot json\n" + lines(*rows[9:])
    (folder / "a.jsonl").write_bytes(data)
    (folder / "b.jsonl.zst").write_bytes(compress(data[:100]) + compress(data[100:]))
    pq.write_table(pa.Table.from_pylist(rows), folder / "c.parquet", row_group_size=7)
    write_arrow(folder / "f.arrow", rows)
    (folder / "g.jsonl.gz").write_bytes(gzip.compress(data[:100]) + gzip.compress(data[100:]))
    (folder / "h.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([*rows, {"title": "é 🌊"}], indent=2).encode())
    (folder / "i.json.zst").write_bytes(compress(json.dumps([*rows, [1], 5, None]).encode()))
    (folder / "j.json").write_bytes(lines(*rows[:5]))
    (folder / "d.txt").write_bytes("\ufeffParagraph é one.\r\n\r\nParagraph two 🌊.\r\n\r\n".encode() * 20)
    (folder / "e.jsonl").write_bytes(lines({"text": "the end"}))
    return tuple(sorted(folder.iterdir()))


@settings(max_examples=20)
@given(st.permutations(range(10)), st.integers(1, 20), st.integers(20, 150))
def test_every_shard_begins_where_a_full_reading_meets_it(mixed_files, order, shard_size, limit):
    files = tuple(mixed_files[index] for index in order)
    whole = documents(*files, limit=limit)
    assert [document.number for document in whole] == list(range(len(whole)))
    plan, _ = scan(Scanner(files, KeepDocuments(), limit), shard_size)
    assert plan.documents == len(whole)
    assert [start.document for start in plan.shards] == list(range(0, len(whole), shard_size))
    assert sum(start.positions for start in plan.shards) == sum(document.characters for document in whole)
    for start in plan.shards:
        found = islice(read_documents(files, replace(start, positions=0), limit), shard_size + 1)
        assert list(found) == whole[start.document : start.document + shard_size + 1]


@settings(max_examples=12)
@given(st.permutations(range(10)), st.integers(1, 20), st.integers(20, 150), st.integers(40, 900))
@example(range(10), 3, 60, 5)  # thousands of pieces
def test_pieces_of_any_size_hold_what_the_whole_does(mixed_files, order, shard_size, limit, size):
    files = tuple(mixed_files[index] for index in order)
    whole = scan(Scanner(files, RefuseBadRows(), limit), shard_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "MIN_PIECE_BYTES", size)
        patch.setattr(pieces, "MAX_PIECE_BYTES", size)
        scanner = Scanner(files, RefuseBadRows(), limit)
        assert scan(scanner, shard_size) == whole
        assert sum(map(scanner.bytes, scanner.pieces)) == sum(scanner.sizes)
        assert size > 100 or len(scanner.pieces) > 12


def test_what_is_wrong_in_the_middle_of_a_file_is_told_by_its_line(tmp_path, monkeypatch):
    for name in ("MIN_PIECE_BYTES", "MAX_PIECE_BYTES"):
        monkeypatch.setattr(pieces, name, 50)
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        lines({"text": "first"}) + b"\n\n" + lines(*[{"text": f"{number} " * 20} for number in range(9)]) + b"[1]\n"
    )

    class OneUnknownToken(RefuseBadRows):
        def sequences(self, document):
            (sequence,) = super().sequences(document)
            sequence.token_ids[0] = 7 if document.text.startswith("6 ") else 0
            return [sequence]

    with pytest.raises(InputError, match=r"a\.jsonl, line 10: the teacher's tokenizer gives token 7"):
        scan(Scanner((path,), OneUnknownToken(), 1000, vocabulary_size=7), 2)
    found, _ = scan(Scanner((path,), OneUnknownToken(), 1000), 2)
    assert [(left.row, left.file) for left in found.counts.left_out.values()] == [(13, 0)]


def test_progress_through_a_corpus_is_in_bytes_of_its_files_and_ends_at_their_sum(mixed_files):
    passed: list[float] = []

    def advance(amount, **figures):
        passed.append(amount)

    scan(Scanner(mixed_files, KeepDocuments(), 50), 3, advance)
    assert min(passed) >= 0 and sum(passed) == sum(path.stat().st_size for path in mixed_files)
    plain = [path for path in mixed_files if path.suffix == ".jsonl"]
    passed.clear()
    scan(Scanner((plain[0],), KeepDocuments(), 1000), 3, advance)
    assert max(passed) < plain[0].stat().st_size / 3  # it moves on with each row


class KeepDocuments:
    """Stands in for a tokenizer: each document is one sequence, with a token for each character."""

    notes = ()

    def sequences(self, document):
        length = document.characters
        return [TokenSequence(document, 0, np.zeros(length, np.int64), np.ones(length, bool))]


class RefuseBadRows(KeepDocuments):
    def sequences(self, document):
        if document.problem is not None:
            raise BadRow(document.problem)
        return super().sequences(document)


class Plan:
    """The half of a manifest that a shard's reader needs."""

    def __init__(self, files, found):
        self.corpus = {"files": [{"name": path.name} for path in files]}
        self.derived = {"documents": found.documents, "shards": [vars(start) for start in found.shards]}


@settings(max_examples=20)
@given(st.integers(1, 20), st.data())
def test_shards_read_in_any_order_hold_what_a_full_reading_holds(mixed_files, shard_size, data):
    config = DumpConfig("teacher", mixed_files, Path("store"), max_length=2, shard_size=shard_size)
    whole = documents(*mixed_files, limit=config.part_characters)
    found, _ = scan(Scanner(mixed_files, KeepDocuments(), config.part_characters), shard_size)
    shards = data.draw(st.lists(st.integers(0, len(found.shards) - 1), max_size=8))
    reader = ShardReader(config, Plan(mixed_files, found), KeepDocuments())
    for shard in shards:
        read = [sequence.document for sequence in reader.read(shard).sequences]
        assert read == whole[shard * shard_size : (shard + 1) * shard_size]


def test_a_corpus_read_in_order_is_opened_once(mixed_files, monkeypatch):
    config = DumpConfig("teacher", mixed_files, Path("store"), max_length=2, shard_size=3)
    found, _ = scan(Scanner(mixed_files, KeepDocuments(), config.part_characters), 3)
    opened = []

    def counted(*arguments):
        opened.append(arguments)
        return read_documents(*arguments)

    monkeypatch.setattr("teacher_dump.dumping.plan.read_documents", counted)
    reader = ShardReader(config, Plan(mixed_files, found), KeepDocuments())
    for shard in range(len(found.shards)):
        reader.read(shard)
    assert len(opened) == 1


def test_rows_that_are_skipped_change_no_number(tmp_path):
    rows = [b'{"text": "a"}', b"broken", b'{"text": ""}', b'{"text": "d"}']
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(rows))
    mended = tmp_path / "b.jsonl"
    mended.write_bytes(b"\n".join([rows[0], b'{"text": "b"}', *rows[2:]]))
    assert [(each.number, each.row) for each in documents(path)] == [(each.number, each.row) for each in documents(mended)]


# --- columns ------------------------------------------------------------------------------------------------------------


def test_column_types_are_merged_over_all_rows(tmp_path):
    rows = [
        {"text": "a", "whole": 1, "mixed": 1, "yes": True, "odd": 1, "large": 2**70, "nested": {"k": [1]}, "never": None},
        {"text": "b", "whole": None, "mixed": 0.5, "yes": False, "odd": "x", "large": 1, "nested": "plain"},
        {"text": "c", "late": True},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert scan(Scanner((path,), KeepDocuments(), 1000), 2)[0].columns == {
        "whole": "int64",
        "mixed": "double",
        "yes": "bool",
        "odd": "string",
        "large": "string",
        "nested": "string",
        "never": "string",
        "late": "bool",
    }


@pytest.mark.parametrize(
    ("value", "column_type", "stored"),
    [
        (None, "string", None),
        ("text", "string", "text"),
        ({"k": ["é", 1]}, "string", '{"k": ["é", 1]}'),
        (True, "string", "true"),
        (2**70, "string", str(2**70)),
        (3, "double", 3.0),
        (3, "int64", 3),
    ],
)
def test_values_take_their_columns_type(value, column_type, stored):
    result = column_value(value, column_type)
    assert result == stored and type(result) is type(stored)


@pytest.mark.parametrize("encoding", ["UTF-16-le", "UTF-16-be", "UTF-32-le", "UTF-32-be"])
def test_another_unicode_encoding_is_told_once_and_what_to_do(encoding, tmp_path):
    path, name = tmp_path / "a.jsonl", encoding[:6]
    path.write_bytes('\ufeff{"text": "a"}\r\n{"text": "b"}\r\n'.encode(encoding))
    with pytest.raises(
        InputError, match=rf"a\.jsonl is {name}, not UTF-8: convert it, for example with iconv -f {name} -t UTF-8"
    ):
        documents(path)
