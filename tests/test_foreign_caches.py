"""Caches that other programs made are imported with known answers, and refused where they are off by one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_tokenizer
from foreign_caches import (
    Cache,
    K,
    make_cache,
    shifted,
    write_axolotl,
    write_distillkit,
    write_megatron,
    write_nemo,
    write_plain,
    write_vllm,
)
from processes import Notes
from typer.testing import CliRunner

from knowledge_store import KnowledgeStore, verify
from knowledge_store.errors import InputError
from knowledge_store.kinds.positions import positions_of
from teacher_dump.importers.configuration import ImportConfig
from teacher_dump.importers.run import import_dump
from teacher_dump.teachers.protocol import Ability, Likeliest

STEP = 1 / 8
AS_LONG = (30, 30, 30, 30)  # of Megatron's samples


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.fixture(scope="module")
def vocabulary(tokenizer_folder) -> int:
    return len(make_tokenizer())


WRITERS = {
    "plain": write_plain,
    "distillkit": write_distillkit,
    "vllm": write_vllm,
    "axolotl": write_axolotl,
    "nemo-aligner": write_nemo,
    "megatron": write_megatron,
}


def written(name: str, folder: Path, cache: Cache, vocabulary: int) -> list[str]:
    """A cache in a layout: the words of the command that name its files."""
    more = (vocabulary,) if name == "distillkit" else ()
    return WRITERS[name](folder, cache, *more)


def import_files(store: Path, words: list[str], name: str, tokenizer: Path, *more: str):
    from teacher_dump.cli import app

    return CliRunner().invoke(app, ["import", str(store), *words, "--format", name, "--tokenizer", str(tokenizer), *more])


def error_of(result) -> str:
    """The one line that says what is wrong."""
    assert result.exit_code == 2, result.output
    [line] = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert result.output.splitlines()[-1] == line
    return line


def imported(store: Path) -> list[dict]:
    opened = KnowledgeStore.open(store)
    return [opened[number] for number in range(len(opened))]


@pytest.mark.parametrize("name", WRITERS)
def test_known_answers(name, tmp_path, tokenizer_folder, vocabulary):
    cache = make_cache(vocabulary, AS_LONG) if name == "megatron" else make_cache(vocabulary)
    words = written(name, tmp_path, cache, vocabulary)
    result = import_files(tmp_path / "store", words, name, tokenizer_folder)
    assert result.exit_code == 0, result.output
    assert verify(tmp_path / "store").sound
    order = [0, 2, 1, 3] if name == "megatron" else range(len(cache.tokens))  # a rank's file holds every second sample
    sequences = imported(tmp_path / "store")
    assert len(sequences) == len(cache.tokens)
    for found, text in zip(sequences, order, strict=True):
        tokens, ids, logprobs, own = (column[text] for column in (cache.tokens, cache.ids, cache.logprobs, cache.own))
        first = 2 if name in ("axolotl", "nemo-aligner") else 1  # whose labels leave a token out
        assert np.array_equal(found["input_ids"], tokens)
        assert found["has_knowledge"][1:].all() and not found["has_knowledge"][0]
        assert found["is_target"].tolist() == [False] * first + [True] * (len(tokens) - first)
        assert np.array_equal(found["candidate_ids"][1:], ids[1:])
        assert np.abs(found["candidate_logprobs"][1:] - logprobs[1:]).max() < 1.5 * STEP
        tail = np.log1p(-np.exp(logprobs).sum(axis=1))
        assert np.abs(found["tail_logprob"][1:] - tail[1:]).max() < 1.5 * STEP
        among = (ids == tokens[:, None]).any(axis=1)[1:]
        known = ~np.isnan(found["token_logprob"][1:])
        assert known.all() if name in ("plain", "vllm") else np.array_equal(known, among)
        assert np.abs(found["token_logprob"][1:] - own[1:])[known].max() < 1.5 * STEP
    parameters = positions_of(KnowledgeStore.open(tmp_path / "store").manifest())
    assert parameters.tail == ("exact" if name == "plain" else "remainder")
    assert parameters.unknown_tokens == (name not in ("plain", "vllm"))


@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize("name", WRITERS)
def test_off_by_one_is_refused(name, by, tmp_path, tokenizer_folder, vocabulary):
    cache = shifted(make_cache(vocabulary, AS_LONG if name == "megatron" else (40, 60)), by)
    words = written(name, tmp_path, cache, vocabulary)
    result = import_files(tmp_path / "store", words, name, tokenizer_folder)
    assert result.exit_code == 2
    assert "are off by one" in error_of(result)
    assert not (tmp_path / "store").exists()


@pytest.fixture(scope="module")
def replies(tmp_path_factory, vocabulary) -> list[str]:
    """Lines of replies, right in all."""
    folder = tmp_path_factory.mktemp("replies")
    [path] = write_vllm(folder, make_cache(vocabulary))
    return Path(path).read_text().splitlines(keepends=True)


def changed(line: str, old: str, new: str) -> str:
    assert old in line
    return line.replace(old, new, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda line: line[:-40] + "\n", "line 2 is not JSON"),
        (lambda line: changed(line, '"prompt_token_ids"', '"ids"'), "no prompt_token_ids"),
        (lambda line: changed(line, '"prompt_token_ids": [', '"prompt_token_ids": [7, '), "predictions of 23 tokens, and 24"),
        (lambda line: changed(line, '"prompt_token_ids": [', '"prompt_token_ids": [9999'), "beyond the vocabulary of 400"),
        (lambda line: changed(line, '"logprob": -', '"logprob": -9999.0, "was": -'), "-9999"),
        (lambda line: line.replace('"logprob": -0', '"logprob": 0'), "sum to"),
        (lambda line: line.replace('"logprob": -', '"logprob": NaN, "was": -'), "is NaN"),
        (lambda line: changed(line, '"error": null', '"error": {"message": "no"}'), "of a request that failed"),
        (lambda line: '{"choices": [{"text": "none"}]}\n', "neither prompt_logprobs nor logprobs"),
        (lambda line: "[]\n", "line 2 is not a JSON object"),
    ],
)
def test_replies_that_cannot_be_used(change, said, tmp_path, tokenizer_folder, replies):
    file = tmp_path / "replies.jsonl"
    file.write_text("".join([replies[0], change(replies[1]), *replies[2:]]))
    error = error_of(import_files(tmp_path / "store", [str(file)], "vllm", tokenizer_folder))
    assert said in error and str(file) in error
    assert not (tmp_path / "store").exists()


def test_answers_of_chats_and_completions(tmp_path, tokenizer_folder, vocabulary):
    """Tokens named by their ids, with and without an echo; without ids, a token's text is not enough."""
    cache = make_cache(vocabulary, (40, 40, 40))
    prompt = 10
    lines = []
    for tokens, ids, logprobs, own in zip(cache.tokens, cache.ids, cache.logprobs, cache.own, strict=True):
        names = [f"token_id:{token}" for token in tokens]
        tops = [
            {f"token_id:{token}": logprob for token, logprob in zip(*row, strict=True)}
            for row in zip(ids.tolist(), logprobs.tolist(), strict=True)
        ]
        choices = [
            {"logprobs": {"content": [
                {"token": names[t], "logprob": own[t], "top_logprobs": [{"token": n, "logprob": p} for n, p in tops[t].items()]}
                for t in range(prompt, len(tokens))
            ]}, "token_ids": tokens[prompt:].tolist()},
            {"logprobs": {"tokens": names[prompt:], "token_logprobs": own[prompt:].tolist(), "top_logprobs": tops[prompt:]}},
            {"logprobs": {"tokens": names, "token_logprobs": [None, *own[1:].tolist()], "top_logprobs": [None, *tops[1:]]}},
        ]  # fmt: skip
        choice = choices[len(lines)]
        lines.append({"prompt_token_ids": tokens[:prompt].tolist(), "choices": [choice]})
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = import_files(tmp_path / "store", [str(file)], "vllm", tokenizer_folder)
    assert result.exit_code == 0, result.output
    for found, tokens, ids, known in zip(imported(tmp_path / "store"), cache.tokens, cache.ids, (10, 10, 1), strict=True):
        assert np.array_equal(found["input_ids"], tokens)
        assert found["has_knowledge"].tolist() == [False] * known + [True] * (40 - known)
        assert found["is_target"].tolist() == [False] * prompt + [True] * (40 - prompt)
        assert np.array_equal(found["candidate_ids"][known:], ids[known:])
    file.write_text(json.dumps(lines[1]).replace("token_id:", "w"))
    assert "tokens by their text" in error_of(import_files(tmp_path / "other", [str(file)], "vllm", tokenizer_folder))


def test_replies_that_say_the_token_alone(tmp_path, tokenizer_folder, replies):
    """Of prompt_logprobs = 0: the token itself would pass for the likeliest one."""
    record = json.loads(replies[0])
    [choice] = record["response"]["body"]["choices"]
    choice["prompt_logprobs"] = [entry and dict([next(iter(entry.items()))]) for entry in choice["prompt_logprobs"]]
    file = tmp_path / "replies.jsonl"
    file.write_text(json.dumps(record))
    assert "ask the server for more" in error_of(import_files(tmp_path / "store", [str(file)], "vllm", tokenizer_folder))


def test_files_too_small_to_tell_by_themselves(tmp_path, tokenizer_folder, vocabulary):
    """A few positions each: what all files say together counts, also where it is that they are off by one."""
    for by, code in ((0, 0), (1, 2)):
        words = []
        for number in range(12):
            folder = tmp_path / f"{by}-{number}"
            folder.mkdir()
            words += write_vllm(folder, shifted(make_cache(vocabulary, (6,), seed=number), by))
        result = import_files(tmp_path / f"store-{by}", words, "vllm", tokenizer_folder)
        assert result.exit_code == code, result.output


def test_a_file_that_is_off_by_one_in_parts_is_refused(tmp_path, tokenizer_folder, vocabulary):
    """As two caches have it that were written into one file."""
    cache, other = (make_cache(vocabulary, (40,) * 8, seed=seed) for seed in (0, 1))
    [right] = write_vllm(tmp_path, cache)
    lines = Path(right).read_text()
    [wrong] = write_vllm(tmp_path, shifted(other, 1))
    file = tmp_path / "both.jsonl"
    file.write_text(lines + "".join(Path(wrong).read_text().splitlines(keepends=True)[:2]))
    assert "off by one in 2 of 10 sequences" in error_of(import_files(tmp_path / "s", [str(file)], "vllm", tokenizer_folder))


def test_rows_and_files_with_no_targets(tmp_path, tokenizer_folder, vocabulary):
    """A row with none is left out where nothing stands in it, and of files that have none nothing can be learnt."""
    [file] = write_nemo(tmp_path, make_cache(vocabulary))
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    for wrong, code in ((rows[:1], 0), (rows, 2)):
        for row in wrong:
            row["loss_mask"] = [0] * len(row["loss_mask"])
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        result = import_files(tmp_path / f"store-{code}", [file], "nemo-aligner", tokenizer_folder)
        assert result.exit_code == code, result.output
    cache = make_cache(vocabulary)
    words = write_rows(tmp_path, cache, rest=lambda rest: [-100] * len(rest))
    more = ("--columns", "ids=ids,candidates=top,logprobs=scores,targets=rest")
    error = error_of(import_files(tmp_path / "store", words, "plain", tokenizer_folder, *more))
    assert "no token that counts for training" in error


def write_rows(folder: Path, cache: Cache, **changes) -> list[str]:
    """JSON Lines of plain columns; a change is given each row's list and gives another."""
    rows = []
    for text in range(len(cache.tokens)):
        columns = {"ids": cache.tokens, "top": cache.ids, "scores": cache.logprobs, "own": cache.own}
        row = {name: column[text].tolist() for name, column in columns.items()}
        row["rest"] = np.log1p(-np.exp(cache.logprobs[text]).sum(axis=1)).tolist()
        rows.append({name: changes.get(name, list)(column) for name, column in row.items()})
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(file)]


@pytest.mark.parametrize(
    ("changes", "columns", "said"),
    [
        ({}, "mask=padding", "there is no column 'padding'"),
        ({"own": lambda own: [*own[:5], 0.7, *own[6:]]}, "token=own", "the probability of the token at token 5 is 2.014"),
        ({"own": lambda own: [-0.01] * len(own)}, "token=own", "is 0.99, and"),
        ({"rest": lambda rest: [-0.1] * len(rest)}, "tail=rest", "not to one"),
    ],
)
def test_columns_that_do_not_fit(changes, columns, said, tmp_path, tokenizer_folder, vocabulary):
    words = write_rows(tmp_path, make_cache(vocabulary), **changes)
    more = ("--columns", f"ids=ids,candidates=top,logprobs=scores,{columns}")
    assert said in error_of(import_files(tmp_path / "store", words, "plain", tokenizer_folder, *more))
    assert not (tmp_path / "store").exists()


def test_rows_with_no_predictions_are_left_out(tmp_path, tokenizer_folder, vocabulary):
    words = write_rows(tmp_path, make_cache(vocabulary))
    with open(words[0], "a") as file:
        file.write('{"ids": [5, 6, 7], "top": null, "scores": null}\n')
    more = ("--columns", "ids=ids,candidates=top,logprobs=scores")
    result = import_files(tmp_path / "store", words, "plain", tokenizer_folder, *more)
    assert result.exit_code == 0 and "4 of 5 rows are used" in result.output


def test_small_tails_of_float32_are_not_believed(tmp_path, tokenizer_folder, vocabulary):
    """What a server computed in float32 and wrote as text says nothing of a tail of e^-20."""
    from knowledge_store.kinds.positions.remainder import MIN_LOG_REMAINDER

    cache = make_cache(vocabulary)
    for tokens, ids, logprobs in zip(cache.tokens, cache.ids, cache.logprobs, strict=True):
        ids[:, 0] = tokens
        ids[:, 1:] = (tokens[:, None] + np.arange(1, K)) % vocabulary
        logprobs[:, :] = np.float32([-1e-9, -30, -31, -32, -33])
    words = write_vllm(
        tmp_path, Cache(cache.tokens, cache.ids, cache.logprobs, [p[:, 0] for p in cache.logprobs], cache.tokens)
    )
    assert import_files(tmp_path / "store", words, "vllm", tokenizer_folder).exit_code == 0
    for found in imported(tmp_path / "store"):
        assert np.abs(found["tail_logprob"][1:] - MIN_LOG_REMAINDER).max() <= STEP


def test_what_is_not_of_its_layout(tmp_path, tokenizer_folder, vocabulary):
    cache = make_cache(vocabulary)
    for folder in ("a", "b", "c", "d"):
        (tmp_path / folder).mkdir()
    store = tmp_path / "store"

    def error(words: list[str], name: str, *more: str) -> str:
        return error_of(import_files(store, words, name, tokenizer_folder, *more))

    [packed] = write_distillkit(tmp_path / "a", cache, vocabulary)
    assert "there is no column 'input_ids'" in error(write_plain(tmp_path / "b", cache)[:1], "distillkit")
    assert "there is no column 'tokens'" in error([packed, "--columns", "ids=tokens,candidates=a,logprobs=b"], "plain")
    assert "needs --columns" in error([packed], "plain")
    assert "--columns is an option of --format plain" in error([packed, "--columns", "ids=a"], "distillkit")
    assert "does not say once" in error([packed, "--columns", "ids=a,idz=b"], "plain")
    assert "not named as Megatron-LM names them" in error([packed, "--token-file", packed], "megatron")
    assert "needs --token-file" in error([packed], "megatron")
    assert "there is no file" in error(["nothing.parquet"], "distillkit")
    assert "named twice" in error([packed, packed], "distillkit")
    configuration = tmp_path / "a" / "compression_config.yaml"
    text = configuration.read_text()
    configuration.write_text(text.replace("exact_k: 2", "exact_k: 3").replace("num_elements: 3", "num_elements: 2"))
    assert "bytes of log-probabilities" in error([packed], "distillkit")
    configuration.write_text("k: 5\n")
    assert "no configuration of DistillKit" in error([packed], "distillkit")
    configuration.unlink()
    assert "there is no compression_config.yaml beside" in error([packed], "distillkit")
    broken = tmp_path / "c" / "x.parquet"
    broken.write_bytes(b"PAR1 and then nothing")
    assert "cannot be read" in error([str(broken)], "distillkit")
    raw = tmp_path / "c" / "raw.parquet"
    pq.write_table(pa.table({"messages": ["hello"], "logprobs": ["x"]}), raw)
    assert "axolotl preprocess" in error([str(raw)], "axolotl")
    tar = write_megatron(tmp_path / "d", make_cache(vocabulary, AS_LONG))
    assert "no file of data-parallel rank 0" in error(tar[1:], "megatron")
    Path(tar[0]).write_bytes(b"no tar")
    assert "is no tar file" in error(tar, "megatron")
    result = import_files(store, [packed], "csv", tokenizer_folder)
    assert result.exit_code == 2 and "csv" in result.output
    assert not store.exists()


def test_ids_that_lost_their_upper_bits(tmp_path, tokenizer_folder):
    """A vocabulary larger than 2^17 whose ids never reach it was cut to 17 bits."""
    tar = write_megatron(tmp_path, make_cache(400, AS_LONG))
    result = import_files(tmp_path / "store", tar, "megatron", tokenizer_folder, "--vocabulary-size", "151936")
    assert "cut to 17 bits" in error_of(result)


def test_a_stopped_import_is_resumed(tmp_path, tokenizer_folder, vocabulary, monkeypatch):
    """Stopped behind its second shard, the same command makes the others, and the same files come out."""
    from knowledge_store import DumpWriter

    words = write_vllm(tmp_path, make_cache(vocabulary, (40, 23, 60, 31, 9)))
    more = ("--shard-size", "1", "--name", "cache")
    whole = import_files(tmp_path / "whole", words, "vllm", tokenizer_folder, *more)
    assert "5 of 5 shards imported" in whole.output
    commit, count = DumpWriter.commit, []

    def stop(self, shard):
        if len(count) == 2:
            raise KeyboardInterrupt
        count.append(shard.number)
        return commit(self, shard)

    monkeypatch.setattr(DumpWriter, "commit", stop)
    import_files(tmp_path / "store", words, "vllm", tokenizer_folder, *more)
    monkeypatch.setattr(DumpWriter, "commit", commit)
    resumed = import_files(tmp_path / "store", words, "vllm", tokenizer_folder, *more)
    assert "3 of 5 shards imported, 2 existed" in resumed.output
    for file in sorted((tmp_path / "whole" / "cache").rglob("*.parquet")):
        assert (tmp_path / "store" / file.relative_to(tmp_path / "whole")).read_bytes() == file.read_bytes()
    other = import_files(tmp_path / "store", words, "vllm", tokenizer_folder, "--name", "cache", "--vocabulary-size", "500")
    assert "was made differently" in error_of(other)


def test_an_imported_dump_is_repaired(tmp_path, tokenizer_folder, vocabulary):
    """By the command that made it, and only by that one; what is sound stays."""
    from teacher_dump.cli import app

    store = tmp_path / "store"
    words = write_vllm(tmp_path, make_cache(vocabulary))
    more = ("--shard-size", "2", "--name", "cache")
    assert "no dump 'cache'" in error_of(import_files(store, words, "vllm", tokenizer_folder, *more, "--repair"))
    assert import_files(store, words, "vllm", tokenizer_folder, *more).exit_code == 0
    whole = {file: file.read_bytes() for file in store.rglob("*") if file.is_file()}
    for name in ("positions/00001.parquet", "tokens.parquet", "manifest.json"):
        file = store / "cache" / name
        data = bytearray(whole[file])
        data[len(data) // 3] ^= 0xFF
        file.write_bytes(data)
        assert verify(store).damage
        again = ["run", store, "--name", "cache", "--teacher", tokenizer_folder, "--corpus", words[0], "--repair"]
        if name != "manifest.json":  # which alone knows that it was imported
            assert "was imported" in error_of(CliRunner().invoke(app, list(map(str, again))))
        result = import_files(store, words, "vllm", tokenizer_folder, *more, "--repair")
        assert result.exit_code == 0, result.output
        assert ("1 of 2 shards repaired" if "/" in name else "0 of 2 shards repaired") in result.output
        assert verify(store).sound
        assert {file: file.read_bytes() for file in store.rglob("*") if file.is_file()} == whole
    other = tmp_path / "more.jsonl"
    other.write_text('{"text": "more"}\n')
    result = CliRunner().invoke(app, ["run", str(store), "--append", "cache", "--corpus", str(other)])
    assert "was imported" in error_of(result)


def test_round_trip_through_distillkit(tmp_path, tokenizer_folder, teacher_folder, store_folder):
    """A store written in DistillKit's layout and imported again has the same candidates, and all values within one step."""
    folder = tmp_path / "packed"
    opened = KnowledgeStore.open(store_folder)
    assert opened.export_distillkit(folder, "train") == opened.sequence_count("train")
    more = ("--teacher", str(teacher_folder), "--device", "cpu", "--name", "again")
    result = import_files(tmp_path / "store", [str(folder / "data_0.parquet")], "distillkit", teacher_folder, *more)
    assert result.exit_code == 0, result.output
    for number, found in enumerate(imported(tmp_path / "store")):
        kept = opened["train", number]
        for name in ("input_ids", "is_target", "has_knowledge", "candidate_ids"):
            assert np.array_equal(found[name], kept[name])
        for name in ("candidate_logprobs", "tail_logprob"):
            known = kept["has_knowledge"]
            assert np.abs(found[name][known] - kept[name][known]).max() <= STEP + 1e-6
    assert not verify(tmp_path / "store").damage
    found = KnowledgeStore.open(tmp_path / "store").manifest()
    assert found.vocabulary_size == opened.manifest("train").vocabulary_size


def test_the_vocabulary_is_that_of_the_files(tmp_path, tokenizer_folder, vocabulary):
    """DistillKit's configuration says it: more than the tokenizer's tokens are padding, fewer are of another tokenizer."""
    words = write_distillkit(tmp_path, make_cache(vocabulary), vocabulary)
    configuration = tmp_path / "compression_config.yaml"
    text = configuration.read_text()
    for size in (vocabulary + 50, vocabulary - 50):  # as many bits of an id
        configuration.write_text(text.replace(f"d: {vocabulary}", f"d: {size}"))
        result = import_files(tmp_path / "store", words, "distillkit", tokenizer_folder)
        if size > vocabulary:
            assert result.exit_code == 0, result.output
            assert KnowledgeStore.open(tmp_path / "store").manifest().vocabulary_size == size
        else:
            assert "the teacher's own --tokenizer" in error_of(result)


@pytest.fixture(scope="module")
def asked(tmp_path_factory, loaded_teacher) -> Path:
    """What the tiny teacher says of a few texts, as its own logits have it: plain columns, row j of token j + 1."""
    import torch

    random = np.random.default_rng(5)
    rows = []
    for length in (30, 41, 25, 33, 28, 44):
        tokens = random.integers(0, 400, length)
        with torch.no_grad():
            logits = loaded_teacher.model(input_ids=torch.from_numpy(tokens)[None]).logits[0]
        logprobs, ids = torch.log_softmax(logits.double(), dim=1).topk(8, dim=1)
        rows.append({"tokens": tokens.tolist(), "top": ids.tolist(), "scores": logprobs.tolist()})
    file = tmp_path_factory.mktemp("asked") / "asked.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


COLUMNS = ("--columns", "ids=tokens,candidates=top,logprobs=scores", "--device", "cpu")


def test_the_teacher_is_asked_again(asked, tmp_path, teacher_folder, loaded_teacher):
    """A teacher of random weights: the file alone does not tell, and the teacher does. What it made works as any dump does."""
    store, teacher = tmp_path / "store", ("--teacher", str(teacher_folder))

    def run(*more: str):
        return import_files(store, [str(asked), *COLUMNS], "plain", teacher_folder, *more)

    size = ("--vocabulary-size", str(loaded_teacher.vocabulary_size))
    assert "give --teacher" in error_of(run("--row-predicts", "next", *size))
    assert "off by one" in error_of(run("--row-predicts", "this", *teacher))
    assert not store.exists()
    result = run("--row-predicts", "next", *teacher)
    assert result.exit_code == 0, result.output
    assert "positions asked again" in result.output

    from teacher_dump import CheckConfig, check

    [agreement] = check(CheckConfig(store=store, teacher=str(teacher_folder)), loaded_teacher).values()
    assert agreement.agrees, agreement.lines
    opened = KnowledgeStore.open(store)
    [line] = [line for line in opened.info()[0].lines if line[0] == "selection"]
    assert line[1].startswith("top-k 8, tail as the remainder")
    rows = opened.sql("SELECT count(*) AS n, count(token_logprob) AS known, count(tail_logprob) AS kept FROM positions")
    n, known, kept = (rows[name][0].as_py() for name in ("n", "known", "kept"))
    assert n - 6 == kept > known > 0

    from knowledge_store.page.questions import Asked, statement

    [dump] = opened.dumps
    for name in ("surprised", "garbled"):  # tokens that are no candidate count as the tail at least
        about = Asked(dump, keeps_entropy=False, knows_tokens=False)
        surprise = opened.sql(statement(name, about))[about.surprise_name].to_pylist()
        assert None not in surprise and surprise == sorted(surprise, reverse=True) and surprise


class LikeliestAlone:
    """A teacher that gives its likeliest tokens and nothing else, as a server does; also its prediction."""

    abilities = frozenset({Ability.LIKELIEST})

    def __init__(self, teacher, batch=(), count=0):
        self.teacher, self.batch, self.count = teacher, batch, count
        for name in ("description", "vocabulary_size", "device"):
            setattr(self, name, getattr(teacher, name))

    def predict(self, *batch, likeliest: int):
        return LikeliestAlone(self.teacher, batch, likeliest)

    def likeliest(self, rows: np.ndarray, positions: np.ndarray) -> Likeliest:
        import torch

        places = torch.from_numpy(rows), torch.from_numpy(positions)
        found = np.zeros((len(rows), self.teacher.vocabulary_size))
        for part, logits in self.teacher.predict(*self.batch).logit_slices(*places):
            found[part] = torch.log_softmax(logits.double(), dim=1).numpy()
        ids = np.argsort(-found, axis=1, kind="stable")[:, : self.count]
        tokens = self.batch[0][rows, positions + 1]
        return Likeliest(ids, np.take_along_axis(found, ids, 1), tokens, found[np.arange(len(rows)), tokens])


def test_a_teacher_that_gives_its_likeliest_tokens_alone_is_asked(asked, tmp_path, teacher_folder, loaded_teacher):
    teacher = LikeliestAlone(loaded_teacher)

    def run(row_predicts: str, file: Path = asked):
        columns = "ids=tokens,candidates=top,logprobs=scores"
        config = ImportConfig(
            store=tmp_path / "store", files=(file,), format="plain", tokenizer=str(teacher_folder), teacher=str(teacher_folder),
            columns=columns, row_predicts=row_predicts,
        )  # fmt: skip
        return import_dump(config, teacher)

    with pytest.raises(InputError, match="off by one: the teacher says of the token behind"):
        run("this")
    warmer = pq.read_table(asked).to_pylist()
    for row in warmer:
        row["scores"] = (np.array(row["scores"]) * 0.7 - 1).tolist()
    pq.write_table(pa.Table.from_pylist(warmer), tmp_path / "warmer.parquet")
    with pytest.raises(InputError, match="says something else than the files"):
        run("next", tmp_path / "warmer.parquet")
    assert not (tmp_path / "store").exists()
    assert run("next").shards == 1


def test_training_on_it(asked, tmp_path, teacher_folder):
    """Losses of candidates and tail learn from it; what needs the log-probability of each token says that it does."""
    from student_train import TrainConfig, calibrate, train

    store = tmp_path / "store"
    teacher = ("--teacher", str(teacher_folder), "--row-predicts", "next")
    assert import_files(store, [str(asked), *COLUMNS], "plain", teacher_folder, *teacher).exit_code == 0
    output = tmp_path / "student"
    train(TrainConfig(str(store), str(teacher_folder), str(output), steps=1, batch_size=2, eval_fraction=0.0))
    assert list(output.rglob("model.safetensors"))
    reporter = Notes()
    chosen = TrainConfig(
        str(store), str(teacher_folder), str(tmp_path / "chosen"), steps=1, batch_size=2, eval_fraction=0.0,
        positions_where="token_logprob < -1",
    )  # fmt: skip
    train(chosen, reporter=reporter)
    assert any("token_logprob, which asked does not know" in sentence for sentence in reporter.notes)
    with pytest.raises(InputError, match="does not know it of tokens that are no candidate"):
        calibrate(KnowledgeStore.open(store), method="temperature")
    assert calibrate(KnowledgeStore.open(store), method="first").calibration.before["nll"] > 0


def test_polynomials_differences_and_the_older_form(tmp_path, tokenizer_folder, vocabulary):
    """Log-probabilities that lie on a curve are kept by its coefficients, in both forms, and as differences."""
    cache = make_cache(vocabulary, (40, 60))
    rank = np.arange(K)
    bits, rows, older = 9, [], []
    for tokens, ids, own in zip(cache.tokens, cache.ids, cache.logprobs, strict=True):
        ids, first = np.roll(ids, -1, axis=0), np.roll(own[:, 0], -1).clip(max=-0.3).astype(np.float32)
        slope = -2 - first.astype(np.float64) % 1
        spread = (ids[:, :, None] >> np.arange(bits - 1, -1, -1)) & 1
        packed = np.packbits(spread.reshape(len(ids), -1).astype(np.uint8), axis=1)
        # Differences: −2.x each, as a constant, and a correction of one bit on the first of them.
        parts = [first.astype("<f4"), slope.astype("<f4"), np.full(len(ids), 0.25, "<f2")]
        octets = [part[:, None].view(np.uint8) for part in parts]
        one_bit = np.full((len(ids), 1), 0b10000000, np.uint8)
        columns = [octets[0], octets[1], octets[2], one_bit]
        rows.append((tokens, packed, np.concatenate(columns, axis=1)))
        words = np.zeros((len(ids), 1), np.int64)
        for place in range(K):
            words[:, 0] |= ids[:, place] << (bits * place)
        older.append((tokens, words, first[:, None], np.stack([first - 1.0, 1.0 * slope], axis=1)))
    (tmp_path / "new").mkdir()
    (tmp_path / "old").mkdir()
    names = ("input_ids", "bytepacked_indices", "compressed_logprobs")
    table = [dict(zip(names, (column.tolist() for column in row), strict=True)) for row in rows]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "new" / "data_0.parquet")
    settings = {
        "d": vocabulary, "k": K, "exact_k": 1, "exact_dtype": "float32", "polynomial_terms": [0], "delta_encoding": True,
        "residual_bins": [{"scale_dtype": "float16", "element_bits": 1, "num_elements": 1}],
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps({"teacher": {"kind": "dataset", "logprob_compressor": settings}}))
    names = ("input_ids", "packed_indices", "exact_values", "coeffs")
    table = [dict(zip(names, (column.tolist() for column in row), strict=True)) for row in older]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "old" / "data_0.parquet")
    settings = {"vocab_size": vocabulary, "k": K, "exact_k": 1, "polynomial_degree": 1, "invert_polynomial": False}
    (tmp_path / "old" / "compression_config.yaml").write_text(json.dumps(settings))

    named = [str(tmp_path / "new" / "data_0.parquet"), "--compression", str(tmp_path / "run.yaml")]
    for store, files in (("a", named), ("b", [str(tmp_path / "old" / "data_0.parquet")])):
        result = import_files(tmp_path / store, files, "distillkit", tokenizer_folder)
        assert result.exit_code == 0, result.output
    for newer, earlier, row in zip(imported(tmp_path / "a"), imported(tmp_path / "b"), older, strict=True):
        first, slope = (column[:-1, None].astype(np.float64) for column in (row[2][:, 0], row[3][:, 1]))
        for found, expected in (
            (newer, first + slope * rank + np.where(rank > 0, 0.25, 0)),
            (earlier, np.where(rank > 0, first - 1 + slope * rank, first)),
        ):
            assert np.abs(found["candidate_logprobs"][1:] - expected).max() < 1.5 * STEP


def test_candidates_that_were_made_to_sum_to_one(tmp_path, tokenizer_folder, vocabulary):
    """What other tokens had is lost, and that is said."""
    cache = make_cache(vocabulary, (40, 60))
    for logprobs in cache.logprobs:
        logprobs -= np.log(np.exp(logprobs).sum(axis=1, keepdims=True))
    result = import_files(tmp_path / "store", write_axolotl(tmp_path, cache), "axolotl", tokenizer_folder)
    assert result.exit_code == 0, result.output
    assert "what the teacher left to other tokens is lost" in " ".join(result.output.split())
    assert verify(tmp_path / "store").sound


def test_what_axolotl_prepared(tmp_path, tokenizer_folder):
    """`axolotl_prepared.jsonl` was made by axolotl 0.19.0's own transform, of lists one shorter than the tokens, as vLLM gives
    them without the first: it fills them up on the left, so that row j is of token j."""
    file = str(Path(__file__).with_name("axolotl_prepared.jsonl"))
    cache = make_cache(400, (24, 30), seed=3, k=3)
    error = error_of(import_files(tmp_path / "store", [file], "axolotl", tokenizer_folder))
    assert "off by one" in error and "--row-predicts this" in error
    result = import_files(tmp_path / "store", [file], "axolotl", tokenizer_folder, "--row-predicts", "this")
    assert result.exit_code == 0, result.output
    for found, tokens, ids, logprobs in zip(imported(tmp_path / "store"), cache.tokens, cache.ids, cache.logprobs, strict=True):
        assert np.array_equal(found["input_ids"], tokens) and np.array_equal(found["candidate_ids"][1:], ids[1:])
        whole = logprobs - np.log(np.exp(logprobs).sum(axis=1, keepdims=True))
        assert np.abs(found["candidate_logprobs"][1:] - whole[1:]).max() < 1.5 * STEP


def test_what_vllm_answered(tmp_path):
    """The recorded replies of a real server, whose teacher has random weights and is asked again."""
    from recorded_server import FOLDER, recording, served_model
    from transformers import AutoTokenizer

    teacher = tmp_path / "teacher"
    served_model().save_pretrained(teacher)
    AutoTokenizer.from_pretrained(FOLDER).save_pretrained(teacher)
    bodies = [
        body
        for key, (_, body) in recording().items()
        if key.startswith("/v1/completions") and key.endswith(" 8") and len(body["choices"][0]["prompt_logprobs"]) > 2
    ]
    file = tmp_path / "replies.jsonl"
    file.write_text("".join(json.dumps(body) + "\n" for body in bodies))
    more = ("--teacher", str(teacher), "--device", "cpu")
    result = import_files(tmp_path / "store", [str(file)], "vllm", teacher, *more)
    assert result.exit_code == 0, result.output
    assert verify(tmp_path / "store").sound
    sequences = imported(tmp_path / "store")
    assert len(sequences) == len(bodies)
    for found, body in zip(sequences, bodies, strict=True):
        [choice] = body["choices"]
        assert found["input_ids"].tolist() == choice["prompt_token_ids"]
        for place, said in enumerate(choice["prompt_logprobs"][1:], 1):
            likeliest = sorted((entry["rank"], int(token)) for token, entry in said.items() if entry["rank"] <= 8)
            assert found["candidate_ids"][place].tolist() == [token for _, token in likeliest]
            own = said[str(found["input_ids"][place])]["logprob"]
            assert abs(found["token_logprob"][place] - own) < 1.5 * STEP
