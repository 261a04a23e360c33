"""What `--kind hidden` takes on disk, what it loses, and how fast it is written and read.

    python -m benchmarks.hidden_states --teacher FOLDER --gguf-file FILE.gguf --text FILE.txt

The teacher's last hidden states of a text are packed and written as a shard keeps them, and read again. The head is asked about
what was read and about the states themselves: KL(itself ‖ read), in nats, and how often the likeliest token is the same. The
*relative error* is ‖read − state‖ / ‖state‖, over positions. Seconds are those of one core's processor, without the teacher.
"""

from __future__ import annotations

import argparse
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.measurement import keep
from knowledge_store import Manifest
from knowledge_store.format.parquet import write_table
from knowledge_store.kinds.hidden import HIDDEN, PRECISIONS, HiddenParameters
from teacher_dump.corpus.documents import Document
from teacher_dump.corpus.tokenisation import TokenSequence
from teacher_dump.dumping.batches import batch_arrays
from teacher_dump.extraction import EXTRACTORS, ExtractionBatch
from teacher_dump.teachers.local import LocalTeacher, load_teacher
from teacher_dump.teachers.protocol import Prediction

HEAD_ROWS = 256  # positions whose logits are held at once


def measure(
    teacher: LocalTeacher, sequences: list[TokenSequence], predictions: list[Prediction], precision: str
) -> dict[str, Any]:
    """The figures of one precision."""
    parameters = HiddenParameters(where="all", precision=precision)
    manifest = Manifest(
        "figures", {"hidden": parameters.to_record()}, teacher.description, {"size": teacher.vocabulary_size}, {"files": []},
        {"max_length": 512}, {"documents": 1, "columns": {}, "shards": [{"document": 0}]},
    )  # fmt: skip
    count, written, read = sum(len(each.token_ids) for each in sequences), 0.0, 0.0
    tables = []
    for number, (sequence, prediction) in enumerate(zip(sequences, predictions, strict=True)):
        started = time.thread_time()
        [arrays] = EXTRACTORS["hidden"].function(ExtractionBatch([sequence], prediction, parameters))
        length = len(sequence.token_ids)
        keys = pa.table({"sequence_id": np.full(length, number << 16), "position": np.arange(length, dtype=np.int32)})
        tables.append(HIDDEN.pack(keys, arrays, manifest))
        written += time.thread_time() - started
    started = time.thread_time()
    file = io.BytesIO()
    size = write_table(file, tables[0].schema, [pa.concat_tables(tables).combine_chunks()], HIDDEN.columns(manifest))
    written += time.thread_time() - started
    started = time.thread_time()
    stored = pq.read_table(io.BytesIO(file.getvalue()), use_threads=False)
    kept = torch.from_numpy(HIDDEN.decode(HIDDEN.unpack(stored, manifest), manifest)["hidden"])
    read = time.thread_time() - started
    exact = torch.cat([prediction.layer_states(-1)[0].float() for prediction in predictions])
    errors = (kept - exact).norm(dim=1) / exact.norm(dim=1)
    divergence, same = 0.0, 0
    head = teacher.model.get_output_embeddings()
    with torch.inference_mode():
        for start in range(0, count, HEAD_ROWS):
            part = slice(start, start + HEAD_ROWS)
            truth, other = (head(rows[part]).float().log_softmax(dim=1) for rows in (exact, kept))
            divergence += float((truth.exp() * (truth - other)).sum())
            same += int((truth.argmax(dim=1) == other.argmax(dim=1)).sum())
    return {
        "bytes_per_position": round(sum(size.column_bytes.values()) / count, 1),
        "kl_through_the_head_nats": float(f"{divergence / count:.3g}"),
        "top_1_same": round(same / count, 4),
        "relative_error_mean": float(f"{errors.mean():.3g}"),
        "relative_error_most": float(f"{errors.max():.3g}"),
        "positions_per_second_written": round(count / written),
        "positions_per_second_read": round(count / read),
    }


def main() -> None:
    """Measure both precisions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--gguf-file")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=16, help="of 512 tokens")
    options = parser.parse_args()
    teacher = load_teacher(options.teacher, options.gguf_file, device="cpu")
    text = options.text.read_text()[: 4096 * options.sequences]
    tokens = np.array(teacher.tokenizer(text, add_special_tokens=False)["input_ids"][: 512 * options.sequences])
    sequences = [
        TokenSequence(Document(number, 0, 1, 0, 0), 0, part, np.ones(len(part), bool))
        for number, part in enumerate(np.split(tokens, range(512, len(tokens), 512)))
    ]
    figures: dict[str, Any] = {
        "teacher": teacher.description["name"], "width": teacher.description["hidden_size"], "positions": len(tokens),
    }  # fmt: skip
    predictions = [teacher.predict(*batch_arrays([each.token_ids]), layers=(-1,)) for each in sequences]
    figures |= {precision: measure(teacher, sequences, predictions, precision) for precision in PRECISIONS}
    keep("hidden_states", figures)


if __name__ == "__main__":
    main()
