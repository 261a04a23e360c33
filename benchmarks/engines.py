"""vLLM against transformers as what runs a teacher: what a dump keeps of each, and what it takes, in turns in one process.

    python -m benchmarks.engines --teacher smollm2 --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf --text wikitext2-test.txt

Batches of the text are given to both engines, one after the other, and what is kept of their answers is compared in steps of
the format: how many differ, and by how many steps. Both are dumped and checked with the other as the judge. Draws are made from
distributions that vLLM gave, and held against those of transformers, by the test of `benchmarks.studies.unbiasedness`. Without
`--teacher` it is a random Llama of 2 layers with heads as wide as vLLM takes. It runs where vLLM is installed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.measurement import keep
from benchmarks.studies.unbiasedness import DRAWS, FALSE_ALARM, SELECTIONS, chi_square, drawn, limit
from benchmarks.tiny_model import make_tokenizer
from knowledge_store import DumpWriter, Manifest
from knowledge_store.format.sequences import tokens_table
from knowledge_store.kinds import Arrays
from knowledge_store.kinds.positions import exact_steps
from knowledge_store.terminal.progress import progress_bar
from teacher_dump import CheckConfig, DumpConfig, check
from teacher_dump.dumping.batches import batch_arrays, batch_room, extract_batch, length_batches, predict_batch
from teacher_dump.dumping.inspection import corpus_tokenizer
from teacher_dump.dumping.plan import ShardReader, kept_parameters, make_manifest
from teacher_dump.dumping.teacher_pass import shard_of
from teacher_dump.teachers.opening import open_teacher
from teacher_dump.teachers.protocol import Ability, Teacher

ENGINES = ("transformers", "vllm")
LENGTH = 512
TAILS = (-7, -9, -11, -13)  # nats: by which the tail's error without whole distributions is told


def make_teacher(folder: Path, source: str | None, gguf_file: str | None, text: str) -> str:
    """A folder of safetensors that both engines load."""
    if source is not None and gguf_file is None:
        return source
    if source is not None:
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file, dtype=torch.float32)
        # A model that knows it came from GGUF is not saved.
        plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, gguf_file=gguf_file), dtype=torch.float32)
        plain.load_state_dict(loaded.state_dict())
        plain.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=gguf_file).save_pretrained(folder)
        return str(folder)
    tokenizer = make_tokenizer([text])
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def differences(one: list[Arrays], other: list[Arrays], manifest: Manifest) -> dict[str, Any]:
    """How what is kept of the same positions differs between two engines, in steps and in nats."""
    sides = [_joined(arrays) for arrays in (one, other)]
    steps = [exact_steps(side, manifest) for side in sides]
    values = differing = largest = 0
    by_name: dict[str, Any] = {}
    for name in steps[0]:
        kept = np.isfinite(steps[0][name]) & np.isfinite(steps[1][name])
        apart = np.abs(np.round(steps[0][name][kept]) - np.round(steps[1][name][kept]))
        unlike = int((np.isfinite(steps[0][name]) != np.isfinite(steps[1][name])).sum())
        by_name[name] = {"values": int(kept.sum()), "differing": int((apart > 0).sum()), "in_one_alone": unlike}
        values, differing = values + len(apart), differing + int((apart > 0).sum())
        largest = max(largest, int(apart.max(initial=0)))
    first, second = sides
    return {
        "positions": len(first["token_logprob"]),
        "steps": values,
        "differing": differing,
        "share_differing": differing / values,
        "largest_difference_in_steps": largest,
        "by_column": by_name,
        "largest_difference_in_nats": {
            name: float(np.abs(first[name] - second[name]).max()) for name in ("token_logprob", "tail_logprob", "tail_entropy")
        },
        "positions_with_other_candidates": int(
            (np.sort(first["candidate_ids"]) != np.sort(second["candidate_ids"])).any(1).sum()
        ),
        "positions_with_other_draws": int((first["tail_ids"] != second["tail_ids"]).any(axis=1).sum()),
    }


def _joined(parts: list[Arrays]) -> Arrays:
    """What is kept of all positions with knowledge, float64; lists are filled up."""
    widths = {"tail_ids": max(part["tail_ids"].shape[1] for part in parts)}
    joined: dict[str, list[np.ndarray]] = {}
    for part in parts:
        for name, values in part.items():
            chosen = values[part["has_knowledge"]]
            if name in widths:
                chosen = np.pad(chosen, ((0, 0), (0, widths[name] - chosen.shape[1])), constant_values=-1)
            joined.setdefault(name, []).append(chosen)
    return {name: np.concatenate(values) for name, values in joined.items()}


def remainder_errors(teacher: Teacher, sequences: list[np.ndarray], exact: list[Arrays]) -> dict[str, Any]:
    """How far the tail is off that the likeliest five tokens leave, and how far these are, by the tail's true size."""
    from teacher_dump.extraction.likeliest import candidates_of

    off: list[np.ndarray] = []
    true: list[np.ndarray] = []
    candidates = 0.0
    for token_ids, arrays in zip(sequences, exact, strict=True):
        prediction = teacher.predict(*batch_arrays([token_ids]), likeliest=5)
        places = np.flatnonzero(arrays["has_knowledge"])
        answers = prediction.likeliest(np.zeros_like(places), places - 1)
        found = candidates_of(answers, SELECTIONS[0], teacher.vocabulary_size)
        off.append(np.abs(found["tail_logprob"] - arrays["tail_logprob"][places]))
        true.append(arrays["tail_logprob"][places])
        apart = np.abs(answers.logprobs - arrays["candidate_logprobs"][places])
        candidates = max(candidates, float(apart.max(initial=0)))
    errors, tails = np.concatenate(off), np.concatenate(true)
    figures: dict[str, Any] = {"positions": len(errors), "largest_difference_of_a_candidate": candidates}
    for above, below in zip(TAILS, (0, *TAILS), strict=False):
        within = errors[(tails >= above) & (tails < below)]
        figures[f"tail of e^{above} to e^{below}"] = {"positions": len(within), "largest_error": float(within.max(initial=0))}
    return figures


def unbiased(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, Any]:
    """Draws from one engine's distributions (N, V) against the other's."""
    each = FALSE_ALARM / (len(ours) * len(SELECTIONS))
    shares = []
    for number, (logits, reference) in enumerate(zip(ours, theirs, strict=True)):
        for selection in SELECTIONS:
            seen, expected = drawn(logits, selection, number, reference)
            statistic, bins = chi_square(seen, expected)
            shares.append(statistic / limit(bins - 1, each))
    return {
        "distributions": len(ours),
        "draws": DRAWS,
        "tests": len(shares),
        "failed": sum(share >= 1 for share in shares),
        "largest_share_of_the_limit": max(shares),
    }


def main() -> None:
    """Measure, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="a folder")
    parser.add_argument("--gguf-file", help="in it, which is made into a folder of safetensors")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--positions", type=int, default=20_000)
    arguments = parser.parse_args()
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = make_teacher(folder / "teacher", arguments.teacher, arguments.gguf_file, arguments.text.read_text())
        name = arguments.gguf_file or (Path(arguments.teacher).name if arguments.teacher else "a Llama of 2 layers")
        figures = {"teacher": name, **measure(source, arguments.text, arguments.positions, folder / "store")}
        keep(f"engines-{figures['vocabulary_size']}", figures)


def measure(source: str, text: Path, positions: int, store: Path) -> dict[str, Any]:
    """All figures of one teacher."""
    configs = {
        engine: DumpConfig(source, text, store, name=engine, engine=engine, max_length=LENGTH, shard_size=1, batch_size=8)
        for engine in ENGINES
    }
    teachers = {engine: open_teacher(config, config.loading, LENGTH) for engine, config in configs.items()}
    assert Ability.DISTRIBUTIONS in teachers["vllm"].abilities
    manifests = {engine: make_manifest(config, teachers[engine]) for engine, config in configs.items()}
    writers = {
        engine: DumpWriter.open(store, manifest, tokens_table(*teachers[engine].tokens()))
        for engine, manifest in manifests.items()
    }
    tokenizer = corpus_tokenizer(configs["vllm"], teachers["vllm"].tokenizer)
    reader = ShardReader(configs["vllm"], manifests["vllm"], tokenizer)
    parameters = kept_parameters(manifests["vllm"])
    seconds = {engine: {"processor": 0.0, "wall": 0.0} for engine in ENGINES}
    kept: dict[str, list[Arrays]] = {engine: [] for engine in ENGINES}
    asked: list[np.ndarray] = []
    distributions: dict[str, list[torch.Tensor]] = {engine: [] for engine in ENGINES}
    done = timed = number = 0
    with progress_bar("asking both", positions, "positions") as advance:
        while done < positions and number < manifests["vllm"].shard_count:
            shard = reader.read(number)
            lengths = [len(sequence.token_ids) for sequence in shard.sequences]
            found: dict[str, list[Arrays]] = {engine: [{}] * len(lengths) for engine in ENGINES}
            for turn, indices in enumerate(length_batches(lengths, batch_room(configs["vllm"], teachers["vllm"], LENGTH, ()))):
                sequences = [shard.sequences[index] for index in indices]
                for engine in ENGINES if turn % 2 else reversed(ENGINES):
                    started, used = time.monotonic(), time.process_time()
                    prediction = predict_batch(configs[engine], teachers[engine], sequences, parameters)
                    extracted = extract_batch(configs[engine], parameters, prediction, sequences)["positions"]
                    if done or turn:  # the first batch pays for what later ones find ready
                        seconds[engine]["processor"] += time.process_time() - used
                        seconds[engine]["wall"] += time.monotonic() - started
                    for index, arrays in zip(indices, extracted, strict=True):
                        found[engine][index] = arrays
                    if len(distributions[engine]) < 2:
                        distributions[engine].append(_distributions(teachers[engine], sequences[0].token_ids))
                size = sum(lengths[index] for index in indices)
                timed += size if done or turn else 0
                advance(size)
            for engine, writer in writers.items():
                writer.commit(shard_of(writer.manifest, shard, {"positions": found[engine]}, {"device": ""}))
                kept[engine] += found[engine]
            asked += [sequence.token_ids for sequence in shard.sequences]
            done, number = done + sum(lengths), number + 1
    judged = {}
    for engine, judge in (ENGINES, reversed(ENGINES)):
        agreement = check(CheckConfig(store, source, dump=engine, sample=20), teachers[judge])["positions"]
        judged[f"{engine} judged by {judge}"] = {
            "verdict": agreement.verdict,
            "sequences": agreement.sequences,
            "sequences_off": agreement.sequences_off,
        }
    return {
        "vocabulary_size": teachers["vllm"].vocabulary_size,
        "vllm": teachers["vllm"].device_name,
        "dtype": teachers["vllm"].description["dtype"],
        "kept": differences(kept["transformers"], kept["vllm"], manifests["vllm"]),
        "checks": judged,
        "draws": unbiased(*(torch.cat(distributions[engine]) for engine in reversed(ENGINES))),
        "remainder": remainder_errors(teachers["vllm"], asked[:8], kept["transformers"][:8]),
        "timed_positions": timed,
        "positions_per_second_of_processor_time": {
            engine: timed / max(spent["processor"], 1e-9) for engine, spent in seconds.items()
        },
        "positions_per_second": {engine: timed / max(spent["wall"], 1e-9) for engine, spent in seconds.items()},
    }


def _distributions(teacher: Teacher, token_ids: np.ndarray) -> torch.Tensor:
    """Log-probabilities (8, V) at places all over a sequence."""
    places = torch.linspace(8, len(token_ids) - 2, 8).long()
    prediction = teacher.predict(*batch_arrays([token_ids]))
    parts = prediction.logit_slices(torch.zeros_like(places), places)
    return torch.cat([logits.float().log_softmax(dim=1).cpu() for _, logits in parts])


if __name__ == "__main__":
    main()
