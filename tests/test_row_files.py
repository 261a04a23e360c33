"""Rows mean the same in every type of file: the same conversations, the same token ids and targets."""

from __future__ import annotations

import json
import warnings
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import CHAT_TEMPLATE, make_tokenizer
from hypothesis import given, settings
from row_files import ARROW_WRITERS, JSON_WRITERS, free_rows, short_numbers, struct_rows, with_json_text

from knowledge_store import KnowledgeStore
from teacher_dump import DumpConfig, dump
from teacher_dump.corpus.documents import Document, read_documents
from teacher_dump.corpus.rows import BadRow, Start
from teacher_dump.corpus.tokenisation import CorpusTokenizer

# Shows every field of a conversation, null apart from absent, in the order that the row has.
SHOWING_TEMPLATE = "{{ tools | tojson }}{{ mood | default('') }}\n" + CHAT_TEMPLATE.replace(
    "message['content']", "(message | tojson)"
)


def read(*files: Path) -> list[Document]:
    return list(read_documents(files, Start(0, 0, 1, 0, 0), 10_000))


def contents(*files: Path) -> list[Any]:
    for document in (documents := read(*files)):
        assert document.problem is None
    return [(document.messages, document.template_arguments, document.columns) for document in documents]


@pytest.fixture(scope="module")
def tokenizer() -> CorpusTokenizer:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = SHOWING_TEMPLATE
    return CorpusTokenizer(tokenizer, 4096)


def sequences(tokenizer: CorpusTokenizer, *files: Path) -> list[Any]:
    """Token ids and targets of each row, or why it cannot be used."""
    found: list[Any] = []
    for document in read(*files):
        try:
            found.append([(one.token_ids.tolist(), one.is_target.tolist()) for one in tokenizer.sequences(document)])
        except BadRow as problem:
            found.append(str(problem))
    return found


@settings(max_examples=30)
@given(rows=struct_rows())
def test_struct_columns_give_the_rows_of_json(tmp_path, tokenizer, rows):
    write = {**JSON_WRITERS, **ARROW_WRITERS}
    for ending in write:
        write[ending](tmp_path / f"rows{ending}", rows)
    expected = contents(tmp_path / "rows.jsonl")
    assert [document[0] for document in expected] == [row["messages"] for row in rows]
    tokens = sequences(tokenizer, tmp_path / "rows.jsonl")
    for ending in write:
        assert json.dumps(contents(tmp_path / f"rows{ending}")) == json.dumps(expected)
        assert sequences(tokenizer, tmp_path / f"rows{ending}") == tokens


@settings(max_examples=30)
@given(rows=free_rows())
def test_columns_of_json_text_give_the_rows_of_json_without_exception(tmp_path, tokenizer, rows):
    (tmp_path / "rows").mkdir(exist_ok=True)
    plain = tmp_path / "rows" / "plain.jsonl"
    JSON_WRITERS[".jsonl"](plain, rows)
    expected, tokens = contents(plain), sequences(tokenizer, plain)
    write = {**JSON_WRITERS, **ARROW_WRITERS}
    for ending in write:
        path = tmp_path / "rows" / f"text{ending}"
        write[ending](path, with_json_text(rows))
        assert json.dumps(contents(path)) == json.dumps(expected)
        assert sequences(tokenizer, path) == tokens


# --- through `datasets` ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def datasets():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    return datasets


def written_by_datasets(datasets, folder: Path, rows: list[dict[str, Any]], **options: Any) -> list[Path]:
    """Files that `datasets` makes of rows: Parquet, its own folder, JSON Lines."""
    data = datasets.Dataset.from_list(rows, **options)
    data.to_parquet(folder / "rows.parquet")
    data.save_to_disk(folder / "saved")
    data.to_json(folder / "rows.jsonl")
    return [folder / "rows.parquet", next((folder / "saved").glob("*.arrow")), folder / "rows.jsonl"]


@settings(max_examples=5)
@given(rows=struct_rows())
def test_struct_columns_of_datasets_give_the_rows_of_json(tmp_path, tokenizer, datasets, rows):
    JSON_WRITERS[".jsonl"](tmp_path / "plain.jsonl", rows)
    expected, tokens = json.dumps(contents(tmp_path / "plain.jsonl")), sequences(tokenizer, tmp_path / "plain.jsonl")
    for path in written_by_datasets(datasets, tmp_path, rows)[:2]:  # in its JSON Lines the nulls of the structs are true ones
        assert json.dumps(contents(path)) == expected
        assert sequences(tokenizer, path) == tokens


@settings(max_examples=5)
@given(rows=free_rows(short_numbers))
def test_json_of_datasets_as_text_or_as_its_json_type_gives_the_rows_of_json(tmp_path, tokenizer, datasets, rows):
    JSON_WRITERS[".jsonl"](tmp_path / "plain.jsonl", rows)
    expected, tokens = contents(tmp_path / "plain.jsonl"), sequences(tokenizer, tmp_path / "plain.jsonl")
    for path in written_by_datasets(datasets, tmp_path, with_json_text(rows)):
        assert json.dumps(contents(path)) == json.dumps(expected)
        assert sequences(tokenizer, path) == tokens
    features = datasets.Features(
        {
            "messages": datasets.List(datasets.Json()),
            "tools": datasets.List(datasets.Json()),
            "chat_template_kwargs": datasets.Json(),
            "number": datasets.Value("int64"),
        }
    )
    for path in written_by_datasets(datasets, tmp_path, rows, features=features):
        assert json.dumps(contents(path)) == json.dumps(expected)
        assert sequences(tokenizer, path) == tokens


# --- values of Arrow ------------------------------------------------------------------------------------------------------


def record_of(tmp_path: Path, column: pa.Array) -> Any:
    """What a column named `value` is in a row, read from Parquet and from Arrow."""
    table = pa.table({"text": ["x"] * len(column), "value": column})
    pq.write_table(table, tmp_path / "values.parquet")
    with pa.ipc.new_file(tmp_path / "values.arrow", table.schema) as file:
        file.write_table(table)
    found = [[document.columns["value"] for document in read(tmp_path / f"values.{ending}")] for ending in ("parquet", "arrow")]
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize(
    ("values", "kind", "plain"),
    [
        ([{"a": 1}, {"b": [None, {"c": "x"}]}, {}, None], None, [{"a": 1}, {"b": [None, {"c": "x"}]}, {}, None]),
        ([[("k", 1), ("l", None)], [], None], pa.map_(pa.string(), pa.int64()), [{"k": 1, "l": None}, {}, None]),
        ([[(1, {"a": 1})], [(2, {})]], pa.map_(pa.int64(), pa.struct([("a", pa.int64())])), [{"1": {"a": 1}}, {"2": {}}]),
        ([b"caf\xc3\xa9", b"\xff\x00"], None, ["café", "/wA="]),
        ([0.5, None], pa.float16(), [0.5, None]),
        ([5_000_000_000], pa.duration("ns"), [5.0]),
        ([b"0123456789abcdef"], pa.uuid(), ["30313233-3435-3637-3839-616263646566"]),
        (["a", "a"], pa.dictionary(pa.int32(), pa.string()), ["a", "a"]),
        ([Decimal("12.50"), Decimal("3.00")], None, [12.5, 3.0]),
        ([Decimal("12"), Decimal("-3")], None, [12, -3]),
        ([Decimal("0.1234567890123456789")], None, ["0.1234567890123456789"]),
        (['{"a": null}', None], pa.json_(), [{"a": None}, None]),
    ],
)
def test_values_of_arrow_are_those_of_json(tmp_path, values, kind, plain):
    assert record_of(tmp_path, pa.array(values, kind)) == plain


@pytest.mark.parametrize(
    ("count", "kind", "text"),
    [
        (1_700_000_000, pa.timestamp("s"), "2023-11-14T22:13:20"),
        (1_700_000_000_500, pa.timestamp("ms"), "2023-11-14T22:13:20.5"),
        (1_700_000_000_000_000_001, pa.timestamp("ns"), "2023-11-14T22:13:20.000000001"),
        (1_700_000_000_000_000, pa.timestamp("us", "Europe/Berlin"), "2023-11-14T22:13:20Z"),
        (19_675, pa.date32(), "2023-11-14"),
        (80_000_000_000, pa.time64("us"), "22:13:20"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_points_in_time_are_iso_text_at_any_depth(tmp_path, count, kind, text, nested):
    column = pa.array([count, None], kind)
    if nested:
        column = pa.StructArray.from_arrays([pa.array([[count], None], pa.list_(kind)), column], ["list", "one"])
    assert record_of(tmp_path, column) == ([{"list": [text], "one": text}, {}] if nested else [text, None])


def test_a_map_with_a_key_twice_and_a_false_json_value_are_their_rows_problem(tmp_path):
    table = pa.table(
        {
            "text": ["a", "b", "c"],
            "map": pa.array([[("k", 1)], [("k", 1), ("k", 2)], []], pa.map_(pa.string(), pa.int64())),
            "json": pa.array(["1", "1", "{"], pa.json_()),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    good, repeated, broken = read(tmp_path / "a.parquet")
    assert good.problem is None
    assert "a map with a key twice" in repeated.problem and "not JSON" in broken.problem


def test_a_row_of_parquet_does_not_depend_on_its_neighbours(tmp_path):
    answers = [{"role": "assistant", "content": "b", "weight": index} for index in range(3)]
    rows: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": "a"}, answer]} for answer in answers]
    rows[1]["messages"][0]["deep"] = {"x": {"y": "z"}}
    ARROW_WRITERS[".parquet"](tmp_path / "all.parquet", rows)
    for index, row in enumerate(rows):
        ARROW_WRITERS[".parquet"](tmp_path / "one.parquet", [row])
        assert contents(tmp_path / "one.parquet") == contents(tmp_path / "all.parquet")[index : index + 1]


def test_columns_of_parquet_are_asked_about_in_sql_as_what_they_are(tmp_path, loaded_teacher):
    days = [datetime(2024, 5, day, 12, 30, tzinfo=UTC) for day in (1, 2, 3)]
    table = pa.table(
        {
            "text": [f"The lamp was lit {count} times." for count in (1, 2, 3)],
            "when": pa.array(days, pa.timestamp("us", "UTC")),
            "price": pa.array([Decimal("1.50"), Decimal("2.25"), None], pa.decimal128(10, 2)),
            "exact": pa.array([Decimal("0.12345678901234567890")] * 3, pa.decimal128(30, 20)),
            "source": ["a", "b", "c"],
            "Source": [1, 2, 3],
            "length": ["short"] * 3,
            "nested": [{"x": 1, "y": None}, {"x": None, "y": days[0]}, None],
        }
    )
    pq.write_table(table, tmp_path / "c.parquet")
    dump(DumpConfig("tiny", tmp_path / "c.parquet", tmp_path / "s", max_length=40), teacher=loaded_teacher)
    store = KnowledgeStore.open(tmp_path / "s")
    row = store.sql("SELECT * FROM sequences ORDER BY document").to_pylist()[1]
    own = {"when": "2024-05-02T12:30:00Z", "price": 2.25, "exact": "0.12345678901234567890", "corpus_length": "short"}
    own |= {"Source": 2, "source_2": "b", "nested": '{"y": "2024-05-01T12:30:00Z"}'}
    assert {name: row[name] for name in own} == own
    found = store.sql(
        'SELECT sum(price) AS price, max("when"::TIMESTAMPTZ) AS latest FROM sequences WHERE "when" < \'2024-05-03\''
    )
    assert found.to_pylist()[0]["price"] == 3.75
