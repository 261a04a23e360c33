"""A dump's hidden states as files that `speculators` (vllm-project) trains draft models of speculative decoding from.

    FOLDER/
      export.json                     of which dump, and how: a stopped export goes on where it is the same
      hidden_states/hs_N.safetensors  of sample N: token_ids int64 (T,), hidden_states bfloat16 (T, L, H)
      data-00000-of-00001.arrow       a row for each sample: input_ids, loss_mask (1 at targets), seq_len
      dataset_info.json, state.json   what makes of this a data set on disk of the library `datasets`; written last

The last of the L layers is what the teacher's last layer gives *before* the last norm, which the trainer applies itself; it is
what the draft model is to predict from. The others are what the draft model is given. Sequences without a target are left out.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from knowledge_store.errors import InputError
from knowledge_store.format.manifest import Manifest
from knowledge_store.kinds import KINDS, Arrays
from knowledge_store.kinds.hidden import hidden_of
from knowledge_store.reporter import SILENT, Reporter

RECORD, STATES, ROWS, STATE = "export.json", "hidden_states", "data-00000-of-00001.arrow", "state.json"
UNFINISHED = ".unfinished"
INTEGERS = pa.list_(pa.int64())
ROW_SCHEMA = pa.schema({"input_ids": INTEGERS, "loss_mask": INTEGERS, "seq_len": pa.int64()})


def draft_layers(manifest: Manifest) -> tuple[int, ...]:
    """The layers of a dump's hidden states, counted from 0, the embeddings, where draft models can be trained from them.

    Raises:
        InputError: they cannot; says which states they need.
    """
    kept, count = hidden_of(manifest), manifest.teacher.get("layers")
    dump = manifest.dump
    if not isinstance(count, int):
        raise InputError(f"the dump {dump} does not say how many layers its teacher has: dump it anew")
    example = f"--hidden-layers {','.join(map(str, sorted({min(2, count - 1), count // 2, max(count - 3, 0), count})))}"
    example += " --hidden-where all"
    layers = tuple(layer if layer >= -1 else count + 1 + layer for layer in kept.layers)
    if len(layers) < 2 or layers[-1] != count or -1 in layers:
        raise InputError(
            f"the dump {dump} keeps the hidden states of {', '.join(map(str, kept.layers))}; speculators needs those of some"
            f" layers and, as the last, of layer {count}, before the teacher's last norm: dump with {example}"
        )
    if kept.where != "all" or kept.every != 1:
        raise InputError(
            f"the dump {dump} keeps hidden states at some positions, and speculators needs all: dump with {example}"
        )
    if not any("input_ids" in KINDS[kind].arrays(manifest) for kind in manifest.kinds):
        raise InputError(f"the dump {dump} does not hold its tokens: dump with --kind positions --kind hidden {example}")
    return layers


def export_speculators(
    manifest: Manifest,
    snapshot: int,
    sequences: int,
    read: Callable[[int], Arrays],
    output: Path,
    *,
    reporter: Reporter = SILENT,
) -> int:
    """Write a dump's hidden states for speculators; a stopped export goes on.

    Args:
        manifest, snapshot: of the dump.
        sequences: how many it has.
        read: a sequence by its ordinal, as `KnowledgeStore` gives it.
        output: the folder.
        reporter: hears of the progress.

    Returns:
        how many samples there are.

    Raises:
        InputError: the dump does not hold what is needed, the folder holds something else or cannot be written.
        DamageError: a file of the store is not what was published.
    """
    layers = draft_layers(manifest)
    record = {"dump": manifest.dump, "identity": manifest.identity(), "snapshot": snapshot, "layers": layers}
    written = json.dumps(record, indent=1, default=str)
    try:
        _begin(output, written)
        with _whole(output / ROWS) as file, reporter.progress("exporting hidden states", sequences, "sequences") as advance:
            samples = 0
            with pa.ipc.new_stream(file, ROW_SCHEMA) as writer:
                for ordinal in range(sequences):
                    sequence = read(ordinal)
                    if sequence["is_target"].any():
                        _write_states(output / STATES / f"hs_{samples}.safetensors", sequence, len(layers))
                        writer.write_batch(_row(sequence))
                        samples += 1
                    advance(1)
        _describe(output, hashlib.sha256(written.encode()).hexdigest()[:16])
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror or error}") from None
    return samples


def _begin(output: Path, record: str) -> None:
    """Make the folder, or make sure that the same export began there (InputError: it holds something else)."""
    path = output / RECORD
    if path.is_file() and path.read_text() == record and not (output / STATE).exists():
        return  # a run that was stopped
    if output.exists() and (not output.is_dir() or any(not file.name.endswith(UNFINISHED) for file in output.iterdir())):
        raise InputError(f"{output} exists already: name another folder, or remove it")
    if not output.parent.is_dir():
        raise InputError(f"there is no folder {output.parent}: make it, or name another folder")
    output.mkdir(exist_ok=True)
    with _whole(path) as file:
        file.write(record.encode())


@contextmanager
def _whole(path: Path) -> Iterator[Any]:
    """A file to write that has its name only once it is whole."""
    unfinished = path.with_name(f".{path.name}{UNFINISHED}")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_states(path: Path, sequence: Arrays, layers: int) -> None:
    """Write a sample's file, unless it is there."""
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    with _whole(path) as file:
        file.writelines(_safetensors(sequence, layers))


def _safetensors(sequence: Arrays, layers: int) -> Iterator[bytes]:
    """The parts of a file of a sample: the length of the header, the header, and the numbers."""
    tokens, states = sequence["input_ids"].astype("<i8"), sequence["hidden"].astype("<f4")
    length = len(tokens)
    numbers = {
        "hidden_states": ("BF16", (length, layers, states.shape[1] // layers), _bfloat16(states)),
        "token_ids": ("I64", (length,), tokens),
    }
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape, array) in numbers.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for _, _, array in numbers.values():
        yield array.tobytes()


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """Finite float32 numbers as the bits of bfloat16, rounded to the nearest, and to an even one between two."""
    bits = values.view("<u4")
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype("<u2")


def _row(sequence: Arrays) -> pa.RecordBatch:
    numbers = [sequence["input_ids"].astype(np.int64), sequence["is_target"].astype(np.int64)]
    return pa.record_batch([pa.array([row], INTEGERS) for row in numbers] + [pa.array([len(numbers[0])])], schema=ROW_SCHEMA)


def _describe(output: Path, fingerprint: str) -> None:
    """Write what makes of the rows a data set on disk."""
    value = {"dtype": "int64", "_type": "Value"}
    features = {field.name: value if field.type == pa.int64() else {"feature": value, "_type": "List"} for field in ROW_SCHEMA}
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    state: dict[str, Any] = {
        "_data_files": [{"filename": ROWS}], "_fingerprint": fingerprint, "_format_columns": None, "_format_kwargs": {},
        "_format_type": "torch", "_output_all_columns": False, "_split": None,
    }  # fmt: skip
    for name, content in (("dataset_info.json", info), (STATE, state)):
        with _whole(output / name) as file:
            file.write(json.dumps(content, indent=1).encode())
