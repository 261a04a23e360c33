"""A scan of files that are far away: the bytes of its columns are on the way before it asks for them.

Arrow asks for the columns of one row group after the other, and waits for each. Whoever starts a scan says which columns it
needs and which rows, so the ranges are known as soon as a footer is: they are asked for on threads, in the scan's order, each
once, UNITS at most on the way or waiting. What was not foreseen is read when it is asked for.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from knowledge_store.errors import KnowledgeStoreError
from knowledge_store.format.integrity import BLOCK_BYTES, FOOTER_FACTS, CheckedFile, TableFile

THREADS = 8
UNITS = 32  # on the way, or here and not asked for yet
UNIT_BYTES = 2**20  # of one request, when more lies together
FOOTERS = 8  # files whose footers are on the way, before their row groups are


class Unit:
    """Bytes of a file from one place to another, once they were asked for, and until they were used."""

    def __init__(self, start: int, end: int):
        self.start, self.end = start, end
        self.data: Future[bytes] | None = None
        self.used = False


class ScanAhead:
    """What a scan of some files is going to read.

    Args:
        files: in the order of the scan.
        columns: names of those that are read.
        condition: of the rows; row groups whose statistics exclude it are not read.
        schema: of the scan.
        file_format: of the files.
    """

    def __init__(
        self,
        files: list[TableFile],
        columns: set[str],
        condition: ds.Expression | None,
        schema: pa.Schema,
        file_format: ds.ParquetFileFormat,
    ):
        self._files, self._columns, self._condition = files, columns, condition
        self._schema, self._format = schema, file_format
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="scan ahead")
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        self._lock = threading.RLock()
        self._plans: dict[int, Future[tuple[CheckedFile, list[Unit]]]] = {}
        self._coming = 0
        self._file = self._unit = 0  # that are asked for next

    def plan(self, number: int) -> Future[tuple[CheckedFile, list[Unit]]]:
        """A file whose footer was read, and what is going to be read of it, in order."""
        with self._lock:
            if number not in self._plans:
                self._plans[number] = self._pool.submit(self._planned, self._files[number])
                fill = weakref.WeakMethod(self._fill)  # nothing keeps a scan that is over
                self._plans[number].add_done_callback(lambda _: (method := fill()) and method())
            return self._plans[number]

    def _planned(self, file: TableFile) -> tuple[CheckedFile, list[Unit]]:
        checked = CheckedFile(file)
        metadata = checked.open()
        fragment = self._format.make_fragment(pa.PythonFile(checked.again(), mode="r"))
        if self._condition is not None:
            fragment = fragment.subset(filter=self._condition, schema=self._schema)
        groups = [metadata.row_group(group.id) for group in fragment.row_groups]
        chunks = [group.column(index) for group in groups for index in range(metadata.num_columns)]
        wanted = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in self._columns]
        return checked, list(_units(_ranges(wanted), checked.unknown))

    def _fill(self) -> None:
        """Ask for what comes next, as far as there is room."""
        with self._lock:
            while self._coming < UNITS and self._file < len(self._files):
                plan = self.plan(self._file)
                if not plan.done():
                    for following in range(self._file + 1, min(self._file + FOOTERS, len(self._files))):
                        self.plan(following)
                    return
                units = plan.result()[1] if plan.exception() is None else []
                if self._unit < len(units):
                    if not units[self._unit].used:
                        self._ask(self._file, units[self._unit])
                    self._unit += 1
                else:
                    self._file, self._unit = self._file + 1, 0

    def _ask(self, number: int, unit: Unit) -> Future[bytes]:
        if unit.data is None:
            file = self._files[number]
            unit.data = self._pool.submit(file.storage.read, file.name, unit.start, unit.end)
            self._coming += 1
        return unit.data

    def read(self, number: int, start: int, end: int) -> bytes:
        """Bytes of a file, as they came, unchecked."""
        units = self.plan(number).result()[1]
        file = self._files[number]
        parts: list[bytes] = []
        place = start
        for index, unit in enumerate(units):
            if unit.end <= place or unit.used:
                continue
            if unit.start >= end:
                break
            if unit.start > place:
                parts.append(file.storage.read(file.name, place, unit.start))
                place = unit.start
            with self._lock:
                future = self._ask(number, unit)
            data = future.result()
            parts.append(data[place - unit.start : end - unit.start])
            place = min(unit.end, end)
            if place == unit.end:
                # Where another one follows at once, its last block may be asked for again, with what follows.
                if index and units[index - 1].end == unit.start:
                    self._let_go(units[index - 1])
                if index + 1 == len(units) or units[index + 1].start > unit.end:
                    self._let_go(unit)
        if place < end:
            parts.append(file.storage.read(file.name, place, end))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _let_go(self, unit: Unit) -> None:
        with self._lock:
            if not unit.used:
                unit.used, unit.data = True, None
                self._coming -= 1
        self._fill()


def _ranges(chunks: list[Any]) -> Iterator[tuple[int, int]]:
    """Where columns of row groups are in a file."""
    for chunk in chunks:
        offset = chunk.dictionary_page_offset if chunk.has_dictionary_page else None
        start = chunk.data_page_offset if offset is None else min(offset, chunk.data_page_offset)
        yield start, start + chunk.total_compressed_size


def _units(ranges: Iterator[tuple[int, int]], known: int) -> Iterator[Unit]:
    """Whole blocks around ranges of a file, each block once, of up to UNIT_BYTES; what is from `known` on is here already."""
    runs: list[list[int]] = []
    for start, end in sorted(ranges):
        if start >= known:
            continue
        first, last = start // BLOCK_BYTES * BLOCK_BYTES, min(-(-end // BLOCK_BYTES) * BLOCK_BYTES, known)
        if runs and first <= runs[-1][1]:
            runs[-1][1] = max(runs[-1][1], last)
        else:
            runs.append([first, last])
    for start, end in runs:
        for place in range(start, end, UNIT_BYTES):
            yield Unit(place, min(place + UNIT_BYTES, end))


class AheadFile(CheckedFile):
    """A file of a scan whose bytes come from what is on the way."""

    def __init__(self, ahead: ScanAhead, number: int, file: TableFile, errors: list[KnowledgeStoreError]):
        super().__init__(file, errors)
        self._ahead, self._number = ahead, number

    def _checked(self, start: int, end: int) -> memoryview:
        if "_footer" not in self.__dict__:
            planned = self._ahead.plan(self._number).result()[0]
            self.__dict__ |= {name: value for name, value in planned.__dict__.items() if name in FOOTER_FACTS}
        return super()._checked(start, end)

    def _stored(self, start: int, end: int) -> bytes:
        return self._ahead.read(self._number, start, end)


class FarDataset(ds.FileSystemDataset):
    """An Arrow dataset over files that are far away, as whom DuckDB scans it."""

    def __init__(self, files: list[TableFile], schema: pa.Schema, file_format: ds.ParquetFileFormat, errors: list[Any]):
        fragments = [file_format.make_fragment(pa.PythonFile(CheckedFile(file, errors), mode="r")) for file in files]
        super().__init__(fragments, schema, file_format)
        self._files, self._errors = files, errors

    def scanner(self, *, columns: Any = None, filter: ds.Expression | None = None, **options: Any) -> ds.Scanner:
        """A scan of some columns (names, None for all) of the rows for which a condition holds."""
        # Arrow does not say which columns a condition is of; one too many costs time alone.
        words = set(re.findall(r"\w+", str(filter))) if filter is not None else set()
        names = set(self.schema.names) if columns is None else {*columns} | (words & set(self.schema.names))
        ahead = ScanAhead(self._files, names, filter, self.schema, self.format)
        files = [AheadFile(ahead, number, file, self._errors) for number, file in enumerate(self._files)]
        fragments = [self.format.make_fragment(pa.PythonFile(file, mode="r")) for file in files]
        return ds.FileSystemDataset(fragments, self.schema, self.format).scanner(columns=columns, filter=filter, **options)
