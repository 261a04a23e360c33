"""Sequences as they are sent: record batches, a row for each sequence.

Of each kind they have the columns

    KIND.rows      int32    how many rows the arrays have
    KIND.layout    int32    which layout, of those that were sent so far in the stream
    KIND.checksum  uint32   CRC-32 of the record
    KIND.record    binary   the arrays in few bytes (see `reading.packed`)
    KIND.texts     binary   of a kind that has texts, an Arrow stream of these columns

and beside them, as JSON, the layouts that are new in the stream, if there are any. They are the same for all sequences of a row
group.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from knowledge_store.errors import DamageError
from knowledge_store.format.manifest import Manifest
from knowledge_store.kinds import KINDS, Arrays
from knowledge_store.reading.packed import Layout, Packed, pack

_NUMBERS = {"rows": pa.int32(), "layout": pa.int32(), "checksum": pa.uint32()}
_RECORD, _TEXTS = "record", "texts"


class _Stream:
    """What both ends know of a stream before it begins.

    Args:
        manifest: of the dump.
        kinds: which kinds are sent.

    Attributes:
        kinds: the same.
        fillers: what pads the rows of arrays.
        texts: the columns that are texts, of the kinds that have some.
        schema: of the record batches.
    """

    def __init__(self, manifest: Manifest, kinds: Sequence[str]):
        self.kinds = tuple(kinds)
        arrays = {kind: KINDS[kind].arrays(manifest) for kind in kinds}
        self.fillers = {name: filler for of_kind in arrays.values() for name, filler in of_kind.items()}
        self.texts = {
            kind: pa.schema([field.column for field in KINDS[kind].fields(manifest) if field.is_text])
            for kind in kinds
            if KINDS[kind].has_text(manifest)
        }
        columns: list[tuple[str, pa.DataType]] = [("sequence_id", pa.int64())]
        for kind in kinds:
            names = [_RECORD, _TEXTS] if kind in self.texts else [_RECORD]
            columns += [(f"{kind}.{name}", dtype) for name, dtype in _NUMBERS.items()]
            columns += [(f"{kind}.{name}", pa.large_binary()) for name in names]
        self.schema = pa.schema(columns)


class Encoder:
    """Makes the record batches of one stream.

    Args:
        manifest: of the dump.
        kinds: which kinds are sent.
    """

    def __init__(self, manifest: Manifest, kinds: Sequence[str]):
        self._stream = _Stream(manifest, kinds)
        self._layouts: dict[str, int] = {}

    @property
    def schema(self) -> pa.Schema:
        """Of the record batches."""
        return self._stream.schema

    def batch(self, sequences: Sequence[tuple[int, Mapping[str, Packed | Arrays]]]) -> tuple[pa.RecordBatch, bytes | None]:
        """A record batch of sequences (see `DumpReader.packed`), and the layouts that are new."""
        before = len(self._layouts)
        columns: list[Any] = [pa.array([sequence_id for sequence_id, _ in sequences], pa.int64())]
        for kind in self._stream.kinds:
            packed = [self._packed(kind, knowledge[kind]) for _, knowledge in sequences]
            numbers = zip(*((each.rows, self._number(each.layout), each.checksum) for each in packed), strict=True)
            columns += [pa.array(values, dtype) for values, dtype in zip(numbers, _NUMBERS.values(), strict=True)]
            columns.append(_binary([each.record for each in packed]))
            if kind in self._stream.texts:
                columns.append(pa.array([self._text(kind, knowledge[kind]) for _, knowledge in sequences], pa.large_binary()))
        new = list(self._layouts)[before:]
        return pa.RecordBatch.from_arrays(columns, schema=self.schema), f"[{','.join(new)}]".encode() if new else None

    def _packed(self, kind: str, known: Packed | Arrays) -> Packed:
        if isinstance(known, Packed):
            return known
        texts = self._stream.texts.get(kind, pa.schema([])).names
        numbers = {name: array for name, array in known.items() if name not in texts}
        if not numbers:
            return Packed(Layout([], {}, 0), len(next(iter(known.values()))), bytearray(), 0)
        return pack(numbers, self._stream.fillers)

    def _text(self, kind: str, known: Any) -> bytes:
        schema = self._stream.texts[kind]
        table = pa.table([pa.array(list(known[field.name]), field.type) for field in schema], schema=schema)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as writer:
            writer.write_table(table)
        return bytes(sink.getvalue().to_pybytes())

    def _number(self, layout: Layout) -> int:
        return self._layouts.setdefault(layout.text, len(self._layouts))


def packed_bytes(known: Packed | Arrays) -> int:
    """About how many bytes are sent of one kind of a sequence."""
    if isinstance(known, Packed):
        return len(known.record)
    return sum(array.nbytes if isinstance(array, np.ndarray) else len(str(array)) for array in known.values())


def _binary(records: Sequence[bytes | bytearray | memoryview]) -> pa.Array:
    """An array of them, copied once."""
    offsets = np.zeros(len(records) + 1, np.int64)
    np.cumsum([len(record) for record in records], out=offsets[1:])
    data = pa.py_buffer(b"".join(records))
    return pa.Array.from_buffers(pa.large_binary(), len(records), [None, pa.py_buffer(offsets), data])


class Decoder:
    """Reads the record batches of one stream, in their order (arguments as of `Encoder`)."""

    def __init__(self, manifest: Manifest, kinds: Sequence[str]):
        self._stream = _Stream(manifest, kinds)
        self._layouts: list[Layout] = []

    def received(self, batch: pa.RecordBatch, layouts: pa.Buffer | None) -> Received:
        """A record batch that came, and what came beside it.

        Raises:
            DamageError: it is none.
        """
        if layouts is not None:
            try:
                records = json.loads(layouts.to_pybytes())
                self._layouts += [Layout.from_record(record, self._stream.fillers) for record in records]
            except (KeyError, TypeError, ValueError) as error:
                raise _no_sequences(error) from None
        if batch.schema != self._stream.schema:
            raise DamageError("what the server sent are no sequences: its columns are others")
        return Received(self._stream, self._layouts, batch)


class Received:
    """Sequences that came, not unpacked yet (arguments as of `Decoder`)."""

    def __init__(self, stream: _Stream, layouts: Sequence[Layout], batch: pa.RecordBatch):
        self._stream, self._layouts, self._batch = stream, layouts, batch

    def __len__(self) -> int:
        return int(self._batch.num_rows)

    def sequences(self, start: int, stop: int) -> list[tuple[int, dict[str, Arrays]]]:
        """The ids of some of them and, of each kind, their arrays: views of what came, which cannot be changed, where nothing
        has to be decoded.

        Raises:
            DamageError: they are not what was sent.
        """
        columns = iter(self._batch.slice(start, stop - start).columns)
        try:
            found: list[tuple[int, dict[str, Arrays]]] = [(number, {}) for number in next(columns).to_pylist()]
            for kind in self._stream.kinds:
                rows, layouts, checksums = (next(columns).to_pylist() for _ in _NUMBERS)
                records, texts = next(columns), next(columns) if kind in self._stream.texts else None
                for place, (record, (_, knowledge)) in enumerate(zip(_parts(records), found, strict=True)):
                    if zlib.crc32(record) != checksums[place]:
                        raise DamageError("a sequence came otherwise than it was sent: its checksum differs")
                    knowledge[kind] = arrays = self._layouts[layouts[place]].arrays(record, rows[place])
                    if texts is not None:
                        table = pa.ipc.open_stream(texts[place].as_py()).read_all()
                        arrays |= {name: table[name].to_pylist() for name in table.column_names}
        except (KeyError, IndexError, TypeError, ValueError, pa.ArrowException) as error:
            raise _no_sequences(error) from None
        return found


def _parts(binary: pa.Array) -> Iterator[memoryview]:
    """The values of an array of bytes, where they stand."""
    _, offsets, data = binary.buffers()
    places = np.frombuffer(offsets, np.int64, len(binary) + 1, 8 * binary.offset).tolist()
    whole = memoryview(data if data is not None else b"")
    return (whole[start:end] for start, end in pairwise(places))


def _no_sequences(error: Exception) -> DamageError:
    return DamageError(f"what the server sent are no sequences: {type(error).__name__}: {error}")


def received_bytes(batch: pa.RecordBatch) -> int:
    """Bytes of what a record batch holds."""
    return int(batch.nbytes)
