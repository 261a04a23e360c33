"""A calibration's file: what is written is read, it notices alterations, and it knows whose it is."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from knowledge_store.calibration.file import Calibration, check_calibration, check_output, read_calibration, write_calibration
from knowledge_store.errors import DamageError, InputError
from knowledge_store.format.records import json_sha256, seal

FIGURES = {"nll": 2.5, "ece_10": 0.1, "ece_15": 0.125, "brier": 0.75}
TEACHER = {"name": "tiny", "files": {"model.safetensors": "11", "config.json": "22"}}
TOKENIZER = {"vocabulary_sha256": "33", "size": 4}
TEMPERATURE = Calibration("temperature", 1.5, TEACHER, TOKENIZER, {"corpus": []}, 1000, FIGURES, {**FIGURES, "nll": 2.25})
FIRST = replace(TEMPERATURE, method="first", value=0.28, uncovered=7, grid=((0.1, 0.5), (0.28, 0.25)))
BUCKET = replace(TEMPERATURE, method="bucket-temperature", value=0.5, fitted_on={"dump": "d", "column": "split", "value": "é"})


@pytest.mark.parametrize("calibration", [TEMPERATURE, FIRST, BUCKET], ids=lambda each: each.method)
def test_what_is_written_is_read(tmp_path, calibration):
    path = tmp_path / "calibration.json"
    write_calibration(path, TEMPERATURE)
    write_calibration(path, calibration)  # the older one is replaced
    assert read_calibration(path) == calibration
    assert read_calibration(path).sha256 == calibration.sha256 == json.loads(path.read_text())["sha256"]
    assert [each.name for each in tmp_path.iterdir()] == ["calibration.json"]


def test_the_file_names_its_value_as_the_method_does(tmp_path):
    for calibration, name in ((TEMPERATURE, "temperature"), (FIRST, "c"), (BUCKET, "temperature")):
        write_calibration(tmp_path / "c.json", calibration)
        record = json.loads((tmp_path / "c.json").read_text())
        assert record[name] == calibration.value and record["method"] == calibration.method
        assert getattr(read_calibration(tmp_path / "c.json"), name) == calibration.value


def test_a_method_has_one_kind_of_value():
    with pytest.raises(InputError, match="no temperature"):
        _ = FIRST.temperature
    with pytest.raises(InputError, match="no c"):
        _ = BUCKET.c


def test_only_a_temperature_of_the_whole_distribution_serves_a_dump():
    assert TEMPERATURE.to_manifest() == {"temperature": 1.5, "sha256": TEMPERATURE.sha256}
    for calibration in (FIRST, BUCKET):
        with pytest.raises(InputError, match=f"this calibration is of method {calibration.method}"):
            calibration.to_manifest()


def test_every_fact_is_in_the_sha256():
    changes = [
        {"value": 1.25},
        {"method": "bucket-temperature"},
        {"teacher": {**TEACHER, "name": "other"}},
        {"targets": 1001},
        {"after": FIGURES},
    ]
    assert len({TEMPERATURE.sha256, *(replace(TEMPERATURE, **change).sha256 for change in changes)}) == len(changes) + 1


@pytest.mark.parametrize(
    ("method", "value"), [("temperature", 0.0), ("bucket-temperature", -1.0), ("temperature", float("inf")), ("first", 1.5)]
)
def test_values_out_of_range_are_refused(method, value):
    with pytest.raises(InputError, match="cannot have the value"):
        replace(TEMPERATURE, method=method, value=value)


def test_an_unknown_method_is_refused():
    with pytest.raises(InputError, match="no calibration method 'platt'"):
        replace(TEMPERATURE, method="platt")


# --- files that cannot be used --------------------------------------------------------------------------------------------


def altered(path, **changes):
    """The file of TEMPERATURE with changes, sealed again."""
    record = json.loads(TEMPERATURE.to_bytes())
    del record["sha256"]
    record = {name: value for name, value in (record | changes).items() if value is not None}
    path.write_bytes(seal(record))
    return path


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"there is no calibration file .*none\.json"):
        read_calibration(tmp_path / "none.json")
    with pytest.raises(InputError, match="there is no calibration file"):
        read_calibration(tmp_path)


def test_an_altered_file_is_noticed(tmp_path):
    path = tmp_path / "c.json"
    path.write_bytes(TEMPERATURE.to_bytes().replace(b'"temperature": 1.5', b'"temperature": 2.5'))
    with pytest.raises(DamageError, match=r"c\.json is damaged"):
        read_calibration(path)
    path.write_bytes(TEMPERATURE.to_bytes()[:-9])
    with pytest.raises(DamageError, match="is damaged"):
        read_calibration(path)


def test_a_corpus_is_no_calibration(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    with pytest.raises(InputError, match=r"c\.json is not a calibration"):
        read_calibration(path)


def test_no_more_of_a_file_is_read_than_a_calibration_may_have(tmp_path):
    """A terabyte that no disk holds: reading it would take all memory there is."""
    path = tmp_path / "c.json"
    with open(path, "wb") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match=r"c\.json is not a calibration"):
        read_calibration(path)
    with open(path, "r+b") as file:
        file.write(TEMPERATURE.to_bytes())
    with pytest.raises(DamageError, match="has more than 67,108,864 bytes"):
        read_calibration(path)


def test_a_sealed_file_of_another_kind_is_no_calibration(tmp_path):
    with pytest.raises(InputError, match="is not a calibration"):
        read_calibration(altered(tmp_path / "c.json", format="knowledge-store"))


def test_a_newer_version_is_refused(tmp_path):
    with pytest.raises(InputError, match="format version 2"):
        read_calibration(altered(tmp_path / "c.json", version=2))


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": None},
        {"temperature": "1"},
        {"temperature": -1},
        {"method": "platt"},
        {"before": {"nll": 1}},
        {"teacher": {"name": "tiny"}},
        {"grid": [[1, 2, 3]]},
        {"uncovered": None},
    ],
    ids=str,
)
def test_a_file_of_the_wrong_shape_is_damaged(tmp_path, changes):
    with pytest.raises(DamageError, match=r"c\.json is damaged"):
        read_calibration(altered(tmp_path / "c.json", **changes))


def test_an_output_that_cannot_be_written_is_known_before_anything_is_fitted(tmp_path):
    check_output(tmp_path / "new.json")
    write_calibration(tmp_path / "old.json", TEMPERATURE)
    check_output(tmp_path / "old.json")
    (tmp_path / "corpus.jsonl").write_text("precious")
    for path, message in (
        (tmp_path / "none" / "c.json", "there is no folder"),
        (tmp_path, "is a folder"),
        (tmp_path / "corpus.jsonl", "is no calibration"),
    ):
        with pytest.raises(InputError, match=message):
            check_output(path)
    with pytest.raises(InputError, match="cannot write"):
        write_calibration(tmp_path / "none" / "c.json", TEMPERATURE)


# --- whose it is ----------------------------------------------------------------------------------------------------------


def test_the_same_weights_and_vocabulary_are_accepted_under_any_name():
    check_calibration(TEMPERATURE, TEACHER, TOKENIZER)
    renamed = {"name": "copy", "files": {"weights.safetensors": "11", "config.json": "changed"}}
    check_calibration(TEMPERATURE, renamed, {**TOKENIZER, "size": 5})


@pytest.mark.parametrize(
    ("teacher", "tokenizer", "message"),
    [
        ({"name": "tiny", "files": {"model.safetensors": "12"}}, TOKENIZER, "another teacher: it was fitted to 'tiny'"),
        ({"name": "tiny", "files": {"model.safetensors": "11", "b.safetensors": "44"}}, TOKENIZER, "another teacher"),
        ({"name": "nameless"}, TOKENIZER, "another teacher"),
        (TEACHER, {"vocabulary_sha256": "34"}, "another tokenizer"),
        (TEACHER, {}, "another tokenizer"),
    ],
)
def test_another_teacher_or_tokenizer_is_refused(teacher, tokenizer, message):
    with pytest.raises(InputError, match=message):
        check_calibration(TEMPERATURE, teacher, tokenizer)


def test_the_seal_is_that_of_records():
    record = json.loads(TEMPERATURE.to_bytes())
    del record["sha256"]
    assert json_sha256(record) == TEMPERATURE.sha256
