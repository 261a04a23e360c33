"""Sequences as they are sent: a record batch for each batch that was asked for, a row for each sequence.

Of each kind it has the columns

    KIND.rows      int32    how many rows the arrays have
    KIND.layout    int32    which layout, of those that were sent so far in the stream
    KIND.checksum  uint32   CRC-32 of the record
    KIND.record    binary   the arrays in few bytes (see `reading.packed`)
    KIND.texts     binary   an Arrow stream of the columns that are texts; null where there are none

and beside it, as JSON, the layouts that are new in the stream. They are the same for all sequences of a row group.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from knowledge_store.errors import DamageError
from knowledge_store.format.manifest import Manifest
from knowledge_store.kinds import KINDS, Arrays
from knowledge_store.reading.packed import Layout, Packed, pack

_COLUMNS = {"rows": pa.int32(), "layout": pa.int32(), "checksum": pa.uint32(), "record": pa.large_binary()}
_TEXTS = "texts"


def stream_schema(kinds: Sequence[str]) -> pa.Schema:
    """The columns of a stream of some kinds."""
    of_kinds = [(f"{kind}.{name}", dtype) for kind in kinds for name, dtype in {**_COLUMNS, _TEXTS: pa.large_binary()}.items()]
    return pa.schema([("sequence_id", pa.int64()), *of_kinds])


class Encoder:
    """Makes the record batches of one stream.

    Args:
        manifest: of the dump.
        kinds: which kinds are sent.
    """

    def __init__(self, manifest: Manifest, kinds: Sequence[str]):
        self.schema = stream_schema(kinds)
        self._kinds = kinds
        self._fillers = {name: filler for kind in kinds for name, filler in KINDS[kind].arrays(manifest).items()}
        self._texts = {
            kind: pa.schema([field.column for field in KINDS[kind].fields(manifest) if field.is_text])
            for kind in kinds
            if KINDS[kind].has_text(manifest)
        }
        self._layouts: dict[str, int] = {}

    def batch(self, sequences: Sequence[tuple[int, Mapping[str, Packed | Arrays]]]) -> tuple[pa.RecordBatch, bytes]:
        """A record batch of sequences (see `DumpReader.packed`), and the layouts that are new."""
        before = len(self._layouts)
        columns: list[Any] = [pa.array([sequence_id for sequence_id, _ in sequences], pa.int64())]
        for kind in self._kinds:
            packed, texts = zip(*(self._packed(kind, knowledge[kind]) for _, knowledge in sequences), strict=True)
            values = {
                "rows": [each.rows for each in packed],
                "layout": [self._number(each.layout) for each in packed],
                "checksum": [each.checksum for each in packed],
                "record": [bytes(each.record) for each in packed],
            }
            columns += [pa.array(values[name], dtype) for name, dtype in _COLUMNS.items()]
            columns.append(pa.array(texts, pa.large_binary()))
        new = list(self._layouts)[before:]
        return pa.RecordBatch.from_arrays(columns, schema=self.schema), f"[{','.join(new)}]".encode()

    def _packed(self, kind: str, known: Packed | Arrays) -> tuple[Packed, bytes | None]:
        if isinstance(known, Packed):
            return known, None
        if kind not in self._texts:
            return pack(known, self._fillers), None
        schema = self._texts[kind]
        numbers = {name: array for name, array in known.items() if name not in schema.names}
        table = pa.table([pa.array(list(known[field.name]), field.type) for field in schema], schema=schema)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as writer:
            writer.write_table(table)
        packed = pack(numbers, self._fillers) if numbers else Packed(Layout([], {}, 0), len(table), bytearray(), 0)
        return packed, sink.getvalue().to_pybytes()

    def _number(self, layout: Layout) -> int:
        return self._layouts.setdefault(json.dumps(layout.to_record(), separators=(",", ":")), len(self._layouts))


class Decoder:
    """Reads the record batches of one stream (arguments as of `Encoder`)."""

    def __init__(self, manifest: Manifest, kinds: Sequence[str]):
        self._kinds = kinds
        self._manifest = manifest
        self._fillers = {name: filler for kind in kinds for name, filler in KINDS[kind].arrays(manifest).items()}
        self._layouts: list[Layout] = []

    def batch(self, batch: pa.RecordBatch, layouts: bytes) -> list[tuple[int, dict[str, Received]]]:
        """The sequences of a record batch, not unpacked yet.

        Raises:
            DamageError: it is none, or is not what was sent.
        """
        try:
            self._layouts += [Layout.from_record(record, self._fillers) for record in json.loads(layouts)]
            ids = batch["sequence_id"].to_pylist()
            found: list[tuple[int, dict[str, Received]]] = [(sequence_id, {}) for sequence_id in ids]
            for kind in self._kinds:
                rows, numbers, checksums = (batch[f"{kind}.{name}"].to_pylist() for name in ("rows", "layout", "checksum"))
                records, texts = batch[f"{kind}.record"], batch[f"{kind}.{_TEXTS}"]
                for place, (_, knowledge) in enumerate(found):
                    record = bytearray(records[place].as_buffer())
                    packed = Packed(self._layouts[numbers[place]], rows[place], record, checksums[place])
                    knowledge[kind] = Received(packed, texts[place].as_py(), kind, self._manifest)
        except (KeyError, IndexError, TypeError, ValueError, pa.ArrowException) as error:
            raise DamageError(f"what the server sent are no sequences: {type(error).__name__}: {error}") from None
        return found


class Received:
    """What came of one kind of a sequence."""

    def __init__(self, packed: Packed, texts: bytes | None, kind: str, manifest: Manifest):
        self._packed, self._texts, self._kind, self._manifest = packed, texts, kind, manifest

    def arrays(self) -> Arrays:
        """Its arrays, which belong to the caller; in the order in which the kind declares them.

        Raises:
            DamageError: they are not what was sent.
        """
        if not self._packed.sound:
            raise DamageError("a sequence came otherwise than it was sent: its checksum differs")
        try:
            arrays = self._packed.arrays()
            if self._texts is not None:
                table = pa.ipc.open_stream(self._texts).read_all()
                arrays |= {name: table[name].to_pylist() for name in table.column_names}
            return {name: arrays[name] for name in KINDS[self._kind].arrays(self._manifest)}
        except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
            raise DamageError(f"what the server sent is no sequence: {type(error).__name__}: {error}") from None


def received_bytes(batch: pa.RecordBatch) -> int:
    """Bytes of what a record batch holds."""
    return int(np.sum([column.nbytes for column in batch.columns]))
