"""Caches of predictions as other programs write them, each with the same known answers, right or shifted by one.

They are written from the layouts' descriptions (teacher_dump/IMPORTS.md), without those programs; what axolotl and vLLM wrote
themselves lies in `axolotl_prepared.jsonl` and `vllm_server`.
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from stores import log_softmax

K = 5


@dataclass(frozen=True)
class Cache:
    """What a teacher said of some texts.

    Attributes:
        tokens: int64 (T,) of each text.
        ids, logprobs: (T, K) of each text, likeliest first; row t is the prediction of token t, and row 0 means nothing.
        own: float64 (T,) of each text, the log-probability of the token itself.
        predicted: int64 (T,) of each text, which token that is: `tokens`, unless predictions are shifted.
    """

    tokens: list[np.ndarray]
    ids: list[np.ndarray]
    logprobs: list[np.ndarray]
    own: list[np.ndarray]
    predicted: list[np.ndarray]


def make_cache(vocabulary: int, lengths: tuple[int, ...] = (40, 23, 60, 31), seed: int = 0, k: int = K) -> Cache:
    """Random texts, of which the teacher expects most tokens."""
    random = np.random.default_rng(seed)
    cache = Cache([], [], [], [], [])
    for length in lengths:
        tokens = random.integers(0, vocabulary, length)
        logits = random.normal(0, 2, (length, vocabulary))
        logits[np.arange(length), tokens] += random.choice([0, 7], length, p=[0.3, 0.7])
        logprobs = log_softmax(logits)
        ids = np.argsort(-logprobs, axis=1, kind="stable")[:, :k]
        cache.tokens.append(tokens)
        cache.ids.append(ids)
        cache.logprobs.append(np.take_along_axis(logprobs, ids, 1))
        cache.own.append(logprobs[np.arange(length), tokens])
        cache.predicted.append(tokens)
    return cache


def shifted(cache: Cache, by: int) -> Cache:
    """The same with each prediction standing `by` tokens later."""
    roll = lambda arrays: [np.roll(array, by, axis=0) for array in arrays]  # noqa: E731
    return Cache(cache.tokens, roll(cache.ids), roll(cache.logprobs), roll(cache.own), roll(cache.predicted))


def write_plain(folder: Path, cache: Cache) -> list[str]:
    """Parquet with row t of token t, and the tail and the token's own log-probability beside it; left padding in every row."""
    left = 3
    rows = []
    for tokens, ids, logprobs, own in zip(cache.tokens, cache.ids, cache.logprobs, cache.own, strict=True):
        tail = np.log1p(-np.exp(logprobs).sum(axis=1))
        pad = np.zeros(left, int)
        rows.append(
            {
                "tokens": [*pad.tolist(), *tokens.tolist()],
                "top": [*[[0] * K] * left, *ids.tolist()],
                "scores": [*[[0.0] * K] * left, *logprobs.tolist()],
                "own": [*pad.tolist(), *own.tolist()],
                "rest": [*pad.tolist(), *tail.tolist()],
                "mask": [*pad.tolist(), *np.ones(len(tokens), int).tolist()],
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), folder / "cache.parquet")
    columns = "ids=tokens,candidates=top,logprobs=scores,token=own,tail=rest,mask=mask"
    return [str(folder / "cache.parquet"), "--columns", columns]


def write_distillkit(folder: Path, cache: Cache, vocabulary: int) -> list[str]:
    """One row with all texts packed into it: row j of token j + 1, and `attention_mask` telling the texts apart."""
    bits = int(np.ceil(np.log2(vocabulary)))
    octets, packed = [], []
    for ids, logprobs in zip(cache.ids, cache.logprobs, strict=True):
        following = np.roll(np.arange(len(ids)), -1)  # the last row is of the next token, which was cut off
        spread = (ids[following][:, :, None] >> np.arange(bits - 1, -1, -1)) & 1
        octets += np.packbits(spread.reshape(len(ids), -1).astype(np.uint8), axis=1).tolist()
        exact = logprobs[following][:, :2].astype("<f4")
        quantised, scales = _residuals(logprobs[following][:, 2:])
        parts = [
            exact.view(np.uint8).reshape(len(ids), -1),
            scales.astype("<f4").view(np.uint8).reshape(len(ids), -1),
            quantised,
        ]
        packed += np.concatenate(parts, axis=1).tolist()
    row = {
        "input_ids": np.concatenate(cache.tokens).tolist(),
        "attention_mask": np.repeat(np.arange(len(cache.tokens)) + 1, [len(tokens) for tokens in cache.tokens]).tolist(),
        "compressed_logprobs": packed,
        "bytepacked_indices": octets,
    }
    listed = pa.list_(pa.list_(pa.uint8()))
    schema = pa.schema({"input_ids": pa.list_(pa.uint64()), "attention_mask": pa.list_(pa.int64()),
                        "compressed_logprobs": listed, "bytepacked_indices": listed})  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row], schema=schema), folder / "data_0.parquet")
    (folder / "compression_config.yaml").write_text(
        f"d: {vocabulary}\nk: {K}\nexact_k: 2\nexact_dtype: float32\npolynomial_terms: null\nterm_dtype: float32\n"
        f"residual_bins:\n- scale_dtype: float32\n  element_bits: 16\n  num_elements: {K - 2}\n"
        "delta_encoding: false\nerror_diffusion: false\n"
    )
    return [str(folder / "data_0.parquet")]


def _residuals(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (N, M) in 16 bits each, as bytes (N, 2M), and the scale of each row (N, 1)."""
    scales = np.abs(values).max(axis=1, keepdims=True) / 2**15
    steps = np.clip(np.round(values / scales), -(2**15), 2**15 - 1) + 2**15
    return np.ascontiguousarray(steps.astype(">u2")).view(np.uint8).reshape(len(values), -1), scales


def write_vllm(folder: Path, cache: Cache) -> list[str]:
    """JSON lines: replies to requests of prompt_logprobs, the token itself listed beside the candidates."""
    lines = []
    for text, (tokens, ids, logprobs, own) in enumerate(zip(cache.tokens, cache.ids, cache.logprobs, cache.own, strict=True)):
        said: list[dict | None] = [None]
        for t in range(1, len(tokens)):
            entry = {str(cache.predicted[text][t]): {"logprob": float(own[t]), "rank": 99, "decoded_token": "?"}}
            for rank, (token, logprob) in enumerate(zip(ids[t].tolist(), logprobs[t].tolist(), strict=True), 1):
                entry[str(token)] = {"logprob": logprob, "rank": rank, "decoded_token": "?"}
            said.append(entry)
        choice = {"index": 0, "text": "", "prompt_token_ids": tokens.tolist(), "prompt_logprobs": said, "logprobs": None}
        lines.append({"custom_id": "a", "response": {"status_code": 200, "body": {"choices": [choice]}}, "error": None})
    (folder / "replies.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [str(folder / "replies.jsonl")]


def write_axolotl(folder: Path, cache: Cache) -> list[str]:
    """An Arrow file: row j of token j + 1, the last row filled up with −∞, and labels."""
    rows = []
    for tokens, ids, logprobs in zip(cache.tokens, cache.ids, cache.logprobs, strict=True):
        rows.append(
            {
                "input_ids": tokens.tolist(),
                "labels": [-100, -100, *tokens[2:].tolist()],
                "attention_mask": [1] * len(tokens),
                "target_token_ids": [*ids[1:].tolist(), list(range(K))],
                "target_logprobs": [*logprobs[1:].tolist(), [-np.inf] * K],
                "target_mask": [*[[1] * K] * (len(tokens) - 1), [0] * K],
            }
        )
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(folder / "data-00000.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return [str(folder / "data-00000.arrow")]


def write_nemo(folder: Path, cache: Cache) -> list[str]:
    """JSON lines: the logits less their largest, their log-sum-exp, and padding on the right."""
    lines = []
    for tokens, ids, logprobs in zip(cache.tokens, cache.ids, cache.logprobs, strict=True):
        right, total = 4, -logprobs[1:, 0]
        lines.append(
            {
                "tokens": [*tokens[:-1].tolist(), *[0] * right],
                "labels": [*tokens[1:].tolist(), *[0] * right],
                "loss_mask": [0, *[1] * (len(tokens) - 2), *[0] * right],
                "topk_logits": [*(logprobs[1:] + total[:, None]).tolist(), *[[0.0] * K] * right],
                "topk_token_ids": [*ids[1:].tolist(), *[[0] * K] * right],
                "log_sum_exp_logits": [*total.tolist(), *[1.0] * right],
                "index": 0,
            }
        )
    (folder / "logits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [str(folder / "logits.jsonl")]


def write_megatron(folder: Path, cache: Cache) -> list[str]:
    """A tar for each of two data-parallel ranks, with one iteration of two microbatches; all texts are as long."""
    import torch
    import zstandard

    for rank in range(2):
        values, low, high = [], [], []
        for microbatch in range(len(cache.tokens) // 2):
            sample = 2 * microbatch + rank
            ids, logprobs = cache.ids[sample][1:, None], cache.logprobs[sample][1:, None]
            values.append(torch.from_numpy(logprobs.astype(np.float32)))
            low.append(torch.from_numpy(ids.astype(np.int32) & 0xFFFF).to(torch.uint16))
            high.append(torch.from_numpy(ids >> 16 > 0))
        buffer = io.BytesIO()
        torch.save({"values": values, "indices_low": low, "bit_17": high}, buffer)
        with tarfile.open(folder / f"cp0_dp{rank}__1.tar", "w") as archive:
            for name, data in (
                ("_meta.json", json.dumps({"hash": "0", "saver": {"k": K, "p": None}}).encode()),
                ("1.pt.zst", zstandard.ZstdCompressor(level=3).compress(buffer.getvalue())),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    pq.write_table(pa.table({"input_ids": [tokens.tolist() for tokens in cache.tokens]}), folder / "samples.parquet")
    tars = [str(folder / f"cp0_dp{rank}__1.tar") for rank in range(2)]
    return [*tars, "--token-file", str(folder / "samples.parquet")]
