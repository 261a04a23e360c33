"""Saliency: gradients as captum computes them, shares that rank as they did, and dumps with them beside positions or alone."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from captum.attr import InputXGradient, Saliency
from conftest import make_tokenizer, save_teacher, story_rows, write_jsonl
from processes import Command, Moment
from stores import contents, make_manifest
from transformers import Gemma2Config, GPT2Config

from knowledge_store import KnowledgeStore, verify
from knowledge_store.errors import InputError, MismatchError
from knowledge_store.kinds.saliency import MAX_STEPS, SALIENCY
from teacher_dump import CheckConfig, DumpConfig, check, dump, estimate, repair
from teacher_dump.checking.agreement import AGREES, DAMAGE, OTHER_TEACHER
from teacher_dump.corpus.documents import Document
from teacher_dump.corpus.tokenisation import TokenSequence
from teacher_dump.dumping.batches import batch_arrays
from teacher_dump.extraction import EXTRACTORS, ExtractionBatch
from teacher_dump.extraction.attribution import extract_saliency, log_odds_slopes
from teacher_dump.extraction.saliency import SaliencyOptions, saliency_parameters
from teacher_dump.teachers import local, prediction
from teacher_dump.teachers.local import GRADIENT_BYTES, LocalTeacher, load_teacher

pytestmark = pytest.mark.usefixtures("one_thread")


# --- shares -------------------------------------------------------------------------------------------------------------


def kept_shares(saliency: np.ndarray) -> np.ndarray:
    """The shares that are decoded of the saliency of one sequence, whose last token is its target."""
    manifest = make_manifest(kinds={"positions": {}, "saliency": {}})
    values = np.ma.masked_array(np.append(saliency, 0), np.arange(len(saliency) + 1) == len(saliency))
    keys = pa.table(
        {"sequence_id": np.zeros(len(values), np.int64), "position": np.arange(len(values), dtype=np.int32)},
        schema=pa.schema([("sequence_id", pa.int64()), ("position", pa.int32())]),
    )
    stored = SALIENCY.pack(keys, {"share": values}, manifest)
    return SALIENCY.decode(SALIENCY.unpack(stored, manifest), manifest)["saliency"]


@pytest.mark.parametrize("length", [16, 32_768])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_shares_sum_to_one_and_rank_as_before(length, spread):
    """Whatever is a 4096th of the largest apart stays apart, in its order; what is nearer may become equal."""
    saliency = np.exp(np.random.default_rng(length).normal(0, spread, length)) * 1e-30
    shares = kept_shares(saliency)
    assert shares[-1] == 0 and abs(shares.sum(dtype=np.float64) - 1) < 1e-6
    order = np.argsort(-saliency)
    sorted_shares = shares[order].astype(np.float64)
    assert (np.diff(sorted_shares) <= 0).all()
    exact = saliency[order] / saliency.max()
    later = np.searchsorted(-exact, -(exact - 1 / 4095) + 1e-12)  # the first that is so much below
    there = later < length
    assert (sorted_shares[there] > sorted_shares[later[there]]).all()
    assert np.abs(sorted_shares / sorted_shares[0] - exact).max() <= 0.5 / MAX_STEPS + 1e-6


def test_no_saliency_at_all():
    assert (kept_shares(np.zeros(4)) == 0).all()


@pytest.mark.parametrize("value", [-1.0, np.inf])
def test_what_is_no_saliency_is_refused(value):
    with pytest.raises(InputError, match=r"below zero|NaN or infinite"):
        kept_shares(np.array([1.0, value]))


# --- gradients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [0.0, 20.7, 30.0])  # p is about 1 − 1e-9 at 20.7
def test_the_slopes_of_log_odds(ahead):
    """Against the definition, differentiated in float64: nothing is lost where the token is all but certain."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 17, generator=random)
    tokens = torch.tensor([2, 16, 0])
    logits[torch.arange(3), tokens] = torch.logsumexp(logits, dim=1) + ahead
    exact = logits.double().requires_grad_()
    others = exact.scatter(1, tokens[:, None], -torch.inf).logsumexp(dim=1)
    (exact.gather(1, tokens[:, None])[:, 0] - others).sum().backward()
    slopes = log_odds_slopes(logits.clone(), tokens)
    torch.testing.assert_close(slopes.double(), exact.grad, rtol=1e-6, atol=1e-8)
    assert (slopes.scatter(1, tokens[:, None], 0).sum(dim=1) + 1).abs().max() < 1e-6


def sequence(token_ids: list[int], targets: list[int]) -> TokenSequence:
    is_target = np.isin(np.arange(len(token_ids)), targets)
    return TokenSequence(Document(0, 0, 1, 0, 0), 0, np.array(token_ids, np.int64), is_target)


def sequences(vocabulary: int, lengths=(9, 23, 14)) -> list[TokenSequence]:
    """Of several lengths; the last has two answers, a question after the first, and context behind the last."""
    random = np.random.default_rng(1)
    found = [
        sequence(random.integers(0, vocabulary, length).tolist(), list(range(length - 4, length))) for length in lengths[:-1]
    ]
    return [*found, sequence(random.integers(0, vocabulary, lengths[-1]).tolist(), [4, 5, 10, 11])]


def saliency_of(teacher: LocalTeacher, batch: list[TokenSequence], **options) -> list[np.ma.MaskedArray]:
    answer = teacher.predict(*batch_arrays([each.token_ids for each in batch]), gradients=True)
    parameters = saliency_parameters(SaliencyOptions(**options))
    extracted = extract_saliency(ExtractionBatch(batch, answer, parameters, ("positions", "saliency")))
    assert all(arrays.keys() == {"share"} for arrays in extracted)
    return [arrays["share"] for arrays in extracted]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> LocalTeacher:
    """Learnt positions, and a tied head."""
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=408, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    return saved(tmp_path_factory.mktemp("gpt2"), GPT2LMHeadModel(config))


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory) -> LocalTeacher:
    """Logits that are capped after the head, so that whole logits are used."""
    from transformers import Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=408, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0, eos_token_id=0,
        bos_token_id=None, final_logit_softcapping=5.0,
    )  # fmt: skip
    return saved(tmp_path_factory.mktemp("gemma2"), Gemma2ForCausalLM(config))


def saved(folder: Path, model) -> LocalTeacher:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return load_teacher(str(folder), device="cpu")


@pytest.fixture(params=["loaded_teacher", "gpt2", "gemma2"])
def teacher(request) -> LocalTeacher:
    return request.getfixturevalue(request.param)


def test_captum_says_the_same(teacher):
    """Both methods, for the tokens that stand there and for the teacher's own: within 1e-5 of the sequence's largest."""
    for each in sequences(teacher.vocabulary_size):
        places = torch.from_numpy(np.flatnonzero(each.is_target))
        tokens = torch.from_numpy(each.token_ids)[None]
        embeddings = teacher.model.get_input_embeddings()(tokens).detach().requires_grad_()

        def log_odds(inputs, own: bool, places=places, tokens=tokens):
            logits = teacher.model(inputs_embeds=inputs, use_cache=False).logits[0, places - 1]
            chosen = logits.argmax(dim=1) if own else tokens[0, places]
            others = logits.scatter(1, chosen[:, None], -torch.inf).logsumexp(dim=1)
            return (logits.gather(1, chosen[:, None])[:, 0] - others).sum()[None]

        for own, of in ((False, "gold"), (True, "teacher")):
            norm = Saliency(lambda inputs, own=own: log_odds(inputs, own)).attribute(embeddings, abs=False)[0].norm(dim=1)
            product = InputXGradient(lambda inputs, own=own: log_odds(inputs, own)).attribute(embeddings)[0].sum(dim=1).abs()
            for method, expected in (("gradient-norm", norm), ("input-x-gradient", product)):
                [found] = saliency_of(teacher, [each], saliency_method=method, saliency_of=of)
                context = ~found.mask
                assert context.tolist() == (~each.is_target & (np.arange(len(found)) < places[-1].item())).tolist()
                exact = expected.detach().numpy()[context]
                assert np.abs(found.data[context] - exact).max() <= 1e-5 * exact.max()


def test_batched_equals_unbatched(teacher, monkeypatch):
    """Whatever the padding, and the slices in which logits are made."""
    batch = sequences(teacher.vocabulary_size)
    alone = [saliency_of(teacher, [each])[0] for each in batch]
    monkeypatch.setitem(prediction.SLICE_LOGITS, "cpu", 3 * teacher.vocabulary_size)  # three positions a slice
    for one, other in zip(saliency_of(teacher, batch), alone, strict=True):
        assert np.abs(one / one.sum() - other / other.sum()).max() <= 1e-4


def test_in_bfloat16(teacher_folder, loaded_teacher):
    """The shares of two dtypes are of one sort: half of what is far from equal would move more."""
    short = load_teacher(str(teacher_folder), dtype="bfloat16", device="cpu")
    batch = sequences(short.vocabulary_size)
    for one, other in zip(saliency_of(short, batch), saliency_of(loaded_teacher, batch), strict=True):
        assert one.dtype == np.float32
        assert np.abs(one / one.sum() - other / other.sum()).sum() / 2 < 0.15


def test_gradients_that_are_not_finite(teacher_folder):
    broken = load_teacher(str(teacher_folder), device="cpu")
    with torch.no_grad():
        broken.model.get_input_embeddings().weight[5] = torch.nan
    with pytest.raises(InputError, match=r"gradients are NaN or infinite in sequence 0 \(row 1 of corpus file 1, window 0\)"):
        saliency_of(broken, [sequence([1, 5, 2, 3], [3])])


# --- dumps --------------------------------------------------------------------------------------------------------------

ROWS = [
    {"prompt": f"The {name} lit the lamp early. Who lit it? The", "completion": f" {name}{end}", "number": number}
    for number, (name, end) in enumerate(
        (name, end) for end in (".", "!", " did.", ", as ever.") for name in ("keeper", "daughter", "ship", "Patience")
    )
] + [
    {
        "messages": [
            {"role": "user", "content": "Who lit the lamp?"},
            {"role": "assistant", "content": "The keeper."},
            {"role": "user", "content": "When?"},
            {"role": "assistant", "content": "Early, when the storm came."},
        ]
    }
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def options(corpus, teacher_folder) -> dict:
    return {
        "teacher": str(teacher_folder), "corpus": (corpus,), "max_length": 64, "batch_size": 4, "shard_size": 6,
    }  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory, options, loaded_teacher) -> Path:
    """Dumps of one corpus: both kinds in one pass, each alone, and another sort of saliency."""
    folder = tmp_path_factory.mktemp("store") / "store"
    dumps = {
        "both": {"kinds": ("positions", "saliency")},
        "positions": {"kinds": ("positions",)},
        "saliency": {"kinds": ("saliency",)},
        "own": {"kinds": ("saliency",), "saliency_of": "teacher", "saliency_method": "input-x-gradient"},
    }
    for name, more in dumps.items():
        dump(DumpConfig(store=folder, name=name, **options, **more), teacher=loaded_teacher)
    return folder


def test_together_and_alone(store):
    """One pass gives what two give, and a dump alone is joined to its positions by the tokens' hash."""
    assert verify(store).damage == []
    opened = KnowledgeStore.open(store)

    def rows(query: str) -> pa.Table:
        return opened.sql(f"{query} ORDER BY ALL")

    columns = 'sequence_id, rank, "position", token_id, token_text'
    for relation, compared in (
        ("rationales", columns),
        ("positions", "* EXCLUDE dump"),
        ("saliency", 'sequence_id, "position"'),
    ):
        other = "positions" if relation == "positions" else "saliency"
        assert rows(f"SELECT {compared} FROM {relation} WHERE dump = 'both'").equals(
            rows(f"SELECT {compared} FROM {relation} WHERE dump = '{other}'")
        )
    joined = opened.sql(
        "SELECT count(*) AS count, count(DISTINCT a.token_hash) AS hashes FROM sequences AS a"
        " JOIN sequences AS b USING (token_hash) WHERE a.dump = 'saliency' AND b.dump = 'positions'"
    ).to_pylist()
    assert joined == [{"count": len(ROWS), "hashes": len(ROWS)}]
    assert opened.manifest("own").kinds == {"saliency": {"method": "input-x-gradient", "of": "teacher"}}
    assert opened.manifest("both").kinds["saliency"] == {"method": "gradient-norm", "of": "gold"}
    ranks = opened.sql(
        "SELECT sequence_id, list(rank ORDER BY rank) AS ranks, list(share ORDER BY rank) AS shares, sum(share) AS total"
        " FROM rationales WHERE dump = 'own' GROUP BY ALL"
    ).to_pylist()
    for row in ranks:
        assert row["ranks"] == list(range(1, len(row["ranks"]) + 1)) and row["total"] == pytest.approx(1, abs=1e-6)
        assert row["shares"] == sorted(row["shares"], reverse=True)


@pytest.mark.parametrize(("name", "more"), [("both", []), ("saliency", [("token_id", "uint32"), ("is_target", "bool")])])
def test_the_columns_of_the_files(store, name, more):
    """As FORMAT.md has them: steps counted from 2²³, and what a step is worth, the same in all rows of a sequence."""
    table = pq.read_table(store / name / "saliency/00000.parquet")
    columns = [("sequence_id", "int64"), ("position", "int32"), ("steps", "float"), ("step_share", "float"), *more]
    assert [(column.name, str(column.type)) for column in table.schema] == columns
    steps = table["steps"].fill_null(2**23).to_numpy().astype(np.float64) - 2**23
    ids, step_share = table["sequence_id"].to_numpy(), table["step_share"].to_numpy()
    for sequence in np.unique(ids):
        own = ids == sequence
        assert steps[own].max() == 4095 and set(step_share[own]) == {np.float32(1 / steps[own].sum())}


def test_what_is_context(store, loaded_teacher):
    """Everything before the last target that is none itself: prompts, headers, and questions between answers."""
    opened = KnowledgeStore.open(store)
    for ordinal in range(len(ROWS)):
        both, alone = opened["both", ordinal], opened["saliency", ordinal]
        places = np.arange(len(both["input_ids"]))
        context = ~both["is_target"] & (places < places[both["is_target"]].max())
        table, _ = opened.stored(ordinal, "saliency", "both")
        assert table["share"].is_valid().to_pylist() == context.tolist()
        assert both["saliency"].sum(dtype=np.float64) == pytest.approx(1, abs=1e-6)
        assert (both["saliency"][~context] == 0).all()
        assert alone["token_id"].tolist() == both["input_ids"].tolist()
    conversation = loaded_teacher.tokenizer.decode(both["input_ids"][context])
    assert conversation.count("When?") == 1 and "keeper." not in conversation and context.sum() > 20
    header, shown = opened.shown(len(ROWS) - 1, "saliency")[0]
    assert header == ["position", "token", "saliency", "rank"] and {row[3] for row in shown} >= {"1", "2", ""}


def test_the_query_of_the_readme(store):
    """Which tokens decided, and how often were they part of the answer?"""
    found = KnowledgeStore.open(store).sql(
        "SELECT token_text, count(*) AS times, avg(CAST(answers.token_id IS NOT NULL AS INT)) AS in_answer FROM rationales"
        " LEFT JOIN (SELECT DISTINCT dump, sequence_id, token_id FROM positions WHERE is_target) AS answers"
        " USING (dump, sequence_id, token_id) WHERE dump = 'both' AND rank <= 5 GROUP BY token_text ORDER BY times DESC"
    )
    assert sum(found["times"].to_pylist()) == 5 * len(ROWS) and all(0 <= share <= 1 for share in found["in_answer"].to_pylist())


def test_memory_is_bounded_by_smaller_batches(tmp_path, store, options, loaded_teacher, monkeypatch):
    """Between the passes no more is kept than there is room for; what is kept on the disk is the same up to rounding."""
    asked: list[int] = []
    predict = LocalTeacher.predict

    def counted(teacher, token_ids, mask, gradients=False, layers=(), likeliest=0):
        asked.append(token_ids.size)
        assert gradients
        return predict(teacher, token_ids, mask, gradients=gradients)

    room = loaded_teacher.gradient_room(options["max_length"])
    monkeypatch.setitem(GRADIENT_BYTES, "cpu", GRADIENT_BYTES["cpu"] * 80 // room)
    monkeypatch.setattr(LocalTeacher, "predict", counted)
    monkeypatch.setattr(LocalTeacher, "check_gradients", lambda teacher: None)
    config = DumpConfig(store=tmp_path / "store", name="d", kinds=("saliency",), **options)
    loaded_teacher.batching(64, 4 * 64)
    asked.clear()
    dump(config, teacher=loaded_teacher)
    assert max(asked) <= 80 and len(asked) > len(ROWS) // 4 + 3
    opened = KnowledgeStore.open(tmp_path / "store")
    for ordinal in range(len(ROWS)):
        moved = opened["d", ordinal]["saliency"] - KnowledgeStore.open(store)["saliency", ordinal]["saliency"]
        assert np.abs(moved).max() < 1e-4


def one_shard(store: Path) -> bool:
    return len(list(store.glob("saliency/commits/*.json"))) == 1


def test_a_dump_that_was_killed_resumes(tmp_path, options, store, loaded_teacher):
    """kill -9 in the middle; the same command makes what one run makes."""
    words = [
        "run", tmp_path / "store", "--teacher", options["teacher"], "--corpus", options["corpus"][0], "--name", "saliency",
        "--kind", "saliency", "--max-length", 64, "--batch-size", 4, "--shard-size", 6,
    ]  # fmt: skip
    moment = Moment(tmp_path / "store", one_shard)
    assert Command(*words, folder=tmp_path / "log", at=moment).wait().returncode == -signal.SIGKILL
    config = DumpConfig(store=tmp_path / "store", name="saliency", kinds=("saliency",), **options)
    assert dump(config, teacher=loaded_teacher).shards_existing == 1
    made, whole = contents(tmp_path / "store"), contents(store)
    assert all(whole[name] == made[name] for name in made)
    assert verify(tmp_path / "store").damage == []


def test_repair(tmp_path, options, store, loaded_teacher):
    """What is damaged is asked again, and the file is the same as before."""
    shutil.copytree(store, tmp_path / "store")
    path = tmp_path / "store/both/saliency/00001.parquet"
    path.write_bytes(b"damaged")
    config = DumpConfig(store=tmp_path / "store", name="both", kinds=("positions", "saliency"), **options)
    assert repair(config, teacher=loaded_teacher).shards == 1
    assert path.read_bytes() == (store / "both/saliency/00001.parquet").read_bytes()
    with pytest.raises(MismatchError, match="--saliency-of was gold and is now teacher"):
        dump(replace(config, saliency_of="teacher"), teacher=loaded_teacher)


def test_estimate(tmp_path, options, loaded_teacher, store):
    """The bytes of both kinds are counted, and positions have their figures."""
    predicted = estimate(
        DumpConfig(store=tmp_path / "none", kinds=("positions", "saliency"), **options), teacher=loaded_teacher
    )
    [real] = [facts for facts in KnowledgeStore.open(store).info() if facts.dump == "both"]
    kept = sum(size for name, size in real.column_bytes.items() if name.startswith(("positions.", "saliency.")))
    assert predicted.bytes == pytest.approx(kept, rel=0.5) and "top-5 coverage" in predicted.figures
    assert estimate(DumpConfig(store=tmp_path / "none", kinds=("saliency",), **options), teacher=loaded_teacher).figures == {}


# --- what is refused ----------------------------------------------------------------------------------------------------


def test_rows_without_a_context(tmp_path, options, monkeypatch):
    """Plain text, and answers to nothing: refused by their row before the teacher is loaded, or left out."""
    corpus = write_jsonl(tmp_path / "rows.jsonl", [*ROWS[:3], {"prompt": "", "completion": "An answer."}, *story_rows(2)])
    config = DumpConfig(store=tmp_path / "store", name="d", kinds=("saliency",), **{**options, "corpus": (corpus,)})
    complaint = r"rows\.jsonl, line 4: no context stands before its targets \(--kind saliency asks .* \(2 more rows"
    with monkeypatch.context() as patch, pytest.raises(InputError, match=complaint):
        patch.setattr(local, "load_teacher", None)
        dump(config)
    report = dump(replace(config, skip_bad_rows=True))
    assert report.counts.rows_left_out == 3 and report.counts.sequences == 3


def test_options_of_a_kind_that_is_not_asked_for(options):
    with pytest.raises(InputError, match="--saliency-of is an option of --kind saliency, which is not given"):
        DumpConfig(store="store", saliency_of="teacher", **options)
    with pytest.raises(InputError, match="--saliency-method"):
        DumpConfig(store="store", kinds=("saliency",), saliency_method="attention", **options)


def test_a_model_that_takes_no_embeddings(tmp_path, options, teacher_folder, monkeypatch):
    teacher = load_teacher(str(teacher_folder), device="cpu")
    forward = type(teacher.model.model).forward
    monkeypatch.setattr(
        type(teacher.model.model), "forward", lambda self, input_ids=None, **more: forward(self, input_ids, **more)
    )
    config = DumpConfig(store=tmp_path / "store", name="d", kinds=("saliency",), **options)
    with pytest.raises(InputError, match="knowledge of kind 'saliency' needs gradients, which the teacher 'tiny' cannot give"):
        dump(config, teacher=teacher)
    assert not (tmp_path / "store").exists()


def test_a_model_that_looks_at_its_tokens_again(tmp_path, options, teacher_folder):
    """Deeper layers that are told the tokens would miss them: its answers are others, and gradients would be of those."""
    teacher = load_teacher(str(teacher_folder), device="cpu")
    forward = teacher.model.model.forward

    def looks_again(input_ids=None, inputs_embeds=None, **more):
        answer = forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **more)
        if input_ids is not None:
            answer.last_hidden_state = answer.last_hidden_state + input_ids[..., None] / 100
        return answer

    teacher.model.model.forward = looks_again
    config = DumpConfig(store=tmp_path / "store", name="d", kinds=("saliency",), **options)
    with pytest.raises(InputError, match=r"cannot be asked about the embeddings of its tokens.*not all that it looks at"):
        dump(config, teacher=teacher)


# --- check --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["both", "saliency", "own"])
def test_the_same_teacher_agrees(store, loaded_teacher, name):
    found = check(CheckConfig(store, "loaded", dump=name), loaded_teacher)
    assert found.keys() == ({"positions", "saliency"} if name == "both" else {"saliency"})
    agreement = found["saliency"]
    assert agreement.verdict == AGREES and max(agreement.distances) < 1e-3 and len(agreement.distances) == len(ROWS)
    assert agreement.lines[-2] == "Verdict: agrees"


def test_the_same_teacher_in_another_dtype(store, teacher_folder):
    short = load_teacher(str(teacher_folder), dtype="bfloat16", device="cpu")
    agreement = check(CheckConfig(store, "loaded", dump="both", sample=6), short)["saliency"]
    assert agreement.verdict == AGREES and max(agreement.distances) > 1e-3 and "16 bits" in agreement.lines[2]


def test_another_teacher_and_damage(tmp_path, store, options, loaded_teacher, monkeypatch):
    other = load_teacher(str(save_teacher(tmp_path / "other", seed=5)), device="cpu")
    found = check(CheckConfig(store, "loaded", dump="saliency"), other)["saliency"]
    assert found.verdict == OTHER_TEACHER and "in the median sequence" in found.reasons[0]

    def spoiled(batch):
        arrays = extract_saliency(batch)
        if any(np.array_equal(each.token_ids[-4:], last) for each in batch.sequences):
            arrays[0]["share"] = np.ma.masked_array(np.roll(arrays[0]["share"].data, 3), arrays[0]["share"].mask)
        return arrays

    opened = KnowledgeStore.open(store)
    last = opened["saliency", 2]["token_id"][-4:]
    monkeypatch.setitem(EXTRACTORS, "saliency", replace(EXTRACTORS["saliency"], function=spoiled))
    dump(DumpConfig(store=tmp_path / "store", name="d", kinds=("saliency",), **options), teacher=loaded_teacher)
    monkeypatch.undo()
    found = check(CheckConfig(tmp_path / "store", "loaded", dump="d"), loaded_teacher)["saliency"]
    assert found.verdict == DAMAGE and 0 < found.sequences_off < len(ROWS) / 2
    assert "of its saliency stands at other tokens" in found.reasons[0]
