"""A dump says what the teacher says: recomputed with plain transformers in float64, and read back through SQL and batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from conftest import story_rows, write_jsonl
from memory_storage import MemoryStorage
from processes import Notes

from knowledge_store import KnowledgeStore
from knowledge_store.kinds import KINDS, Field, Kind
from knowledge_store.writing.verification import verify
from teacher_dump import DumpConfig, dump
from teacher_dump.corpus.tokenisation import CorpusTokenizer
from teacher_dump.dumping.batches import extract_batch, predict_batch
from teacher_dump.extraction import EXTRACTORS, Extractor
from teacher_dump.extraction.distributions import UnsoundLogits
from teacher_dump.extraction.positions import positions_parameters
from teacher_dump.teachers.local import load_teacher
from teacher_dump.teachers.protocol import Ability

STEP = 1 / 8
# A value may be rounded by half a step; what comes on top is float32, in batches of other shapes than the dump's.
TOLERANCE = STEP / 2 + 1e-4
# Candidates nearer than this may change places.
TIE = 1e-3

PROMPTS = [
    {"prompt": "The lighthouse keeper", "completion": " counted the ships that passed each night."},
    {"prompt": "How far?", "completion": " As far as somebody looks for it."},
    {"prompt": "In winter", "completion": " the book was nearly empty. They read old pages aloud, and waited."},
    {"prompt": "When a storm came he lit the lamp early, and then", "completion": " no more"},
    {"prompt": [{"role": "user", "content": "How far?"}], "completion": [{"role": "assistant", "content": "Far enough."}]},
    {"messages": [{"role": "user", "content": "And then?"}, {"role": "assistant", "content": "They slept."}]},
]


def reference(teacher, sequences: list[np.ndarray], left: bool, group: int = 3) -> list[np.ndarray]:
    """For each sequence, float64 log-probabilities at each position but the last, from padded batches of three."""
    found = []
    for start in range(0, len(sequences), group):
        part = sequences[start : start + group]
        longest = max(map(len, part)) + 2
        tokens = torch.zeros((len(part), longest), dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        places = [slice(longest - len(each), longest) if left else slice(0, len(each)) for each in part]
        for row, (each, place) in enumerate(zip(part, places, strict=True)):
            tokens[row, place] = torch.from_numpy(each.astype(np.int64))
            mask[row, place] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.inference_mode():
            logits = teacher.model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        logprobs = torch.log_softmax(logits.double(), dim=-1).numpy()
        found += [logprobs[row, place][:-1] for row, place in enumerate(places)]
    return found


def check_against_reference(store: KnowledgeStore, teacher, left: bool, tolerance: float = TOLERANCE, tie: float = TIE) -> int:
    """Compare every stored prediction. Returns how many there were."""
    by_sequence: dict[int, list[dict]] = {}
    for row in store.sql("SELECT * FROM positions ORDER BY sequence_id, position").to_pylist():
        by_sequence.setdefault(row["sequence_id"], []).append(row)
    tokens = [np.array([row["token_id"] for row in rows]) for rows in by_sequence.values()]
    compared = 0
    for rows, expected in zip(by_sequence.values(), reference(teacher, tokens, left), strict=True):
        assert [row["position"] for row in rows] == list(range(len(rows)))
        for row in rows:
            if row["candidate_ids"] is None:
                assert row["token_logprob"] is None and row["tail_logprob"] is None and not row["is_target"]
                continue
            compared += 1
            ids, before = row["candidate_ids"], expected[row["position"] - 1]
            order = np.argsort(-before)
            k = len(ids)
            own = 3 * tolerance if row["token_id"] in ids else tolerance
            assert row["token_logprob"] == pytest.approx(before[row["token_id"]], abs=own)
            # Half a step each by its own gap, by the other gaps through their sum, and by the tail's log-odds.
            np.testing.assert_allclose(row["candidate_logprobs"], before[ids], atol=3 * tolerance, rtol=0)
            np.testing.assert_allclose(before[ids], before[order[:k]], atol=tie, rtol=0)
            clear = np.diff(before[order[: k + 1]]) < -tie
            if clear.all():
                assert ids == order[:k].tolist()
            tail = np.logaddexp.reduce(np.delete(before, ids))
            assert row["tail_logprob"] == pytest.approx(tail, abs=tolerance)
    return compared


@pytest.mark.parametrize("left", [False, True], ids=["right-padded", "left-padded"])
@pytest.mark.parametrize("keep_context", [False, True])
@pytest.mark.parametrize("rows", ["text", "prompts"])
def test_sql_equals_an_independent_recomputation(tmp_path, loaded_teacher, rows, keep_context, left):
    corpus = write_jsonl(tmp_path / "c.jsonl", story_rows(9) if rows == "text" else PROMPTS)
    config = DumpConfig("tiny", (corpus,), tmp_path / "s", max_length=40, batch_size=2, shard_size=5, keep_context=keep_context)
    report = dump(config, teacher=loaded_teacher)
    store = KnowledgeStore.open(tmp_path / "s")
    (counts,) = store.sql(
        "SELECT count(*) AS positions, count(*) FILTER (is_target) AS targets, count(*) FILTER (position > 0) AS predictable"
        " FROM positions"
    ).to_pylist()
    assert counts["positions"] == report.positions
    compared = check_against_reference(store, loaded_teacher, left)
    assert compared == (counts["predictable"] if keep_context else counts["targets"])
    assert (counts["targets"] < counts["predictable"]) == (rows == "prompts")


def test_only_a_completion_is_a_target(tmp_path, loaded_teacher):
    corpus = write_jsonl(tmp_path / "c.jsonl", PROMPTS[:4])
    dump(DumpConfig("tiny", (corpus,), tmp_path / "s", max_length=64, keep_context=True), teacher=loaded_teacher)
    targets = KnowledgeStore.open(tmp_path / "s").sql(
        "SELECT string_agg(token_text, '' ORDER BY position) AS text FROM positions WHERE is_target"
        " GROUP BY sequence_id ORDER BY sequence_id"
    )
    assert targets["text"].to_pylist() == [row["completion"] + "<|end|>" for row in PROMPTS[:4]]


def test_a_sequence_has_the_same_row_in_any_batch(tmp_path, loaded_teacher):
    """Alone, or with longer and shorter ones: to 1e-4 nats, float32's rounding in products of other shapes."""
    from teacher_dump.corpus.documents import read_documents
    from teacher_dump.corpus.rows import Start

    documents = []
    for row in (*story_rows(8), *PROMPTS):
        corpus = write_jsonl(tmp_path / "one.jsonl", [row])
        documents += list(read_documents((corpus,), Start(0, 0, 1, 0, 0), 10_000))
    tokenizer = CorpusTokenizer(loaded_teacher.tokenizer, 64)
    sequences = [sequence for document in documents for sequence in tokenizer.sequences(document)]
    config = DumpConfig("tiny", (Path("c.jsonl"),), Path("s"))

    def ask(*some):
        parameters = {"positions": positions_parameters(config)}
        prediction = predict_batch(config, loaded_teacher, list(some))
        return extract_batch(config, parameters, prediction, list(some))["positions"]

    together = ask(*sequences)
    for sequence, among in zip(sequences, together, strict=True):
        (alone,) = ask(sequence)
        for name, values in alone.items():
            others = among[name][:, : values.shape[1]] if name == "tail_ids" else among[name]  # padded as the widest of a batch
            np.testing.assert_allclose(values, others, atol=1e-4, rtol=0, err_msg=name)


@pytest.mark.parametrize(
    ("config_class", "special"),
    [
        (transformers.Gemma2Config, {"final_logit_softcapping": 3.0, "head_dim": 8}),
        (transformers.GraniteConfig, {"logits_scaling": 3.0}),
        (transformers.CohereConfig, {"logit_scale": 0.5}),
    ],
)
def test_models_that_change_their_logits_after_the_head(tmp_path, loaded_teacher, config_class, special):
    torch.manual_seed(0)
    size = len(loaded_teacher.tokenizer)
    config = config_class(
        vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, bos_token_id=1, eos_token_id=0,
        pad_token_id=0, **special,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "t")
    loaded_teacher.tokenizer.save_pretrained(tmp_path / "t")
    teacher = load_teacher(str(tmp_path / "t"), device="cpu")
    corpus = write_jsonl(tmp_path / "c.jsonl", story_rows(3))
    dump(DumpConfig("changing", (corpus,), tmp_path / "s", max_length=30), teacher=teacher)
    assert check_against_reference(KnowledgeStore.open(tmp_path / "s"), teacher, left=True) > 50


def test_a_half_precision_teachers_own_logits_in_full_precision(tmp_path, teacher_folder):
    """Its logits are coarse (1/64 at 4), what is made of them is not: within bfloat16's rounding of the same logits."""
    teacher = load_teacher(str(teacher_folder), dtype="bfloat16", device="cpu")
    corpus = write_jsonl(tmp_path / "c.jsonl", story_rows(3))
    config = DumpConfig(str(teacher_folder), (corpus,), tmp_path / "s", max_length=30)
    dump(config, teacher=teacher)
    store = KnowledgeStore.open(tmp_path / "s")
    assert check_against_reference(store, teacher, left=False, tolerance=TOLERANCE + 0.1, tie=0.2) > 50
    assert verify(tmp_path / "s").damage == []


@pytest.mark.parametrize(("capability", "told"), [("AVX2", True), ("AVX512", False)])
def test_a_half_precision_teacher_on_a_processor_that_is_slow_in_it(teacher_folder, monkeypatch, capability, told):
    monkeypatch.setattr("teacher_dump.teachers.local.get_cpu_capability", lambda: capability)
    reporter = Notes()
    load_teacher(str(teacher_folder), dtype="bfloat16", device="cpu", reporter=reporter)
    assert any("PyTorch is fast in bfloat16 only on CPUs with AVX-512" in note for note in reporter.notes) == told


# --- wide vocabularies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [70_000, 140_000])
def test_token_ids_above_sixteen_and_seventeen_bits_round_trip(tmp_path, vocabulary):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<end>", *(f"w{number}" for number in range(2, vocabulary))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<end>")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.5, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "t")
    tokenizer.save_pretrained(tmp_path / "t")
    ids = [number for number in (5, 65_535, 65_536, 69_999, 131_071, 131_072, 139_999) if number < vocabulary]
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": " ".join(f"w{number}" for number in ids)}])
    teacher = load_teacher(str(tmp_path / "t"), device="cpu")
    dump(DumpConfig("wide", (corpus,), tmp_path / "s", max_length=32), teacher=teacher)
    store = KnowledgeStore.open(tmp_path / "s")
    assert store[0]["input_ids"].tolist() == [*ids, 1]
    assert store[0]["candidate_ids"].max() > 65_536
    assert check_against_reference(store, teacher, left=False) == len(ids)
    shown = store.sql("SELECT token_text FROM positions ORDER BY position")["token_text"].to_pylist()
    assert [text.strip() for text in shown] == [words[number] for number in [*ids, 1]]


# --- columns, skipping --------------------------------------------------------------------------------------------------


def test_a_corpuss_own_columns_travel_and_collide_with_nothing(tmp_path, loaded_teacher):
    rows = [
        {"text": "The lamp", "document": "d1", "length": 7, "dump": "mine", "tags": ["a", {"b": 1}], "score": 1},
        {"text": "The book", "score": 0.5, "tags": None},
    ]
    corpus = write_jsonl(tmp_path / "c.jsonl", rows)
    (tmp_path / "d.txt").write_text("A third one.")
    dump(DumpConfig("tiny", (corpus, tmp_path / "d.txt"), tmp_path / "s", max_length=64, shard_size=2), teacher=loaded_teacher)
    found = KnowledgeStore.open(tmp_path / "s").sql("SELECT * FROM sequences ORDER BY sequence_id").to_pylist()
    own = ("corpus_document", "corpus_length", "corpus_dump", "tags", "score")
    assert [[row[name] for name in own] for row in found] == [
        ["d1", 7, "mine", '["a", {"b": 1}]', 1.0],
        [None, None, None, None, 0.5],
        [None, None, None, None, None],
    ]
    assert [(row["document"], row["file"], row["row"]) for row in found] == [
        (0, "c.jsonl", 1),
        (1, "c.jsonl", 2),
        (2, "d.txt", 1),
    ]
    assert {row["dump"] for row in found} == {"tiny-c"}


def test_skipped_rows_are_counted_and_recorded_and_a_shard_may_hold_nothing(tmp_path, loaded_teacher, teacher_folder):
    corpus = tmp_path / "c.jsonl"
    good = '{"text": "The lamp burns."}\n'
    corpus.write_text(good + "broken\n" + '{"prompt": "' + "The lamp " * 30 + '", "completion": "x"}\n' + "{}\n" + good)
    config = DumpConfig(str(teacher_folder), (corpus,), tmp_path / "s", max_length=20, shard_size=2, skip_bad_rows=True)
    report = dump(config, teacher=loaded_teacher)
    assert (report.shards, report.shards_planned, report.counts.rows_left_out) == (3, 3, 3)
    store = KnowledgeStore.open(tmp_path / "s")
    assert [row["skipped_rows"] for row in store.sql("SELECT * FROM shards ORDER BY shard").to_pylist()] == [1, 2, 0]
    assert store.sql("SELECT document FROM sequences ORDER BY document")["document"].to_pylist() == [0, 4]
    assert store.info()[0].complete and store.info()[0].skipped_rows == 3
    assert verify(tmp_path / "s").damage == []
    assert dump(config, teacher=loaded_teacher).shards == 0


# --- logits that are no numbers -----------------------------------------------------------------------------------------


def poisoned_teacher(folder: Path, tokenizer, value: float, everywhere: bool) -> Path:
    """A teacher with `value` in its embedding of "z", or in its head."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    weight = model.lm_head.weight if everywhere else model.model.embed_tokens.weight
    with torch.no_grad():
        weight[tokenizer("z")["input_ids"][0], 3] = value
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("value", "everywhere"), [(torch.nan, False), (torch.inf, False), (torch.inf, True), (torch.nan, True)]
)
def test_logits_that_are_no_numbers_are_not_written_and_earlier_shards_stay(tmp_path, loaded_teacher, value, everywhere):
    teacher = load_teacher(str(poisoned_teacher(tmp_path / "t", loaded_teacher.tokenizer, value, everywhere)), device="cpu")
    assert not teacher.whole_logits
    rows = [{"text": "The lamp burns."}] * 5 + [{"text": "The z burns."}] + [{"text": "The lamp burns."}] * 2
    corpus = write_jsonl(tmp_path / "c.jsonl", rows)
    config = DumpConfig("poisoned", (corpus,), tmp_path / "s", max_length=20, shard_size=2)
    sequence = 0 if everywhere else 5 << 16
    with pytest.raises(UnsoundLogits, match=rf"NaN or infinite in sequence {sequence} \(row {1 if everywhere else 6} "):
        dump(config, teacher=teacher)
    commits = sorted(path.name for path in (tmp_path / "s" / "poisoned-c").glob("commits/*"))
    assert commits == ([] if everywhere else ["00000.json", "00001.json"])
    assert verify(tmp_path / "s").damage == []
    if not everywhere:
        assert len(KnowledgeStore.open(tmp_path / "s")) == 4


# --- another kind of knowledge ------------------------------------------------------------------------------------------


def test_a_new_kind_takes_a_schema_an_extractor_and_a_line_for_each(tmp_path, loaded_teacher, monkeypatch):
    def extract_pooled(batch):
        hidden, mask = batch.prediction.hidden.float(), torch.from_numpy(batch.attention_mask)[..., None]
        means = (hidden * mask).sum(1) / mask.sum(1)
        return [{"pooled": mean[None].numpy()} for mean in means]

    monkeypatch.setitem(KINDS, "pooled", Kind("pooled", "sequence", lambda manifest: (Field("pooled", pa.float32(), 32),)))
    monkeypatch.setitem(EXTRACTORS, "pooled", Extractor(frozenset({Ability.HIDDEN_STATES}), extract_pooled))
    corpus = write_jsonl(tmp_path / "c.jsonl", story_rows(7))
    config = DumpConfig("tiny", (corpus,), tmp_path / "s", max_length=24, shard_size=3, kinds=("positions", "pooled"))
    dump(config, teacher=loaded_teacher)

    store = KnowledgeStore.open(tmp_path / "s")
    (batch,) = store.batches(batch_size=len(store), shuffle=False)
    assert batch["pooled"].shape == (len(store), 32) and batch["candidate_ids"].shape[0] == len(store)
    for row in range(len(store)):
        tokens = torch.from_numpy(batch["input_ids"][row][batch["attention_mask"][row]])[None]
        with torch.inference_mode():
            expected = loaded_teacher.model.model(tokens).last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(batch["pooled"][row], expected, atol=1e-4)
    found = store.sql("SELECT pooled[1] AS first FROM pooled JOIN sequences USING (dump, sequence_id) ORDER BY sequence_id")
    np.testing.assert_array_equal(found["first"].to_numpy(), batch["pooled"][:, 0])
    assert verify(tmp_path / "s").damage == []


def test_a_dump_goes_to_any_storage(tmp_path, teacher_folder, loaded_teacher):
    corpus = write_jsonl(tmp_path / "stories.jsonl", story_rows(7))
    storages = MemoryStorage(), tmp_path / "store"
    for storage in storages:
        config = DumpConfig(str(teacher_folder), corpus, storage, "d", max_length=48, shard_size=4)
        assert config.store is storage
        dump(config, teacher=loaded_teacher)
        assert verify(storage).damage == []
    in_memory, in_folder = (KnowledgeStore.open(storage) for storage in storages)
    assert len(in_memory.sequences("d")) > 0
    assert in_memory.sequences("d") == in_folder.sequences("d")
    assert in_memory.stored(0, "positions", "d") == in_folder.stored(0, "positions", "d")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "stories.jsonl"]
