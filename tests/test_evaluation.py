"""Evaluation on a dump, against a recomputation from the model's own logits."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import story_rows, write_jsonl
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from gguf.quants import quantize
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from knowledge_store import KnowledgeStore
from knowledge_store.calibration.expected_calibration_error import adaptive_calibration_error, expected_calibration_error
from knowledge_store.calibration.file import Calibration, write_calibration
from knowledge_store.errors import InputError
from knowledge_store.format.records import json_sha256
from knowledge_store.kinds.positions import positions_of
from student_train.cli import app
from student_train.evaluation.bootstrap import bootstrap_calibration_error, bootstrap_interval
from student_train.evaluation.configuration import EvaluateConfig, check_evaluation, output_path
from student_train.evaluation.metrics import full_vocabulary_calibration_error
from student_train.evaluation.run import evaluate
from student_train.training.run_folder import learnt_from
from teacher_dump import DumpConfig, dump

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def result(teacher_folder, store_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluation") / "heldout.json"
    found = evaluate(EvaluateConfig(str(teacher_folder), str(store_folder), dump="heldout", batch_size=3, output=str(output)))
    assert json.loads(output.read_text())["figures"] == found["figures"]
    return {**found, **found["figures"]["positions"]}


def plainly(model_folder, store_folder, temperature: float = 1.0) -> dict[str, np.ndarray]:
    """One sequence at a time, without padding, probabilities in float64: columns of target positions."""
    store = KnowledgeStore.open(store_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    found: dict[str, list] = {name: [] for name in ("nll", "correct", "confidence", "brier", "sequence", "full")}
    for batch in store.batches("heldout", batch_size=1, shuffle=False):
        length = int(batch["attention_mask"].sum())
        ids = torch.from_numpy(batch["input_ids"][:, :length])
        with torch.no_grad():
            logprobs = (model(ids).logits[0].double() / temperature).log_softmax(-1).numpy()
        for position in np.flatnonzero(batch["is_target"][0]):
            token, row = int(ids[0, position]), logprobs[position - 1]
            came = np.arange(len(row)) == token
            found["nll"].append(-row[token])
            found["correct"].append(row.argmax() == token)
            found["confidence"].append(np.exp(row.max()))
            found["brier"].append(((np.exp(row) - came) ** 2).sum())
            found["sequence"].append(batch["sequence_id"][0])
            found["full"].append(np.exp(row))
    return {name: np.array(values) for name, values in found.items()}


def check_student_figures(student: dict, plain: dict[str, np.ndarray]) -> None:
    """Every figure that needs the student alone."""
    confidence, correct = plain["confidence"], plain["correct"]
    assert student["nll"] == pytest.approx(plain["nll"].mean(), abs=1e-4)
    assert student["accuracy"] == pytest.approx(correct.mean(), abs=1e-9)
    assert student["brier"] == pytest.approx(plain["brier"].mean(), abs=1e-5)
    assert student["ece_10"] == pytest.approx(expected_calibration_error(confidence, correct, 10), abs=1e-5)
    assert student["adaptive_ece"] == pytest.approx(adaptive_calibration_error(confidence, correct), abs=1e-5)
    bins = student["reliability"]
    assert np.dot(bins["counts"], bins["confidence"]) / len(correct) == pytest.approx(confidence.mean(), abs=1e-5)
    for name, values in (("nll", plain["nll"]), ("brier", plain["brier"]), ("accuracy", correct)):
        interval = bootstrap_interval(values, groups=plain["sequence"])
        assert student["intervals"][name] == pytest.approx(interval, abs=1e-4)
        assert interval[0] <= student[name] <= interval[1]


def test_against_the_models_own_logits(result, teacher_folder, store_folder):
    plain = plainly(teacher_folder, store_folder)
    assert result["positions"] == len(plain["nll"])
    student = result["student"]
    check_student_figures(student, plain)
    ids = np.concatenate(
        [
            batch["input_ids"][batch["is_target"]]
            for batch in KnowledgeStore.open(store_folder).batches("heldout", batch_size=1, shuffle=False)
        ]
    )
    assert student["full_ece"] == pytest.approx(full_vocabulary_calibration_error(plain["full"], ids), abs=1e-5)
    ece = bootstrap_calibration_error(plain["confidence"], plain["correct"], 15, groups=plain["sequence"])
    assert student["intervals"]["ece_15"] == pytest.approx(ece, abs=1e-4)


def test_sums_over_sequences_give_the_figures_again(result):
    """What the report compares two models by."""
    sums, student = result["per_sequence"], result["student"]
    targets = sum(sums["targets"])
    assert targets == result["positions"] and len(sums["targets"]) == result["sequences"]
    for name in ("nll", "brier", "accuracy", "kl", "kl_lower_bound", "top_1_agreement"):
        assert sum(sums[name]) / targets == pytest.approx(student[name], rel=1e-4)
    assert np.abs(np.sum(sums["gaps_15"], axis=0)).sum() / targets == pytest.approx(student["ece_15"], rel=1e-3)


@pytest.fixture(scope="module")
def copy_folder(teacher_folder, tmp_path_factory) -> Path:
    """The teacher with its weights in few steps, as a quantised copy has them."""
    folder = tmp_path_factory.mktemp("copy") / "copy"
    model = AutoModelForCausalLM.from_pretrained(teacher_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            step = parameter.abs().max() / 15
            parameter.copy_((parameter / step).round() * step)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judged(copy_folder, store_folder, tmp_path_factory):
    """An evaluation of the copy, and the file of its positions."""
    path = tmp_path_factory.mktemp("judged") / "positions.parquet"
    config = EvaluateConfig(str(copy_folder), str(store_folder), dump="heldout", batch_size=3, keep_positions=path)
    return evaluate(config)["figures"]["positions"], path


def test_each_judged_position_is_kept_and_joined_by_sql(judged, copy_folder, store_folder):
    found, path = judged
    query = """SELECT kept.*, positions.token_id AS stored_id, positions.is_target, positions.candidate_ids[1] AS teacher_choice
        FROM kept JOIN positions USING (dump, sequence_id, position) ORDER BY dump, sequence_id, position"""
    rows = KnowledgeStore.open(store_folder).sql(query, files={"kept": path})
    columns = {name: rows[name].to_numpy() for name in rows.column_names}
    student, plain = found["student"], plainly(copy_folder, store_folder)
    assert len(rows) == found["positions"] and columns["is_target"].all()
    assert (columns["token_id"] == columns["stored_id"]).all()
    assert columns["logprob"] == pytest.approx(-plain["nll"], abs=1e-3)
    assert columns["confidence"] == pytest.approx(plain["confidence"], abs=1e-4)
    assert columns["kl"].mean() == pytest.approx(student["kl"], rel=1e-5)
    assert columns["kl_lower_bound"].mean() == pytest.approx(student["kl_lower_bound"], rel=1e-5)
    assert (columns["agrees"] == (columns["likeliest_id"] == columns["teacher_choice"])).all()
    assert columns["agrees"].mean() == pytest.approx(student["top_1_agreement"])
    assert 0 < student["top_1_agreement"] < 1
    kl = np.sort(columns["kl_lower_bound"])
    for name, percentage in (("kl_median", 50), ("kl_90", 90), ("kl_99", 99), ("kl_99_9", 99.9), ("kl_max", 100)):
        assert student[name] == pytest.approx(np.percentile(kl, percentage), rel=1e-5)
    assert student["kl_median"] < student["kl_lower_bound"] < student["kl_max"] == kl[-1]


def test_the_change_of_perplexity(judged, result):
    """Against the teacher as the store has it, in whole steps, and so about that of the teacher itself."""
    student, teacher = judged[0]["student"], judged[0]["teacher"]
    assert 1 + student["perplexity_change"] == pytest.approx(np.exp(student["nll"] - teacher["nll"]), rel=1e-6)
    low, high = student["intervals"]["perplexity_change"]
    assert low < student["perplexity_change"] < high
    assert abs(result["student"]["perplexity_change"]) < 0.05
    assert "perplexity_change" not in teacher


def test_evaluations_side_by_side(result, copy_folder, judged, teacher_folder, store_folder, tmp_path):
    first, limited = tmp_path / "original.json", tmp_path / "limited.json"
    first.write_text(json.dumps({name: value for name, value in result.items() if name in RESULT}))
    second = copy_folder / "evaluations/heldout.json"
    done = CliRunner().invoke(app, ["compare", str(first), str(second)])
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    names = " ".join(line.split("│")[1].strip() for line in lines if "│" in line)  # one after the other, however wide it is
    assert any("copy" in line and "teacher" in line for line in lines) and f"Less {teacher_folder.name}" in done.stdout
    for words in ("Perplexity (change from the teacher's)", "KL, candidates and tail (99.9% of positions)", "Agreement (top-1"):
        assert words in names, words
    kl = judged[0]["student"]["kl_lower_bound"] - result["student"]["kl_lower_bound"]
    assert f"{kl:+.5f}" in done.stdout[done.stdout.index("Less") :]
    evaluate(EvaluateConfig(str(teacher_folder), str(store_folder), dump="heldout", limit=2, output=str(limited)))
    refused = CliRunner().invoke(app, ["compare", str(first), str(limited)])
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1
    assert "were not measured on the same sequences" in refused.stderr
    refused = CliRunner().invoke(app, ["compare", str(first), "absent.json"])
    assert refused.exit_code == 2 and "absent.json does not exist" in refused.stderr


RESULT = {"model", "parameters", "seconds", "config", "dump", "sequences", "figures"}


def test_a_result_takes_the_place_of_none_of_another_model(copy_folder, judged, teacher_folder, store_folder, tmp_path):
    path = tmp_path / "heldout.json"
    path.write_text((copy_folder / "evaluations/heldout.json").read_text())
    config = EvaluateConfig(str(copy_folder), str(store_folder), dump="heldout", output=str(path))
    assert check_evaluation(config) == path  # the same once more
    with pytest.raises(InputError, match=f"holds the results of {copy_folder}: name another file"):
        check_evaluation(replace(config, model=str(teacher_folder)))
    with pytest.raises(InputError, match="sequences, which that on 2 would replace: give another --output, or remove it"):
        check_evaluation(replace(config, limit=2))
    with pytest.raises(InputError, match="is where the result goes: name another file"):
        check_evaluation(replace(config, keep_positions=path))
    path.write_text("{}")
    with pytest.raises(InputError, match="Give --output to write the result somewhere else"):
        check_evaluation(config)


def test_a_model_that_learnt_from_the_dump_is_told(store_folder, tmp_path):
    store = KnowledgeStore.open(store_folder)
    knowledge = json.dumps(store.manifest("heldout").identity(), sort_keys=True, default=str)  # as a run notes it
    identity = {"knowledge of the dump then": hashlib.sha256(knowledge.encode()).hexdigest()}
    assert not learnt_from(str(tmp_path), store, "heldout")
    (tmp_path / "run.json").write_text(json.dumps({"identity": identity, "config": {}}))
    assert learnt_from(str(tmp_path), store, "heldout") and not learnt_from(str(tmp_path), store, "train")


def test_a_run_that_is_not_finished_is_no_model(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"identity": {}, "config": {}}))
    with pytest.raises(InputError, match="is a run that is not finished: run the same command again, or name one of its check"):
        check_evaluation(EvaluateConfig(str(tmp_path), questions=__file__))


def test_copies_in_one_folder_have_results_of_their_own(tmp_path):
    config = EvaluateConfig(str(tmp_path), "store", gguf_file="model.Q4_0.gguf")
    assert output_path(config, "heldout") == tmp_path / "evaluations/heldout.model.Q4_0.json"
    asked = EvaluateConfig(str(tmp_path), questions="exam.jsonl", gguf_file="model.Q8_0.gguf")
    assert output_path(asked) == tmp_path / "evaluations/exam.letter.model.Q8_0.json"


def test_another_vocabulary_is_refused_before_the_model_is_loaded(teacher_folder, store_folder, tmp_path):
    """Its weights are no file that can be loaded."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    tokenizer.add_tokens(["lantern"])
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((teacher_folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_text("nothing")
    with pytest.raises(InputError, match=r"the vocabulary of .* is not that of the dump heldout"):
        evaluate(EvaluateConfig(str(tmp_path), str(store_folder), dump="heldout"))


def calibration(folder: Path, model: Path, temperature: float, **changes) -> Path:
    """A file as `teacher-dump calibrate` writes it for this model."""
    figures = {"nll": 1.0, "ece_10": 0.1, "ece_15": 0.1, "brier": 0.5}
    weights = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in model.glob("*.safetensors")}
    fields = {
        "method": "temperature",
        "value": temperature,
        "teacher": {"name": "tiny", "files": weights},
        "tokenizer": {"vocabulary_sha256": json_sha256(AutoTokenizer.from_pretrained(model).get_vocab())},
        "fitted_on": {},
        "targets": 300,
        "before": figures,
        "after": figures,
    }
    path = folder / "calibration.json"
    write_calibration(path, Calibration(**{**fields, **changes}))
    return path


def test_a_post_hoc_temperature(result, teacher_folder, store_folder, tmp_path):
    path = calibration(tmp_path, teacher_folder, 2.5)
    config = EvaluateConfig(str(teacher_folder), str(store_folder), dump="heldout", output=str(tmp_path / "e.json"))
    found = evaluate(replace(config, post_hoc_temperature=str(path)))["figures"]["positions"]
    assert found["post_hoc"]["temperature"] == 2.5
    check_student_figures(found["post_hoc"]["student"], plainly(teacher_folder, store_folder, 2.5))
    assert found["student"]["nll"] == pytest.approx(result["student"]["nll"], abs=1e-5)
    assert found["post_hoc"]["student"]["accuracy"] == found["student"]["accuracy"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {"name": "other", "files": {"model.safetensors": "00"}}}, "belongs to another teacher"),
        ({"tokenizer": {"vocabulary_sha256": "00"}}, "belongs to another tokenizer"),
        ({"method": "first", "value": 0.3}, "is a calibration of method first"),
        ({"method": "bucket-temperature"}, "is a calibration of method bucket-temperature"),
    ],
)
def test_calibrations_that_are_not_the_models(teacher_folder, store_folder, tmp_path, changes, message):
    path = calibration(tmp_path, teacher_folder, 2.5, **changes)
    config = EvaluateConfig(str(teacher_folder), str(store_folder), dump="heldout", post_hoc_temperature=str(path))
    with pytest.raises(InputError, match=message):
        evaluate(config)


@pytest.fixture(scope="module")
def draws_folder(tmp_path_factory, loaded_teacher, teacher_folder) -> Path:
    """A store whose dump does not say which token is likeliest."""
    folder = tmp_path_factory.mktemp("draws")
    corpus = write_jsonl(folder / "corpus.jsonl", story_rows(12, start=30))
    selection = {"selection": "threshold", "draw_weight": 0.1}
    dump(
        DumpConfig(str(teacher_folder), (corpus,), folder / "store", "heldout", max_length=48, **selection),
        teacher=loaded_teacher,
    )
    return folder / "store"


def test_a_dump_without_the_likeliest_token(teacher_folder, draws_folder, tmp_path):
    """What needs it is left out; the rest is there."""
    path = tmp_path / "e.json"
    found = evaluate(EvaluateConfig(str(teacher_folder), str(draws_folder), output=str(path)))["figures"]["positions"]
    check_student_figures(found["student"], plainly(teacher_folder, draws_folder))
    assert set(found["teacher"]) == {"nll", "intervals", "kl", "kl_standard_error"}
    assert abs(found["student"]["kl"]) < 4 * found["teacher"]["kl_standard_error"]
    assert found["teacher"]["nll"] == pytest.approx(found["student"]["nll"], abs=0.05)
    text = path.read_text()
    done = CliRunner().invoke(app, ["evaluate", str(draws_folder), "--model", str(teacher_folder), "--output", str(path)])
    assert done.exit_code == 0 and "Loss on the text" in done.stdout
    assert not any(name in text for name in ("top_1_agreement", "NaN"))
    assert 0 <= found["student"]["kl_lower_bound"] < 0.1


@pytest.fixture(scope="module")
def top_p_folder(tmp_path_factory, loaded_teacher, teacher_folder) -> Path:
    """A store whose positions have different numbers of candidates."""
    folder = tmp_path_factory.mktemp("top-p")
    corpus = write_jsonl(folder / "corpus.jsonl", story_rows(4, start=30))
    selection = {"selection": "top-p", "top_p": 0.5, "max_k": 30}
    dump(
        DumpConfig(str(teacher_folder), (corpus,), folder / "store", "heldout", max_length=48, **selection),
        teacher=loaded_teacher,
    )
    return folder / "store"


def test_coverage_of_uneven_candidates(teacher_folder, top_p_folder, tmp_path):
    config = EvaluateConfig(str(teacher_folder), str(top_p_folder), batch_size=1, output=str(tmp_path / "e.json"))
    found = evaluate(config)["figures"]["positions"]
    means = found["coverage"]["mean_by_rank"]
    assert len(means) == 30 and all(np.diff(means) >= 0) and 0.4 < means[-1] <= 1
    assert found["student"]["kl_lower_bound"] < 0.01


def test_the_teacher_agrees_with_what_was_kept_of_it(result):
    """A misalignment by one position would show here: the teacher as its own student differs by rounding only."""
    assert result["student"]["kl_lower_bound"] < 0.01
    floor = result["teacher"]
    assert 0 < floor["kl"] < 0.001 and abs(result["student"]["kl"] - floor["kl"]) < 4 * floor["kl_standard_error"] + 0.001
    assert result["student"]["top_1_agreement"] > 0.9  # rounding makes ties
    assert result["teacher"]["nll"] == pytest.approx(result["student"]["nll"], abs=0.05)
    assert result["student"]["ece_10"] == pytest.approx(result["teacher"]["ece_10"], abs=0.02)


def test_coverage_comes_from_the_store(result, store_folder):
    store = KnowledgeStore.open(store_folder)
    masses = []
    for batch in store.batches("heldout", batch_size=4, shuffle=False):
        masses.extend(1 - np.exp(batch["tail_logprob"][batch["is_target"]].astype(np.float64)))
    coverage = result["coverage"]
    assert len(coverage["mean_by_rank"]) == positions_of(store.manifest("heldout")).selection.candidates
    assert coverage["mean_by_rank"][-1] == pytest.approx(np.mean(masses), abs=1e-5)
    assert sum(coverage["histogram"]["counts"]) == len(masses)


def test_limit_takes_sequences_from_all_over(teacher_folder, store_folder, tmp_path):
    few = evaluate(EvaluateConfig(str(teacher_folder), str(store_folder), dump="heldout", limit=2, output=str(tmp_path / "e")))
    assert few["sequences"] == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dump": None}, "dump"),
        ({"dump": "absent"}, "absent"),
        ({"limit": 0}, "--limit"),
        ({"batch_size": 0}, "--batch-size"),
        ({"model": "/no/such/model"}, "there is no folder"),
        ({"gguf_file": "absent.gguf"}, "no GGUF file .*absent.gguf"),
        ({"store": None, "dump": None}, "give either STORE, .* or --questions"),
        ({"questions": "q.jsonl"}, "give either STORE, .* or --questions"),
        ({"store": None, "questions": "q.jsonl"}, "--dump names a dump of a store"),
        ({"answer_as": "text"}, "--answer-as says how --questions are answered"),
        ({"post_hoc_temperature": "q.jsonl"}, "takes a file of questions only with --questions"),
        ({"post_hoc_temperature": "absent.json"}, "there is no calibration file"),
        ({"output": "."}, "is a folder: name a file"),
        ({"keep_positions": Path(__file__)}, "--keep-positions .* exists already"),
        ({"keep_positions": Path("no/such/p.parquet")}, "there is no folder no/such for --keep-positions"),
        ({"keep_positions": Path("p"), "questions": "q", "store": None, "dump": None}, "no meaning with --questions"),
    ],
)
def test_bad_input(teacher_folder, store_folder, changed, message):
    settings = {"model": str(teacher_folder), "store": str(store_folder), "dump": "heldout", **changed}
    with pytest.raises(InputError, match=message):
        evaluate(EvaluateConfig(**settings))


def test_samples_are_what_the_model_writes_and_the_teacher_expected(result, teacher_folder, store_folder):
    """The teacher as its own student: the likeliest token is the first of the candidates, token after token."""
    store, samples = KnowledgeStore.open(store_folder), result["samples"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(teacher_folder), AutoTokenizer.from_pretrained(teacher_folder)
    assert len({sample["sequence_id"] for sample in samples}) == len(samples) == 3
    texts = store.tokens("heldout")["text"].to_pylist()
    for sample in samples:
        query = "SELECT token_id FROM positions WHERE dump = 'heldout' AND sequence_id = $id ORDER BY position"
        ids = store.sql(query, {"id": sample["sequence_id"]})["token_id"].to_pylist()
        start = sample["start"]
        assert 0 < start < len(ids)
        assert tokenizer.decode(ids[:start]).endswith(sample["prompt"])
        assert sample["text"] == tokenizer.decode(ids[start : start + 32])
        written, known = [], torch.tensor([ids[:start]])
        while len(written) < 32:
            with torch.no_grad():
                written.append(int(model(known).logits[0, -1].argmax()))
            known = torch.cat([known, torch.tensor([written[-1:]])], dim=1)
            if written[-1] == tokenizer.eos_token_id:
                break
        assert sample["written"] == tokenizer.decode(written)
        assert [entry["token"] for entry in sample["positions"]] == [texts[token] for token in ids[start : start + 6]]
        for entry in sample["positions"]:
            shares = [share for _, share in entry["candidates"]]
            assert len(shares) == 5 and shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1
        likeliest = [text for text, share in sample["positions"][0]["candidates"] if share == max(shares_of(sample))]
        assert texts[written[0]] in likeliest


def shares_of(sample: dict) -> list[float]:
    return [share for _, share in sample["positions"][0]["candidates"]]


def test_samples_do_not_depend_on_the_model_or_its_settings(result, teacher_folder, store_folder, tmp_path):
    """Another model continues the same texts; one whose settings sample writes the likeliest tokens all the same."""
    model = AutoModelForCausalLM.from_pretrained(teacher_folder)
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0, max_length=7)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(tmp_path / "model")
    found = evaluate(EvaluateConfig(str(tmp_path / "model"), str(store_folder), dump="heldout", limit=1))
    assert found["samples"] == result["samples"]


def test_samples_of_conversations_begin_where_the_answer_does(teacher_folder, loaded_teacher, tmp_path):
    turns = [{"role": "user", "content": "How far?"}, {"role": "assistant", "content": "As far as somebody looks for it."}]
    corpus = write_jsonl(tmp_path / "chat.jsonl", [{"messages": turns}] * 2)
    selection = {"selection": "threshold", "draw_weight": 0.1}
    dump(DumpConfig(str(teacher_folder), (corpus,), tmp_path / "store", max_length=48, **selection), teacher=loaded_teacher)
    found = evaluate(EvaluateConfig(str(teacher_folder), str(tmp_path / "store"), output=str(tmp_path / "e.json")))
    assert len(found["samples"]) == 2
    for sample in found["samples"]:
        assert sample["prompt"].endswith("How far?<|end|>\n<|assistant|>") and not sample["prompt_cut"]
        assert sample["text"].startswith("As far as somebody")


def write_gguf(model_folder: Path, path: Path, quantisation: GGMLQuantizationType) -> None:
    """A Llama's weights as a GGUF file, its matrices quantised; queries and keys stand there in the order of llama.cpp."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        kind = quantisation if values.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_quantised_copies_in_gguf_files(result, teacher_folder, store_folder, tmp_path):
    """One that is not quantised is the model, and one of 4 bits is at some distance from it."""
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(tmp_path)
    found = {}
    for quantisation in (GGMLQuantizationType.F32, GGMLQuantizationType.Q4_0):
        write_gguf(teacher_folder, tmp_path / f"{quantisation.name}.gguf", quantisation)
        config = EvaluateConfig(str(tmp_path), str(store_folder), dump="heldout", gguf_file=f"{quantisation.name}.gguf")
        found[quantisation.name] = evaluate(config)["figures"]["positions"]["student"]
    assert found["F32"]["nll"] == pytest.approx(result["student"]["nll"], abs=1e-5)
    assert found["F32"]["kl"] == pytest.approx(result["student"]["kl"], abs=1e-5)
    assert found["Q4_0"]["kl_lower_bound"] > 2 * found["F32"]["kl_lower_bound"]
    assert found["Q4_0"]["top_1_agreement"] < found["F32"]["top_1_agreement"]
    results = sorted(path.name for path in (tmp_path / "evaluations").iterdir())
    assert results == ["heldout.F32.json", "heldout.Q4_0.json"]
