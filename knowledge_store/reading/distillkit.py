"""A dump's candidates as files that DistillKit trains students from.

    FOLDER/
      compression_config.yaml  how they are packed: all candidates as float64, so that what they leave of one is the tail as it
                               was kept (float32 would say nothing of a small one); of a threshold's dump, as many as reach it
      data_0.parquet           a row for each sequence of N tokens:
        input_ids                list<uint64> (N), the tokens
        labels                   list<int64> (N), those that count for training, −100 for others
        compressed_logprobs      list<list<uint8>> (N − 1), row j of token j + 1: k log-probabilities, likeliest first
        bytepacked_indices       list<list<uint8>> (N − 1), their k token ids, of ⌈log₂ d⌉ bits each, most significant bit first

Where no knowledge is kept, or there are fewer candidates, NO_CANDIDATE stands, whose exp is 0. The log-probability of a token
that is no candidate, draws, and the tail's entropy are not written: the layout has no place for them.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from knowledge_store.errors import InputError
from knowledge_store.format.manifest import Manifest
from knowledge_store.kinds import Arrays
from knowledge_store.kinds.positions import positions_of
from knowledge_store.reporter import SILENT, Reporter

NO_CANDIDATE = -1000.0  # nats
IGNORED = -100
ROW_GROUP_VALUES = 2**22
OCTETS = pa.list_(pa.list_(pa.uint8()))
SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.uint64()),
        "labels": pa.list_(pa.int64()),
        "compressed_logprobs": OCTETS,
        "bytepacked_indices": OCTETS,
    }
)


def export_distillkit(
    manifest: Manifest, sequences: int, read: Callable[[int], Arrays], output: Path, *, reporter: Reporter = SILENT
) -> int:
    """Write a dump's candidates for DistillKit. The folder has its name once it is whole.

    Args:
        manifest: of the dump.
        sequences: how many it has.
        read: a sequence by its ordinal, as `KnowledgeStore` gives it.
        output: the folder.
        reporter: hears of the progress.

    Returns:
        how many rows there are.

    Raises:
        InputError: the dump holds no candidates, the folder exists already or cannot be written.
        DamageError: a file of the store is not what was published.
    """
    width, vocabulary = min(positions_of(manifest).selection.candidates, manifest.vocabulary_size), manifest.vocabulary_size
    if output.exists():
        raise InputError(f"{output} exists already: name another folder, or remove it")
    if not output.parent.is_dir():
        raise InputError(f"there is no folder {output.parent}: make it, or name another folder")
    unfinished = output.with_name(f".{output.name}.{os.getpid()}.unfinished")
    rows: list[dict[str, pa.Array]] = []
    values = 0
    try:
        unfinished.mkdir()
        with (
            pq.ParquetWriter(unfinished / "data_0.parquet", SCHEMA, compression="zstd") as writer,
            reporter.progress("exporting candidates", sequences, "sequences") as advance,
        ):
            for ordinal in range(sequences):
                rows.append(_row(read(ordinal), width, vocabulary))
                values += len(rows[-1]["input_ids"]) * width
                if values >= ROW_GROUP_VALUES or ordinal + 1 == sequences:
                    writer.write_table(pa.table([_lists(rows, field) for field in SCHEMA], schema=SCHEMA))
                    rows, values = [], 0
                advance(1)
        (unfinished / "compression_config.yaml").write_text(_configuration(width, vocabulary))
        unfinished.rename(output)
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return sequences


def _configuration(width: int, vocabulary: int) -> str:
    """What is true of YAML too, since JSON is."""
    settings = {
        "d": vocabulary, "k": width, "exact_k": width, "exact_dtype": "float64", "polynomial_terms": None,
        "term_dtype": "float32", "residual_bins": [], "delta_encoding": False, "error_diffusion": False, "normalize_t": False,
    }  # fmt: skip
    return json.dumps(settings, indent=1) + "\n"


def index_bits(vocabulary: int) -> int:
    """Bits of a packed id."""
    return math.ceil(math.log2(vocabulary)) if vocabulary > 1 else 0


def _row(sequence: Arrays, width: int, vocabulary: int) -> dict[str, pa.Array]:
    """The columns of a sequence."""
    tokens = sequence["input_ids"]
    found = sequence["candidate_logprobs"][1:].astype(np.float64)
    logprobs = np.full((len(found), width), NO_CANDIDATE)
    ids = np.zeros((len(found), width), np.int64)
    present = (found > -np.inf) & sequence["has_knowledge"][1:, None]
    with np.errstate(divide="ignore"):
        # Candidates and tail sum to one: as far as float32 does not say so, it is the candidates that give way.
        whole = np.log1p(-np.exp(sequence["tail_logprob"][1:].astype(np.float64)))
        total = np.log(np.exp(np.where(present, found, -np.inf)).sum(axis=1))
        exact = np.where(present, found + (whole - total)[:, None], NO_CANDIDATE)
    columns = found.shape[1]
    logprobs[:, :columns] = np.maximum(exact, NO_CANDIDATE)
    ids[:, :columns] = np.where(present, sequence["candidate_ids"][1:], 0)
    spread = ids[:, :, None] >> np.arange(index_bits(vocabulary) - 1, -1, -1) & 1
    packed = np.packbits(spread.reshape(len(ids), -1).astype(np.uint8), axis=1)
    return {
        "input_ids": pa.array(tokens.astype(np.uint64)),
        "labels": pa.array(np.where(sequence["is_target"], tokens, IGNORED).astype(np.int64)),
        "compressed_logprobs": _octets(logprobs.astype("<f8").view(np.uint8)),
        "bytepacked_indices": _octets(packed),
    }


def _octets(rows: np.ndarray) -> pa.Array:
    """Rows of bytes (R, B) as a list of lists."""
    ends = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    return pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), pa.array(rows.ravel()))


def _lists(rows: list[dict[str, pa.Array]], field: pa.Field) -> pa.Array:
    """A column of several sequences."""
    parts = [row[field.name] for row in rows]
    ends = np.cumsum([0, *(len(part) for part in parts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.concat_arrays(parts), type=field.type)
