"""Sealed JSON files, manifests and commit records: what was altered, or was never shaped right, is named and refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import commit_of, make_manifest, manifest_of, sealed_json, write_store

from knowledge_store import DamageError, KnowledgeStore, StoreError
from knowledge_store.format.layout import FORMAT_VERSION
from knowledge_store.format.records import MAX_DEPTH, seal, unseal

HERE = Path("record.json")

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=5), each, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=8).filter(lambda key: key != "sha256"), JSON, max_size=5))
def test_what_was_sealed_is_read(record):
    try:
        data = seal(record)
    except UnicodeEncodeError:  # half a character cannot be written in UTF-8
        return
    assert unseal(data, HERE) == record


@settings(max_examples=300)
@given(st.data())
def test_any_change_is_noticed(data):
    record = {"name": "naïve", "numbers": [1, 2.5, -3e-7], "nested": {"yes": True, "none": None}}
    sealed = bytearray(seal(record))
    place = data.draw(st.integers(0, len(sealed) - 1))
    sealed[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = unseal(bytes(sealed), HERE)
    except DamageError as error:
        assert "record.json is damaged" in str(error)
    else:
        assert found == record  # white space between values, nothing else


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 1, "sha256": "x"}', "twice"),
        ('{"a": {"b": 1, "b": 2}, "sha256": "x"}', "twice"),
        ('{"a": NaN, "sha256": "x"}', "NaN"),
        ('{"a": Infinity, "sha256": "x"}', "Infinity"),
        ('{"a": -Infinity, "sha256": "x"}', "Infinity"),
        ('{"a": 1e999, "sha256": "x"}', "not JSON compliant"),
        ("[1, 2]", "not a JSON object"),
        ('{"a": 1}', "SHA-256"),
        ('{"a": 1, "sha256": null}', "SHA-256"),
        ("", "damaged"),
        ("{", "damaged"),
        ("[" * 100_000, "damaged"),
        ('{"a": "\\ud800", "sha256": "x"}', "damaged"),
    ],
)
def test_refused_files(text, reason):
    with pytest.raises(DamageError, match=reason):
        unseal(text.encode(), HERE)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_json_lacks_are_not_written(value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        seal({"a": value})


def test_missing_and_unreadable(tmp_path):
    with pytest.raises(DamageError, match="is missing"):
        sealed_json(tmp_path / "nothing.json")
    with pytest.raises(DamageError, match="is not a file"):
        sealed_json(tmp_path)


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_what_is_no_file_is_closed_again(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    before = open_files()
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(DamageError, match="is not a file"):
            sealed_json(path)
    assert open_files() == before


def altered(path: Path, place: list, value: object) -> None:
    """Change one value of a sealed file, and seal it again: intact, and wrong."""
    record = json.loads(path.read_text())
    del record["sha256"]
    each = record
    for key in place[:-1]:
        each = each[key]
    if value is ...:
        del each[place[-1]]
    else:
        each[place[-1]] = value
    path.write_bytes(seal(record))


WRONG_MANIFESTS = [
    (["dump"], 5),
    (["dump"], "other"),
    (["kinds"], "positions"),
    (["kinds"], {"positions": "all"}),
    (["kinds"], ...),
    (["teacher"], []),
    (["teacher", "name"], None),
    (["teacher", "vocabulary_size"], "11"),
    (["teacher", "vocabulary_size"], True),
    (["kinds", "positions", "selection"], None),
    (["kinds", "positions", "selection", "k"], 2**70),
    (["kinds", "positions", "quantisation_step"], "small"),
    (["kinds", "positions", "quantisation_step"], 0),
    (["plan"], {}),
    (["derived"], "x"),
    (["derived", "shards"], 3),
    (["derived", "documents"], None),
    (["derived", "columns"], ["a"]),
    (["derived", "columns"], {"a": 5}),
    (["derived", "tokens"], ...),
    (["derived", "tokens", "bytes"], "many"),
    (["version"], 0),
    (["version"], True),
    (["version"], "1"),
    (["format"], "something else"),
]


@pytest.mark.parametrize(("place", "value"), WRONG_MANIFESTS)
def test_manifests_of_the_wrong_shape(tmp_path, place, value):
    store = write_store(tmp_path / "store", shards=1)
    path = store / "small/manifest.json"
    altered(path, place, value)
    with pytest.raises((DamageError, StoreError)) as raised:
        KnowledgeStore.open(store).manifest()
    assert str(path) in str(raised.value)


WRONG_COMMITS = [
    (["dump"], None),
    (["dump"], "other"),
    (["shard"], "0"),
    (["shard"], 1),
    (["documents"], 2**64),
    (["files"], []),
    (["files", "positions"], "file"),
    (["files", "positions", "rows"], 1.5),
    (["files", "positions", "sha256"], ...),
    (["files", "positions", "column_bytes"], {"token_id": None}),
    (["statistics"], [1]),
    (["statistics"], {"predictions": "all"}),
    (["skipped"], {}),
    (["made_by"], {}),
    (["made_by", "committed_at"], 5),
]


@pytest.mark.parametrize(("place", "value"), WRONG_COMMITS)
def test_commit_records_of_the_wrong_shape(tmp_path, place, value):
    store = write_store(tmp_path / "store", shards=1)
    path = store / "small/commits/00000.json"
    altered(path, place, value)
    with pytest.raises(DamageError) as raised:
        KnowledgeStore.open(store).manifest()
    assert str(path) in str(raised.value)


def test_unknown_additions_do_no_harm(tmp_path):
    """A later minor writer may record more; readers of this version go on."""
    store = write_store(tmp_path / "store", shards=1)
    altered(store / "small/manifest.json", ["remark"], "hello")
    altered(store / "small/commits/00000.json", ["files", "positions", "remark"], 1)
    assert len(KnowledgeStore.open(store)) == 4


@pytest.mark.parametrize("version", [1, 2, 3])
def test_older_formats_are_refused_by_name(tmp_path, version):
    store = write_store(tmp_path / "store", shards=1)
    altered(store / "small/manifest.json", ["version"], version)
    with pytest.raises(StoreError, match=f"manifest.json has format version {version}, which .* does not read"):
        KnowledgeStore.open(store).manifest()


def test_a_newer_format_is_refused(tmp_path):
    store = write_store(tmp_path / "store", shards=1)
    for path in (store / "store.json", store / "small/manifest.json", store / "small/commits/00000.json"):
        before = path.read_bytes()
        altered(path, ["version"], FORMAT_VERSION + 1)
        with pytest.raises(StoreError, match=rf"format version {FORMAT_VERSION + 1}.*install a newer") as raised:
            KnowledgeStore.open(store).manifest()
        assert str(path) in str(raised.value)
        path.write_bytes(before)
    altered(store / "small/manifest.json", ["kinds", "dreams"], {})
    with pytest.raises(StoreError, match="'dreams', which this knowledge-store does not know"):
        KnowledgeStore.open(store).manifest()


def test_an_unknown_column_type_is_refused(tmp_path):
    store = write_store(tmp_path / "store", shards=1)
    altered(store / "small/manifest.json", ["derived", "columns"], {"a": "tensor"})
    with pytest.raises(StoreError, match="unknown type: tensor"):
        KnowledgeStore.open(store).sql("SELECT count(*) FROM sequences")


def test_what_makes_two_manifests_differ():
    manifest = make_manifest()
    renamed = replace(
        manifest,
        teacher={**manifest.teacher, "name": "/elsewhere"},
        corpus={"files": [{**manifest.corpus["files"][0], "name": "moved.jsonl"}]},
        derived={},
    )
    assert manifest.differences(renamed) == []
    assert manifest.differences(make_manifest(k=5)) == ["of positions, the selection k was 3 and is now 5"]
    # Another rule with the same number is another dump.
    assert manifest.differences(make_manifest(selection={"name": "sampled", "k": 3})) == [
        "of positions, the selection name was top-k and is now sampled"
    ]
    other = make_manifest(plan={}, quantisation_step=0.25)
    assert manifest.differences(other) == [
        "of positions, the quantisation step was 0.125 and is now 0.25",
        "the plan's max length was 64 and is now absent",
    ]


def test_records_are_read_as_they_were_written(tmp_path):
    store = write_store(tmp_path / "store", shards=1)
    manifest = manifest_of(store)
    assert replace(manifest, derived=make_manifest(shards=1).derived) == make_manifest(shards=1)
    assert set(manifest.derived["tokens"]) == {"bytes", "sha256", "footer_sha256", "rows", "column_bytes"}
    record = commit_of(store, 0)
    assert (record.dump, record.shard, record.first_document, record.documents) == ("small", 0, 0, 100)
    assert record.made_by["host"] == "here"


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "what stands from line 1, column 1 on is not JSON"),
        (b'{"a": 1,\n nothing}', "what stands from line 2, column 2 on is not JSON"),
        (b'{"a": "\xff"}', "it is not UTF-8"),
        (b"[]", "it is not a JSON object"),
        (b"[" * 10**6, f"it is nested more than {MAX_DEPTH} deep"),
    ],
)
def test_what_is_no_record_is_told_in_words(data, sentence):
    with pytest.raises(DamageError) as raised:
        unseal(data, HERE)
    assert str(raised.value) == f"{HERE} is damaged: {sentence}"
