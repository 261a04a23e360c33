"""Bytes a position takes in the formats in which other tools keep a teacher's top-k, on the same records.

Each function writes the records in one tool's layout, after what that tool's public source says of its files, and measures
what it wrote: our writing of their layout, not their code. Where the tool leaves a choice to its user, it is the default or the
recommended one; what depends on the run (padding, file names, how often a file is closed) is left out, in the tool's favour.
A layout that keeps the token before the first prediction of a sequence does without it: one token in each sequence.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zstandard


@dataclass(frozen=True)
class Records:
    """The predictions of a teacher, of sequences one after the other: N predictions in S sequences."""

    ids: np.ndarray  # uint32 (N, k), likeliest first
    logprobs: np.ndarray  # float32 (N, k), nats, over the full vocabulary
    tail_logprob: np.ndarray  # float32 (N,): what the k leave
    token_id: np.ndarray  # uint32 (N,): the token that stands there
    token_logprob: np.ndarray  # float32 (N,)
    lengths: np.ndarray  # int64 (S,): predictions of each sequence; they add up to N
    vocabulary_size: int

    def sequences(self) -> Iterator[Records]:
        """Each sequence by itself, in order."""
        ends = np.cumsum(self.lengths)
        for start, end in zip(ends - self.lengths, ends, strict=True):
            yield self.between(int(start), int(end))

    def between(self, start: int, end: int) -> Records:
        """Predictions `start` to `end`, as one sequence."""
        part = slice(start, end)
        return replace(
            self,
            ids=self.ids[part],
            logprobs=self.logprobs[part],
            tail_logprob=self.tail_logprob[part],
            token_id=self.token_id[part],
            token_logprob=self.token_logprob[part],
            lengths=np.array([end - start]),
        )


# DistillKit 1.0.0 (arcee-ai/DistillKit, a61c2e7): StreamingParquetWriter and LogprobCompressor.
DISTILLKIT_ROWS = 1000  # sequences that its writer gathers before it writes them, and closes the file
Polynomial = Callable[[np.ndarray], list[np.ndarray]]


def whole_polynomial(rank: np.ndarray) -> list[np.ndarray]:
    """`polynomial_terms: [0, 1, 2, 3, 4, sqrt]`, of DistillKit's recommended setting."""
    return [rank**power for power in range(5)] + [np.sqrt(rank)]


def short_polynomial(rank: np.ndarray) -> list[np.ndarray]:
    """`polynomial_terms: [0, 1, sqrt]`, of DistillKit's budget setting."""
    return [rank**0, rank, np.sqrt(rank)]


def packed_ids(ids: np.ndarray, bits: int) -> np.ndarray:
    """Ids side by side in `bits` bits each, high bit first: uint8 (N, ceil(k * bits / 8))."""
    octets = ids.astype(">u4").view(np.uint8).reshape(*ids.shape, 4)
    return np.packbits(np.unpackbits(octets, axis=-1)[..., -bits:].reshape(len(ids), -1), axis=-1)


def polynomial_logprobs(logprobs: np.ndarray, exact: int, polynomial: Polynomial) -> np.ndarray:
    """The first `exact` log-probabilities as bfloat16, the least-squares fit of the others as float32: uint8 (N, bytes)."""
    kept = torch.from_numpy(np.ascontiguousarray(logprobs[:, :exact])).bfloat16().view(torch.uint8).numpy()
    fitted = logprobs[:, exact:]
    if not fitted.shape[1]:
        return kept
    terms = np.stack(polynomial(np.arange(fitted.shape[1], dtype=np.float64)), axis=1)
    # Theirs drops singular values below 1e-5; numpy takes that bound as a share of the largest.
    solve = np.linalg.pinv(terms, rcond=1e-5 / np.linalg.norm(terms, 2))
    coefficients = np.ascontiguousarray(fitted @ solve.T, dtype=np.float32)
    return np.concatenate([kept, coefficients.view(np.uint8)], axis=1)


def distillkit(records: Records, exact: int = 16, polynomial: Polynomial = whole_polynomial) -> float:
    """DistillKit: Parquet (snappy, dictionaries: pyarrow's defaults), a row a sequence, a list of bytes a position.

    `input_ids` uint64; `bytepacked_indices`, the ids at ceil(log2(vocabulary)) bits; `compressed_logprobs`, the first `exact`
    as bfloat16 and the float32 coefficients of a polynomial in the rank for the rest. Recommended are k = 128, 16 exact values
    and six terms; with a k of 16 or less all are exact, and no polynomial is kept. No tail, no log-probability of the token.
    """
    bits = math.ceil(math.log2(records.vocabulary_size))
    columns = {
        "compressed_logprobs": polynomial_logprobs(records.logprobs, min(exact, records.ids.shape[1]), polynomial),
        "bytepacked_indices": packed_ids(records.ids, bits),
    }
    ends = np.concatenate([[0], np.cumsum(records.lengths)])
    written = 0
    for first in range(0, len(records.lengths), DISTILLKIT_ROWS):
        bounds = ends[first : first + DISTILLKIT_ROWS + 1]
        part = slice(bounds[0], bounds[-1])
        rows = pa.array(bounds - bounds[0], pa.int32())
        table = {"input_ids": pa.ListArray.from_arrays(rows, pa.array(records.token_id[part], pa.uint64()))}
        for name, octets in columns.items():
            inner = pa.array(np.arange(bounds[-1] - bounds[0] + 1) * octets.shape[1], pa.int32())
            table[name] = pa.ListArray.from_arrays(rows, pa.ListArray.from_arrays(inner, pa.array(octets[part].ravel())))
        file = io.BytesIO()
        pq.write_table(pa.table(table), file)
        written += len(file.getvalue())
    return written / len(records.ids)


def distillkit_budget(records: Records) -> float:
    """DistillKit with its "budget pick" (recommended k = 50): one exact value, three terms."""
    return distillkit(records, exact=1, polynomial=short_polynomial)


# Megatron-LM (NVIDIA/Megatron-LM, d98e8a6): megatron/training/distillation/logits_saver.py.
MICROBATCH, MICROBATCHES = 4096, 16  # positions; in an iteration. The run's choice: small ones cost up to 2 bytes more


def tar_bytes(members: dict[str, bytes]) -> int:
    """Size of a tar archive of these members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            head = tarfile.TarInfo(name)
            head.size = len(data)
            tar.addfile(head, io.BytesIO(data))
    return len(file.getvalue())


def megatron(records: Records) -> float:
    """Megatron-LM's offline logits: a tar of `torch.save` files, one an iteration, each compressed with zstd at level 3.

    Lists of tensors, one a microbatch: log-probabilities float16, the low 16 bits of the ids uint16, their 17th bit a bool of a
    byte. No tokens (the data set is named by its hash), no tail. A vocabulary beyond 131,072 fails its assertion: nan.
    """
    if records.vocabulary_size > 2**17:
        return math.nan
    compressor = zstandard.ZstdCompressor(level=3)
    members = {"_meta.json": b"{}"}
    positions = len(records.ids)
    columns = {
        "values": records.logprobs.astype(np.float16),
        "indices_low": (records.ids & 0xFFFF).astype(np.uint16),
        "bit_17": records.ids >= 2**16,
    }
    step = MICROBATCH * MICROBATCHES
    for number, start in enumerate(range(0, positions, step)):
        parts = [slice(first, first + MICROBATCH) for first in range(start, min(start + step, positions), MICROBATCH)]
        file = io.BytesIO()
        # A tensor (positions, sequences, k) as theirs; copied, or each would bring the whole column into the file.
        torch.save(
            {name: [torch.from_numpy(each[part][:, None].copy()) for part in parts] for name, each in columns.items()}, file
        )
        members[f"{number}.pt.zst"] = compressor.compress(file.getvalue())
    return tar_bytes(members) / positions


# Random sampling of ids from the teacher: "Sparse Logit Sampling" (Anshumann et al., 2025). Its size depends on the number of
# different ids drawn, not on a k: here k of them, so that all the layouts hold as many ids.
def drawn(records: Records) -> np.ndarray:
    """An id and its count of draws, 17 and 7 bits: uint8 (N, k, 3), low byte first. Ids beyond 131,071 wrap, as theirs do."""
    counts = np.clip(np.rint(np.exp(records.logprobs) * 127), 0, 127).astype(np.uint32)
    return (records.ids & 0x1FFFF | counts << 17).astype("<u4")[..., None].view(np.uint8)[..., :3]


def random_sampling(records: Records) -> float:
    """The paper's own figure, of which no code is released: 24 bits an id and nothing else. No tokens, no file around it."""
    return len(drawn(records).tobytes()) / len(records.ids)


SAMPLEDKD_SHARD = 2048  # sequences a file


def sampledkd(records: Records) -> float:
    """SampledKD, later SE-KD (almogtavor/SE-KD3x, 08b2763): `torch.save` files of a dict a sequence, and a JSON manifest.

    The dict has the drawn ids (uint8, 3 an id, as many for every position), the teacher's entropy float16 (its default
    `offline_cache_mode`), a bool mask, a SHA-1 key. Not compressed. No tokens. Its default is 64 ids, earlier 12.
    """
    k = records.ids.shape[1]
    written = 0
    items: list[dict[str, object]] = []
    manifest: dict[str, dict[str, object]] = {"signature": {}, "items": {}}
    sequences = list(records.sequences())
    for number, each in enumerate(sequences):
        key = hashlib.sha1(each.token_id.astype(np.int64).tobytes() + number.to_bytes(8)).hexdigest()
        entropy = -(np.exp(each.logprobs) * each.logprobs).sum(axis=1)
        items.append(
            {
                "key": key,
                "valid_mask": torch.ones(len(each.ids), dtype=torch.bool),
                "topk_m": 20,
                "cache_mode": "entropy",
                "rs": {
                    "U": k,
                    "N": 50,
                    "id_bits": 17,
                    "prob_bits": 7,
                    "sentinel_id": records.vocabulary_size,
                    "packed": torch.from_numpy(drawn(each).ravel().copy()),
                },
                "entropy_fp16": torch.from_numpy(entropy.astype(np.float16)),
            }
        )
        manifest["items"][key] = {"shard": number // SAMPLEDKD_SHARD, "index": number % SAMPLEDKD_SHARD}
        if len(items) == SAMPLEDKD_SHARD or number == len(sequences) - 1:
            file = io.BytesIO()
            torch.save(items, file)
            written += len(file.getvalue())
            items = []
    written += len(json.dumps(manifest, indent=2, sort_keys=True))
    return written / len(records.ids)


# MaxText 0.2.5 (AI-Hypercomputer/maxtext, e591f30): save_top_k_teacher_logits.py.
ARRAY_RECORD_OVERHEAD = 96  # bytes a record: the header of a Riegeli chunk, the record's size, its entry in the footer


def varints(values: np.ndarray) -> bytes:
    """Non-negative integers below 2**35 in protobuf's variable length, low seven bits first."""
    groups = values.astype(np.uint64)[:, None] >> (7 * np.arange(5, dtype=np.uint64))
    more = groups >= 128
    kept = np.concatenate([np.ones((len(values), 1), bool), more[:, :-1]], axis=1)
    return bytes((groups & 127 | more.astype(np.uint64) << 7)[kept].astype(np.uint8))


def field(number: int, data: bytes) -> bytes:
    """A protobuf field of bytes."""
    return bytes([number << 3 | 2]) + varints(np.array([len(data)])) + data


def tf_example(features: dict[str, np.ndarray]) -> bytes:
    """A `tf.train.Example`: float32 as they are, integers in variable length."""
    entries = b""
    for name, column in features.items():
        values = column.ravel()
        kind, data = (2, values.tobytes()) if values.dtype == np.float32 else (3, varints(values))
        entries += field(1, field(1, name.encode()) + field(2, field(kind, field(1, data))))
    return field(1, entries)


def maxtext(records: Records) -> float:
    """MaxText: an ArrayRecord of `tf.train.Example`, one a sequence and a chunk, each compressed with zstd at level 3.

    float32 logits, ids, tokens and, by default, the targets, their positions and two segmentations. It keeps raw logits and no
    normaliser; the log-probabilities stand in for them. The blocks of 64 KiB to which a file is filled up are left out.
    """
    compressor = zstandard.ZstdCompressor(level=3)
    written = 0
    for each in records.sequences():
        ones = np.ones(len(each.ids), np.int64)
        example = tf_example(
            {
                "inputs": np.concatenate([each.token_id[:1], each.token_id[:-1]]),
                "top_k_logits": each.logprobs.astype(np.float32),
                "top_k_indices": each.ids,
                "sequence_hash": np.array([2**34]),
                "inputs_position": np.arange(len(each.ids)),
                "inputs_segmentation": ones,
                "targets_segmentation": ones,
                "targets": each.token_id,
            }
        )
        written += len(compressor.compress(example)) + ARRAY_RECORD_OVERHEAD
    return written / len(records.ids)


def json_lines(rows: Iterable[Mapping[str, object]]) -> int:
    """Size of these rows as JSON lines, as Python's `json` writes them."""
    return sum(len(json.dumps(row)) + 1 for row in rows)


def axolotl(records: Records) -> float:
    """Axolotl (axolotl-ai-cloud/axolotl, 067b021; its dumper is somebody else's): JSON lines, floats as text.

    Its present `integrations.kd.chat_template`: lists of log-probabilities and of `target_token_ids`, a row a sequence. The
    `messages`, text that stands there in place of tokens, are left out. No tail; it makes the k sum to one. Its first form
    (`load_legacy`), an object for each log-probability as inference servers write it, takes 2.2 times as much.
    """
    rows = ({"logprobs": each.logprobs.tolist(), "target_token_ids": each.ids.tolist()} for each in records.sequences())
    return json_lines(rows) / len(records.ids)


def nemo_aligner(records: Records) -> float:
    """NeMo-Aligner 0.7.0 (NVIDIA/NeMo-Aligner, af2b3bd; retired): JSON lines, a row a sequence, floats as text.

    The tokens, labels and mask of its fine-tuning data, the top-k logits less the largest one, their ids, and the log-sum-exp,
    so that the tail can be had. A chat's `contexts` and `answers`, the tokens once more, are left out.
    """
    rows = (
        {
            "tokens": np.concatenate([each.token_id[:1], each.token_id[:-1]]).tolist(),
            "labels": each.token_id.tolist(),
            "loss_mask": [1] * len(each.ids),
            "topk_logits": (each.logprobs - each.logprobs[:, :1]).tolist(),
            "topk_token_ids": each.ids.tolist(),
            "log_sum_exp_logits": (-each.logprobs[:, 0]).tolist(),
            "index": number,
        }
        for number, each in enumerate(records.sequences())
    )
    return json_lines(rows) / len(records.ids)


LAYOUTS: dict[str, Callable[[Records], float]] = {
    "random sampling (paper)": random_sampling,
    "SampledKD": sampledkd,
    "Megatron-LM": megatron,
    "DistillKit": distillkit,
    "DistillKit, budget": distillkit_budget,
    "MaxText": maxtext,
    "axolotl": axolotl,
    "NeMo-Aligner": nemo_aligner,
}
