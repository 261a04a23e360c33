"""What is kept of an extractor's values: integers exactly, floats rounded; what a field cannot hold is refused."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pytest
from conftest import ROOT
from stores import make_manifest, random_sequences, sequence_row, words

from knowledge_store import KINDS, DumpWriter, Field, InputError, Kind, KnowledgeStore, Shard, verify
from knowledge_store.format.sequences import tokens_table

TOKENS = tokens_table(words(11), words(11))
LARGE = 2**60 + 1  # a float64 has no such number
SIGNED, UNSIGNED = [LARGE, 5, -LARGE, 2**63 - 1, -(2**63)], [LARGE, 5, 2**63 + 1, 2**64 - 1, 2**63]
POSITIVE = [LARGE, 5, 2**63 - 1, 0, LARGE + 2]  # in either type


def commit(folder, monkeypatch, fields, sequences, per="item"):
    """A store of a kind "toy" of some fields, one shard of the arrays of each sequence."""
    monkeypatch.setitem(KINDS, "toy", Kind("toy", per, lambda manifest: fields))
    writer = DumpWriter.open(folder, make_manifest("d", shards=1, kinds={"toy": {}}), TOKENS)
    rows = [sequence_row(place, each) for place, each in enumerate(random_sequences(0, len(sequences)))]
    writer.commit(Shard(0, 0, 100, rows, {"toy": sequences}))
    return folder


def in_types(values, dtype):
    """The same integers as an extractor may give them."""
    yield "list", list(values)
    yield "array", np.array(values, dtype)
    yield "numpy's in a list", [dtype(value) for value in values]
    yield "objects", np.array(values, object)
    yield "masked", np.ma.masked_array(np.array(values, dtype), False)
    if all(0 <= value < 2**63 for value in values):
        yield "the other type", np.array(values, np.uint64 if dtype is np.int64 else np.int64)
        yield "both types", [(np.int64 if place % 2 else np.uint64)(value) for place, value in enumerate(values)]


def integer_sequences(dtype):
    """Sequences of items, and the values that have to come out again, by the name of their field."""
    found = []
    for values in (SIGNED if dtype is np.int64 else UNSIGNED, POSITIVE):
        for _, given in in_types(values, dtype):
            array = given if isinstance(given, np.ndarray) else None
            ragged = [given[:place] for place in range(len(values))]
            wide = np.ma.stack([array, array], axis=1) if array is not None else [[value, value] for value in given]
            nulls = [None, *list(given)[1:]]
            masked = np.ma.masked_array(array, np.arange(len(values)) == 0) if array is not None else nulls
            for missing in (nulls, masked):
                arrays = {"one": given, "none": missing, "wide": wide, "ragged": ragged, "mixed": [[], *ragged[1:-1], None]}
                expected = {
                    "one": values,
                    "none": [None, *values[1:]],
                    "wide": [[value, value] for value in values],
                    "ragged": [values[:place] for place in range(len(values))],
                    "mixed": [*(values[:place] for place in range(len(values) - 1)), None],
                }
                found.append((arrays, expected))
    empty = {"one": np.zeros(0), "none": [], "wide": np.zeros((0, 2)), "ragged": [], "mixed": []}
    return [*found, (empty, {name: [] for name in empty})]


@pytest.mark.parametrize("row_group", [2**26, 300])
@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_integers_are_exact(tmp_path, monkeypatch, dtype, row_group):
    """Of each shape, however they are given, in one row group or many, from the files and from batches, cached or not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("knowledge_store.writing.row_groups.ROW_GROUP_BYTES", row_group)
    padding = np.iinfo(dtype).max - 2
    shapes = {"one": "scalar", "none": "scalar", "wide": 2, "ragged": "ragged", "mixed": "ragged"}
    of_type = pa.from_numpy_dtype(dtype)
    fields = tuple(Field(name, of_type, shape, name in ("none", "mixed"), padding) for name, shape in shapes.items())
    sequences = integer_sequences(dtype)
    folder = commit(tmp_path / "store", monkeypatch, fields, [arrays for arrays, _ in sequences])
    assert verify(folder).damage == []
    opened = KnowledgeStore.open(folder)
    for ordinal, (_, expected) in enumerate(sequences):
        table, _ = opened.stored(ordinal, "toy")
        assert {name: table[name].to_pylist() for name in expected} == expected
    for _ in range(2):  # decoded, then from the cache
        [batch] = KnowledgeStore.open(folder).batches(batch_size=len(sequences) + 1, shuffle=False)
        for name, shape in shapes.items():
            assert batch[name].dtype == dtype
            for row, (_, expected) in enumerate([*sequences, (None, {name: [] for name in shapes})]):
                array = batch[name][row]
                wanted = np.full(array.shape, padding, dtype)
                for place, value in enumerate(expected[name]):
                    if shape == "scalar":
                        wanted[place] = padding if value is None else value
                    elif value:
                        wanted[place, : len(value)] = value
                assert array.tolist() == wanted.tolist()


def test_types_of_several_sequences_do_not_meet(tmp_path, monkeypatch):
    """One sequence has signed integers, the next unsigned ones: numpy alone would make floats of both."""
    values = [np.array([LARGE], np.int64), np.array([LARGE], np.uint64), [LARGE]]
    fields = (Field("one", pa.int64()),)
    folder = commit(tmp_path / "store", monkeypatch, fields, [{"one": each} for each in values], "sequence")
    assert KnowledgeStore.open(folder).sql("SELECT one FROM toy")["one"].to_pylist() == [LARGE] * 3


F16, F32, F64, U64, I64, BOOL, TEXT, BYTES = (
    *(pa.float16(), pa.float32(), pa.float64(), pa.uint64(), pa.int64(), pa.bool_(), pa.string(), pa.binary()),
)
REFUSED = [
    (F16, "scalar", np.array([70000.0]), "70000.0 is beyond what the type holds"),
    (F16, "scalar", np.array([70000]), "70000 is beyond what the type holds"),
    (F32, "scalar", [1e300], r"1e\+300 is beyond what the type holds"),
    (F32, 1, np.array([[1e300]]), r"1e\+300 is beyond what the type holds"),
    (F32, "ragged", [[np.inf]], "inf is NaN or infinite"),
    (F64, "scalar", np.array([-np.inf]), "-inf is NaN or infinite"),
    (F64, "ragged", [np.array([1.0, np.nan])], "nan is NaN or infinite"),
    (F64, "scalar", [True], "True is not a number"),
    (F64, "scalar", ["0.5"], "'0.5' is not a number"),
    (F64, "scalar", [10**400], "too large"),
    (F64, "ragged", [[0.5, None]], "None is not a number"),
    (F64, "ragged", [0.5], "0.5 stands where a list of values belongs"),
    (F64, "ragged", np.array([0.5]), "0.5 stands where a list of values belongs"),
    (F64, "ragged", np.zeros((1, 2, 2)), "2 dimensions"),
    (F64, 2, [[0.5]], "does not have 2 values"),
    (F64, 2, np.ma.masked_array([[1.0, 2.0]], [[True, False]]), "a value among those of a row is masked"),
    (F64, "ragged", [np.ma.masked_array([1.0, 2.0], [True, False])], "a value among those of a row is masked"),
    (BOOL, "scalar", np.array([0.2]), r"0.2 is of another type \(float64\)"),
    (BOOL, "scalar", [7], "7 is not a bool"),
    (BOOL, "ragged", [np.array([1])], r"1 is of another type \(int64\)"),
    (I64, "scalar", np.array([2.5]), "2.5 is not an integer"),
    (I64, "scalar", [2.5], "2.5 is not an integer"),
    (I64, "ragged", [[np.inf]], "inf is not an integer"),
    (I64, "scalar", np.array([True]), r"True is of another type \(bool\)"),
    (I64, "scalar", np.array([2**63], np.uint64), f"{2**63} is not between"),
    (I64, "scalar", ["5"], "'5' is not a number"),
    (U64, "scalar", np.array([-1]), "-1 is not between"),
    (U64, "ragged", [[2**64]], f"{2**64} is not between"),
    (TEXT, "ragged", ["abc"], "'abc' stands where a list of values belongs"),
    (TEXT, "ragged", [["a", None]], "None is not text"),
    (TEXT, "ragged", [[1, 2]], "1 is not text"),
    (TEXT, "scalar", [5], "5 is not text"),
    (TEXT, "scalar", [b"a"], "b'a' is not text"),
    (TEXT, "scalar", ["\ud800"], "surrogates"),
    (BYTES, "scalar", ["a"], "'a' is not bytes"),
]  # fmt: skip


@pytest.mark.parametrize(("of_type", "shape", "rows", "reason"), REFUSED)
def test_what_a_field_cannot_hold_is_refused(tmp_path, monkeypatch, of_type, shape, rows, reason):
    with pytest.raises(InputError, match=f"kind 'toy' .*the array 'x' is not what its field declares .*{reason}"):
        commit(tmp_path, monkeypatch, (Field("x", of_type, shape),), [{"x": rows}], "sequence")
    assert not (tmp_path / "d/toy/00000.parquet").exists()


@pytest.mark.parametrize(("of_type", "value"), [(F64, 5), (F64, np.float64(0.5)), (TEXT, "a"), (TEXT, {"a"})])
def test_one_value_is_no_array(tmp_path, monkeypatch, of_type, value):
    with pytest.raises(InputError, match=f"kind 'toy' .*the array 'x' is one value, {re.escape(repr(value))}"):
        commit(tmp_path, monkeypatch, (Field("x", of_type),), [{"x": value}], "sequence")


def test_arrays_are_those_of_the_fields(tmp_path, monkeypatch):
    fields = (Field("x", F64), Field("y", F64))
    with pytest.raises(InputError, match=r"kind 'toy' .*no field declares the array 'z'"):
        commit(tmp_path / "1", monkeypatch, fields, [{"x": [0.5], "y": [0.5], "z": [0.5]}], "sequence")
    with pytest.raises(InputError, match=r"kind 'toy' .*there is no array 'y'"):
        commit(tmp_path / "2", monkeypatch, fields, [{"x": [0.5]}], "sequence")


@pytest.mark.parametrize("place", [0, 1])
def test_a_codec_misses_an_array_by_name(tmp_path, place):
    writer = DumpWriter.open(tmp_path, make_manifest("d", shards=1), TOKENS)
    sequences = random_sequences(0, 2)
    rows = [sequence_row(number, each) for number, each in enumerate(sequences)]
    del sequences[place]["tail_logprob"]
    with pytest.raises(InputError, match=r"kind 'positions' .*there is no array 'tail_logprob'"):
        writer.commit(Shard(0, 0, 100, rows, {"positions": sequences}))


def test_what_a_field_holds_is_kept(tmp_path, monkeypatch):
    """Rounded floats, infinite ones where the field says so, whole floats as integers, empty rows of any type."""
    fields = (
        Field("small", F16),
        Field("unbounded", F32, "ragged", infinite=True),
        Field("whole", I64),
        Field("empty", U64, "ragged"),
        Field("flag", BOOL),
        Field("raw", BYTES),
    )
    arrays = {
        "small": np.array([1 / 3]),
        "unbounded": [np.array([-np.inf, 1 / 3])],
        "whole": [3.0],
        "empty": [np.zeros(0)],
        "flag": [np.True_],
        "raw": [b"\xff"],
    }
    folder = commit(tmp_path, monkeypatch, fields, [arrays], "sequence")
    assert verify(folder).damage == []
    [row] = KnowledgeStore.open(folder).stored(0, "toy")[0].drop(["sequence_id"]).to_pylist()
    assert row == {
        "small": float(np.float16(1 / 3)),
        "unbounded": [-np.inf, float(np.float32(1 / 3))],
        "whole": 3,
        "empty": [],
        "flag": True,
        "raw": b"\xff",
    }


def test_a_padding_is_of_its_field():
    for of_type, padding in ((pa.uint8(), -1), (I64, 0.5), (BOOL, 2)):
        with pytest.raises(InputError, match="does not hold its padding"):
            Field("x", of_type, padding=padding)


def test_a_long_list_in_a_row_group_of_its_own_is_sound(tmp_path, monkeypatch):
    """What is written by row groups is verified by row groups: padding all lists of a shard to the longest would take much."""
    monkeypatch.setattr("knowledge_store.kinds.columns.MAX_PADDED", 1000)
    monkeypatch.setattr("knowledge_store.writing.row_groups.ROW_GROUP_BYTES", 2000)
    sequences = [{"x": np.zeros((100, 1))}, {"x": [np.arange(200.0)]}]
    folder = commit(tmp_path, monkeypatch, (Field("x", F64, "ragged"),), sequences)
    assert verify(folder).damage == []


def test_the_kind_that_the_format_shows(tmp_path, monkeypatch, capsys):
    """What FORMAT.md says of a kind of one's own runs as it stands, with names of `knowledge_store` alone."""
    text = (ROOT / "knowledge_store/FORMAT.md").read_text().partition("### A kind of one's own\n")[2]
    lines = [line.removeprefix("    ") for line in text.splitlines() if line.startswith("    ") or not line]
    assert not any("knowledge_store." in line for line in lines)
    monkeypatch.setitem(KINDS, "margins", KINDS["positions"])  # removed again after the test
    monkeypatch.chdir(tmp_path)
    exec("\n".join(lines), {"__name__": "document"})
    assert capsys.readouterr().out.split() == ["[0.", "0.5", "1.5]"]
    assert verify("toy-store").damage == []
