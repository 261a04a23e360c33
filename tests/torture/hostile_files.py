"""Files made to do harm: sealed records and Parquet files whose hashes are right and whose contents are a stranger's.

All cases run in a process of their own, with a limit on its memory: whatever takes it down, or fails in any other way than with
an error of the project's own, is a broken promise.
"""

from __future__ import annotations

import faulthandler
import hashlib
import io
import json
import multiprocessing
import re
import resource
import shutil
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from stores import read_whole, write_drawn_store

from knowledge_store import KnowledgeStore, Manifest, read_calibration, verify, write_calibration
from knowledge_store.calibration.file import Calibration
from knowledge_store.catalogue.index import FILES, Index, refresh
from knowledge_store.errors import MAX_CHARACTERS, DamageError, KnowledgeStoreError
from knowledge_store.format.commits import read_commit
from knowledge_store.format.integrity import BLOCK_BYTES, DIGESTS_KEY, CheckedFile, GuardedFile, _digest, open_files
from knowledge_store.format.layout import SEQUENCES, TOKENS_FILE
from knowledge_store.format.manifest import read_manifest
from knowledge_store.format.pages import chunk_pages
from knowledge_store.format.parquet import dataset, describe, open_parquet, read_row_groups
from knowledge_store.format.records import SEAL, canonical_json, json_sha256, unseal
from knowledge_store.format.sequences import sequences_schema
from knowledge_store.kinds import KINDS, check_kinds
from knowledge_store.reading.reader import DumpReader, read_sequences, shard_files
from knowledge_store.sql.query import BATCH_ROWS, run_query
from torture import thrift

MEMORY_BYTES = 2 * 2**30  # of addresses, beyond those of libraries and reserves
MAX_GROWTH = 2**29
STRANGE = [
    None,
    True,
    0,
    -1,
    2**31,
    2**63 - 1,
    -(2**63),
    2**70,
    1e308,
    5e-324,
    -0.0,
    "",
    "../../../escaped",
    "/etc/passwd",
    "\x1b[2J\x1b]0;\x07",
    "x" * 5000,
    "\u202e\0",
    [],
    {},
    [None],
    {"": {}},
    ["positions", "positions"],
    {"name": "random-sampling", "draws": 65535},
]


def run(seed: int, minutes: float, folder: Path, trials: int | None = None) -> dict[str, int]:
    """Read hostile files until the minutes are over, or so many were read.

    Returns:
        faults: cases; survived: ended with an answer or with an error of the project's own; silent: a record that was altered
        and read as if it was not (raised, so 0); refused: with an error; json, parquet, bombs: cases of each sort; mebibytes:
        most memory held since the last bomb.

    Raises:
        AssertionError: a case ended in any other way, or was not let go.
    """
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "counts.json"
    result.unlink(missing_ok=True)
    process = multiprocessing.get_context("spawn").Process(target=_cases, args=(seed, minutes, folder, result, trials))
    process.start()
    process.join(60 * minutes + 120)
    stuck = process.is_alive()
    if stuck:
        process.kill()
        process.join()
    case = (folder / "case").read_text() if (folder / "case").exists() else "before the first"
    again = f"run({seed}, {minutes}, folder); what it read is in {folder}"
    assert not stuck, f"case {case} did not end: {again}"
    assert process.exitcode == 0, f"case {case} ended the process ({process.exitcode}): {again}"
    counts: dict[str, int] = json.loads(result.read_text())
    assert "failure" not in counts, f"case {case}: {counts.get('failure')}: {again}"
    return counts


def _cases(seed: int, minutes: float, folder: Path, result: Path, trials: int | None) -> None:
    faulthandler.enable()
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    counts: Counter[str] = Counter(dict.fromkeys(("faults", "survived", "refused", "silent", "json", "parquet", "bombs"), 0))
    world = World(folder / "work", np.random.default_rng(seed))
    world.bombs()  # to make one takes what to read one must not
    pa.default_memory_pool().release_unused()
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    most_memory(forget=True)
    until = time.monotonic() + 60 * minutes
    place = open(folder / "case", "w")  # noqa: SIM115 — open until the process ends
    try:
        for sort, case in world.all_cases():
            place.seek(0)
            place.write(f"{counts['faults']} ({sort})        ")
            place.flush()
            counts["faults"] += 1
            counts[sort] += 1
            counts[tried(case)] += 1
            counts["survived"] += 1
            if time.monotonic() > until or counts["faults"] == trials:
                break
    except BaseException as error:
        import traceback

        result.write_text(json.dumps({**counts, "failure": "".join(traceback.format_exception(error))[-3000:]}))
        raise SystemExit(0) from None
    counts["mebibytes"] = most_memory() // 2**20
    del counts["read"]
    result.write_text(json.dumps(counts))


def tried(case: Callable[[], object]) -> str:
    """Run a case: "read", or "refused" with an error of the project's own. Anything else is raised."""
    try:
        case()
    except KnowledgeStoreError as error:
        message = " ".join(str(error).split())
        assert message and len(message) <= MAX_CHARACTERS + 1, f"no message for a person: {message[:200]!r}"
        # Memory that could not be had was asked for: a smaller bomb would have had it.
        assert not any(word in message.lower() for word in ("malloc", "unable to allocate", "out of memory")), message
        return "refused"
    return "read"


class World:
    """A small sound store, and every way to spoil it."""

    def __init__(self, folder: Path, random: np.random.Generator):
        shutil.rmtree(folder, ignore_errors=True)
        self.random = random
        self._bombs: dict[tuple[str, str], bytes] = {}
        self.folder = folder
        self.store = write_drawn_store(folder / "store")
        self.dump = self.store / "small"
        self.manifest = read_manifest(self.dump)
        self.index = refresh(self.store, [read_manifest(self.store / "small")])
        figures = {"nll": 1.0, "ece_10": 0.1, "ece_15": 0.1, "brier": 0.5}
        self.calibration = folder / "calibration.json"
        calibration = Calibration(
            "temperature", 2.0, {"name": "t", "files": {"a.safetensors": "0" * 64}}, {"vocabulary_sha256": "0" * 64}, {}, 9,
            figures, figures,
        )  # fmt: skip
        write_calibration(self.calibration, calibration)
        self.records = {
            self.dump / "manifest.json": lambda: self.use_manifest(read_manifest(self.dump)),
            self.dump / "commits/00000.json": lambda: read_commit(self.dump / "commits/00000.json"),
            self.calibration: lambda: read_calibration(self.calibration),
        }
        self.sound = {path: path.read_bytes() for path in [*self.records, *self.store.rglob("*.parquet")]}
        self.tables = {
            SEQUENCES: self.dump / "sequences/00000.parquet",
            "positions": self.dump / "positions/00000.parquet",
            TOKENS_FILE: self.dump / TOKENS_FILE,
        }
        # As published, and not compressed: what is altered there reaches the decoders.
        self.bases = {
            name: [self.sound[path], _rewritten(path, compression="none"), _rewritten(path, compression="none", plain=True)]
            for name, path in self.tables.items()
        }

    def all_cases(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """Cases without end; each cleans up behind itself."""
        while True:
            for (table, _), data in self.bombs().items():
                yield "bombs", self.explode(data, self.read_file(table, data))
                if table != TOKENS_FILE:
                    yield "bombs", self.explode(data, self.read_table(table, data, "scan"))
            for _ in range(60):
                for _ in range(200):
                    yield "json", self.record_case()
                for _ in range(60):
                    yield "parquet", self.parquet_case()
                yield "json", self.whole_store_case()

    def bombs(self) -> dict[tuple[str, str], bytes]:
        """Files that stand for far more than they are, by table and name."""
        if not self._bombs:
            self._bombs = {("positions", bomb.__name__): bomb(self) for bomb in BOMBS}
            self._bombs |= {(table, "text"): text_bomb(self, table) for table in (SEQUENCES, TOKENS_FILE)}
        return self._bombs

    def explode(self, data: bytes, read: Callable[[], object]) -> Callable[[], object]:
        """Read all of a bomb; the memory that this takes is little, whatever is refused and whatever is read."""

        def case() -> object:
            pa.default_memory_pool().release_unused()
            before = most_memory(forget=True)
            try:
                return read()
            finally:
                grown = most_memory() - before
                assert grown < MAX_GROWTH, f"{grown:,} bytes more for a file of {len(data):,}"

        return case

    def read_file(self, table: str, data: bytes) -> Callable[[], object]:
        path = self.tables[table]
        return lambda: self.with_file(path, data, lambda: [read_whole(path)])

    # --- records ---

    def pick(self, values: list[Any]) -> Any:
        return values[int(self.random.integers(len(values)))]

    def record_case(self) -> Callable[[], object]:
        path = self.pick(list(self.records))
        kind = int(self.random.integers(4))
        if kind == 0:
            data = self.altered(self.sound[path])

            def case() -> object:
                found = unseal(data, path)
                assert canonical_json(found) == canonical_json(unseal(self.sound[path], path)), "silent: an altered record"
                return found

            return case
        record = json.loads(self.sound[path])
        del record["sha256"]
        for _ in range(int(self.random.integers(1, 3))):
            self.spoil(record)
        try:
            data = sealed(record)
        except ValueError:
            return lambda: None
        if kind == 1:
            data = self.hostile_text(data)
        return lambda: self.with_file(path, data, self.records[path])

    def spoil(self, record: Any) -> None:
        """Put something strange at a random place."""
        while True:
            keys = list(record) if isinstance(record, dict) else list(range(len(record)))
            if not keys:
                return
            key = self.pick(keys)
            if isinstance(record[key], (dict, list)) and record[key] and self.random.random() < 0.8:
                record = record[key]
                continue
            choice = self.random.random()
            if choice < 0.1 and isinstance(record, dict):
                del record[key]
            elif choice < 0.2:
                deep: Any = "deep"
                for _ in range(self.pick([10, 31, 33, 200, 400])):
                    deep = [deep] if self.random.random() < 0.5 else {"a": deep}
                record[key] = deep
            elif choice < 0.25 and isinstance(record, dict):
                record[str(self.pick(STRANGE))] = record[key]
            else:
                record[key] = self.pick(STRANGE)
            return

    def hostile_text(self, data: bytes) -> bytes:
        """JSON that parsers disagree about, or choke on."""
        text = data.decode()
        deep = self.pick([100, 1000, 100_000])
        return self.pick(
            [
                text.replace("{", '{"version": 1, "version": 2,', 1),
                text.replace(": 1", ": 1" + "0" * self.pick([20, 5000]), 1),
                text.replace(": 1", ": 1e999", 1),
                text.replace(": 1", ": NaN", 1),
                "[" * deep + "]" * deep,
                '{"a":' * deep + "1" + "}" * deep,
                text + text,
                "\ufeff" + text,
                text.replace("a", "\\ud800", 1),
            ]
        ).encode("utf-8", "surrogatepass")

    def with_file(self, path: Path, data: bytes, case: Callable[[], object]) -> object:
        path.write_bytes(data)
        try:
            return case()
        finally:
            path.write_bytes(self.sound[path])

    def use_manifest(self, manifest: Manifest) -> None:
        """What every reader does with a manifest that it takes for good."""
        assert unseal(manifest.to_bytes(), self.dump)
        manifest.differences(self.manifest)
        sequences_schema(manifest)
        check_kinds(manifest, str(self.store))
        assert manifest.shard_count >= 0
        for name in manifest.kinds:
            if name in KINDS:
                KINDS[name].stored_schema(manifest)
                KINDS[name].view(manifest)
        for file in shard_files(self.store, self.index, "small", "positions")[:1]:
            for table in read_row_groups(file.open(KINDS["positions"].stored_schema(self.manifest))):
                try:
                    KINDS["positions"].unpack(table, manifest)
                except (ValueError, LookupError):
                    continue

    def whole_store_case(self) -> Callable[[], object]:
        """One record spoilt, and all that a person may do with the store."""
        path = self.pick([path for path in self.records if path != self.calibration])
        record = json.loads(self.sound[path])
        del record["sha256"]
        self.spoil(record)
        doing = int(self.random.integers(5))

        def case() -> object:
            if doing == 0:
                return verify(self.store)
            store = KnowledgeStore.open(self.store, cache_size=0, rebuild_index=True)
            if doing == 1:
                return store.info()
            if doing == 2:
                return [store[0], store.sequences(), store.tokens()]
            if doing == 3:
                return store.sql("SELECT * FROM positions JOIN sequences USING (sequence_id)")
            return [store.sql("SELECT * FROM shards"), store.sql("SELECT * FROM dumps"), next(iter(store.batches()))]

        try:
            data = sealed(record)
        except ValueError:
            return lambda: None
        return lambda: self.with_file(path, data, case)

    # --- Parquet ---

    def altered(self, data: bytes) -> bytes:
        """Some bytes flipped, replaced, taken out, put in or moved."""
        changed = bytearray(data)
        for _ in range(int(self.random.integers(1, 4))):
            at = int(self.random.integers(len(changed) or 1))
            size = int(self.random.integers(1, 9))
            kind = int(self.random.integers(6))
            if kind == 0:
                changed[at : at + 1] = bytes([changed[at] ^ 1 << int(self.random.integers(8))]) if changed else b"\0"
            elif kind == 1:
                changed[at : at + size] = self.random.bytes(min(size, len(changed) - at))
            elif kind == 2:
                changed[at : at + size] = self.pick([b"\xff", b"\0", b"\x7f", b"\x80"]) * min(size, len(changed) - at)
            elif kind == 3:
                del changed[at : at + size]
            elif kind == 4:
                changed[at:at] = self.random.bytes(size)
            else:
                del changed[at:]
        return bytes(changed)

    def parquet_case(self) -> Callable[[], object]:
        name = self.pick(list(self.tables))
        base = self.pick(self.bases[name])
        kind = self.random.random()
        if kind < 0.3:
            data = self.altered(base)
        elif kind < 0.6:
            length = int.from_bytes(base[-8:-4], "little")
            footer = base[-8 - length : -8]
            footer = self.altered(footer) if kind < 0.4 else self.altered_tree(footer)
            data = base[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1"
        elif kind < 0.9:
            data = self.altered_page(name, base)
        else:
            data = self.wrong_table(name)
        way = self.random.random()
        return self.read_table(name, data, "sql" if way < 0.05 else "scan" if way < 0.4 else "sequences")

    def altered_tree(self, footer: bytes) -> bytes:
        """A footer that is sound Thrift still: values, types, numbers of fields and lists altered."""
        tree, _ = thrift.parse(footer)
        for _ in range(int(self.random.integers(1, 3))):
            values = list(tree.walk())
            found = self.pick(values)
            numbers = [each.value for each in values if each.kind in thrift.INTEGERS]
            if found.kind in thrift.INTEGERS:
                strange = [0, 1, -1, 4, 2**31 - 1, 2**31, 2**32 + found.value, 2**62, -(2**63), self.pick(numbers)]
                found.value = self.pick([*strange, found.value + 1, 2 * found.value])
                found.kind = self.pick([*[found.kind] * 4, *thrift.INTEGERS])
            elif found.kind == thrift.BINARY:
                found.value = self.pick(
                    [b"", found.value[:-1], found.value + b"x", self.random.bytes(len(found.value)), b"token_id"]
                )
            elif found.value and isinstance(found.value, list):
                at = int(self.random.integers(len(found.value)))
                way = int(self.random.integers(4))
                if way == 0:
                    del found.value[at]
                elif way == 1:
                    found.value.insert(at, found.value[at])
                elif found.kind == thrift.STRUCT:
                    number, value = found.value[at]
                    found.value[at] = [self.pick([number + 65536, number + 1, int(self.random.integers(1, 20))]), value]
                else:
                    found.value.reverse()
        return thrift.written(tree)

    def altered_page(self, name: str, base: bytes) -> bytes:
        """A page's bytes altered, its checksum put right."""
        path = self.folder / "page.parquet"
        path.write_bytes(base)
        record = describe(path)
        file = CheckedFile(path, record.bytes, record.sha256, record.footer_sha256)
        chunk = self.pick(self.pick(file.stated().groups).chunks)
        pages = list(chunk_pages(file, chunk.start, chunk.compressed))
        page = self.pick(pages)
        body = bytearray(base[page.start : page.start + page.compressed])
        if not body:
            return base
        for _ in range(int(self.random.integers(1, 4))):
            body[int(self.random.integers(len(body)))] = self.pick([0, 1, 0x7F, 0x80, 0xFF, int(self.random.integers(256))])
        header_start = max(at for at in [chunk.start, *(each.start + each.compressed for each in pages)] if at < page.start)
        header = base[header_start : page.start]
        if page.checksum is not None:
            header = header.replace(_zigzag(page.checksum), _zigzag(zlib.crc32(bytes(body))), 1)
            if len(header) != page.start - header_start:
                return base
        return base[:header_start] + header + bytes(body) + base[page.start + page.compressed :]

    def wrong_table(self, name: str) -> bytes:
        """A sound Parquet file of another table: columns missing, of another type or order, null, or with strange values."""
        table = pq.read_table(io.BytesIO(self.sound[self.tables[name]]))
        at = int(self.random.integers(table.num_columns))
        field = table.schema.field(at)
        kind = int(self.random.integers(6))
        if kind == 0:
            table = table.drop_columns([field.name])
        elif kind == 1:
            table = table.rename_columns([f"{each}x" if each == field.name else each for each in table.column_names])
        elif kind == 2:
            table = table.set_column(at, pa.field(field.name, field.type), pa.nulls(len(table), field.type))
        elif kind == 3:
            other = self.pick([pa.int8(), pa.string(), pa.list_(pa.list_(pa.int32())), pa.float64(), pa.timestamp("us")])
            table = table.set_column(at, field.name, pa.nulls(len(table), other))
        elif kind == 4:
            strange = self.strange_column(field.type, len(table))
            if strange is not None:
                table = table.set_column(at, pa.field(field.name, field.type), strange)
        else:
            table = pa.concat_tables([table] * int(self.random.integers(2, 5)))
        return written(table, row_group_size=self.pick([1, 2, 5, 1000]), use_dictionary=bool(self.random.integers(2)))

    def strange_column(self, kind: pa.DataType, rows: int) -> pa.Array | None:
        if pa.types.is_list(kind):
            inner = self.strange_column(kind.value_type, 200)
            return pa.array([inner.to_pylist()[: int(self.random.integers(200))] for _ in range(rows)], kind)
        if pa.types.is_integer(kind):
            ends = np.iinfo(kind.to_pandas_dtype())
            return pa.array([self.pick([ends.min, ends.max, 0, 1]) for _ in range(rows)], kind)
        if pa.types.is_floating(kind):
            return pa.array([self.pick([np.nan, np.inf, -np.inf, 3e38, -1.0, 2.0**23, 2.0**24]) for _ in range(rows)], kind)
        if pa.types.is_string(kind) or pa.types.is_binary(kind):
            return pa.array([self.pick(["", "\x1b[2J", "x" * 999]) for _ in range(rows)], kind)
        return None

    def read_table(self, name: str, data: bytes, way: str = "sequences") -> Callable[[], object]:
        """Read a file as the table `name` of the store, with records that say it is what was published.

        `way`: as "sequences", as a "scan" of the dataset that SQL is given, or by "sql" itself, in this very process.
        """
        path = self.tables[name]
        data = with_own_digests(data)

        def case() -> object:
            if len(data) < 8:
                return describe(path)
            length = min(int.from_bytes(data[-8:-4], "little") + 8, len(data))
            footer = hashlib.sha256(data[-length:]).hexdigest()
            sha256 = hashlib.sha256(data).hexdigest()
            if name == TOKENS_FILE:
                open_parquet(path, len(data), sha256, footer).close()
                return read_whole(path)
            try:
                rows = pq.read_metadata(path).num_rows
            except (OSError, ValueError):
                rows = 1
            rows_of_index = []
            for row in self.index.files.to_pylist():
                if (row["table"], row["shard"]) == (name, 0):
                    row |= {"bytes": len(data), "sha256": sha256, "footer_sha256": footer, "rows": max(0, min(rows, 2**40))}
                rows_of_index.append(row)
            index = Index(self.index.shards, pa.Table.from_pylist(rows_of_index, schema=FILES))
            if way == "sql":
                return run_query(self.store, index, [self.manifest], f"SELECT * FROM {name} WHERE sequence_id > 0")
            if way == "scan":
                return self.scan(index, name)
            reader = DumpReader(self.store, index, self.manifest, 0)
            found = [reader.sequence(ordinal, ("positions",)) for ordinal in range(min(len(reader), 4))]
            if name == SEQUENCES:
                files = shard_files(self.store, index, "small", SEQUENCES)[:1]
                return [found, read_sequences(files, sequences_schema(self.manifest))]
            return [found, reader.kept(0, "positions")]

        return lambda: self.with_file(path, data, case)

    def scan(self, index: Index, name: str) -> pa.Table:
        """All rows of a table as DuckDB is given them. What goes wrong there is told apart by the files' own errors."""
        schema = sequences_schema(self.manifest) if name == SEQUENCES else KINDS[name].stored_schema(self.manifest)
        errors: list[KnowledgeStoreError] = []
        files = [
            GuardedFile(file.path, file.bytes, file.sha256, file.footer_sha256, open_files(8), schema, file.rows, errors)
            for file in shard_files(self.store, index, "small", name)
        ]
        try:
            return dataset(files, schema).to_table(filter=pc.field("sequence_id") > 0, batch_size=BATCH_ROWS)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise errors[0] if errors else DamageError(str(error)) from None


def most_memory(forget: bool = False) -> int:
    """Most bytes that this process held at once, since it was last told to forget."""
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def sealed(record: dict[str, Any]) -> bytes:
    """`seal` without white space, which Python writes many times faster."""
    return json.dumps({**record, SEAL: json_sha256(record)}, ensure_ascii=False, allow_nan=False).encode()


def with_own_digests(data: bytes) -> bytes:
    """A Parquet file whose digests of blocks are those of its blocks, as whoever means harm would make them."""
    length = int.from_bytes(data[-8:-4], "little") + 8
    before = len(data) - length
    found = re.search(DIGESTS_KEY + rb"\x18.([0-9a-f]{16}+)", data[max(before, 0) :], re.DOTALL)
    if before < 0 or not found:
        return data
    digests = b"".join(_digest(data[at : min(at + BLOCK_BYTES, before)]) for at in range(0, before, BLOCK_BYTES)).hex().encode()
    if len(digests) != len(found[1]):
        return data
    return data[: before + found.start(1)] + digests + data[before + found.end(1) :]


def _zigzag(checksum: int) -> bytes:
    """A CRC-32 as Thrift's compact protocol writes an i32."""
    signed = checksum - 2**32 if checksum >= 2**31 else checksum
    value = (signed << 1 ^ signed >> 31) & 0xFFFFFFFF
    octets = bytearray()
    while value >= 0x80:
        octets.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*octets, value])


def written(table: pa.Table, **options: Any) -> bytes:
    """A table as the bytes of a Parquet file, with page checksums."""
    file = io.BytesIO()
    given = {"compression": "zstd", "write_page_checksum": True, "store_schema": False, **options}
    pq.write_table(table, file, **given)
    return file.getvalue()


def _rewritten(path: Path, plain: bool = False, **options: Any) -> bytes:
    table = pq.read_table(path)
    return written(table, use_dictionary=not plain, **options)


# --- bombs ------------------------------------------------------------------------------------------------------------------


def stored(world: World, rows: int, **columns: pa.Array) -> pa.Table:
    """A table of positions of `rows` rows, all alike, but for some columns."""
    schema = KINDS["positions"].stored_schema(world.manifest)
    made = [columns[field.name] if field.name in columns else pa.nulls(rows, field.type) for field in schema]
    for index, field in enumerate(schema):
        if field.name in ("sequence_id", "position", "token_id"):
            made[index] = pa.array(np.zeros(rows, field.type.to_pandas_dtype()))
        if field.name == "is_target":
            made[index] = pa.array(np.zeros(rows, bool))
    return pa.table(made, schema=schema)


def many_rows(world: World) -> bytes:
    """Five million rows of nothing, in one row group."""
    return written(stored(world, 5_000_000), row_group_size=2**26)


def many_row_groups(world: World) -> bytes:
    """Two thousand row groups, and nothing in any."""
    file = io.BytesIO()
    table = stored(world, 0)
    with pq.ParquetWriter(file, table.schema, compression="zstd", write_page_checksum=True, store_schema=False) as writer:
        for _ in range(2_000):
            writer.write_table(table)
    return file.getvalue()


def compressed_zeros(world: World) -> bytes:
    """Three hundred megabytes of zeros, in a few kilobytes."""
    zeros = pa.array([bytes(300_000_000)])
    return written(stored(world, 1, candidate_ids=zeros), use_dictionary=False, compression_level=1, write_statistics=False)


def counted_zeros(world: World) -> bytes:
    """Forty million times the same entry of a dictionary."""
    values = pa.array(np.zeros(40_000_000, np.uint32))
    lists = pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)
    return written(stored(world, 1, tail_ids=lists))


def repeated_text(world: World) -> bytes:
    """One text of a megabyte, at each of two thousand positions."""
    texts = pa.array([b"\0" * 1_000_000])
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2_000, np.int32)), texts)
    table = stored(world, 2_000)
    table = table.set_column(table.schema.get_field_index("candidate_ids"), "candidate_ids", column)
    return written(table, dictionary_pagesize_limit=2**24)


def prefixed_text(world: World) -> bytes:
    """Texts that each repeat the one before: a megabyte for two bytes."""
    texts = pa.array([b"\0" * 1_000_000] * 30)
    return written(
        stored(world, 30, candidate_ids=texts),
        use_dictionary=False,
        column_encoding={"candidate_ids": "DELTA_BYTE_ARRAY"},
    )


def text_bomb(world: World, name: str) -> bytes:
    """A long text again and again in a table of texts."""
    table = pq.read_table(io.BytesIO(world.sound[world.tables[name]]))
    column = "text" if name == TOKENS_FILE else "file"
    rows = 2_000
    wide = pa.concat_tables([table] * (rows // len(table) + 1)).slice(0, rows)
    texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["x" * 1_000_000]))
    at = wide.schema.get_field_index(column)
    return written(wide.set_column(at, column, texts), dictionary_pagesize_limit=2**24)


BOMBS: list[Callable[[World], bytes]] = [
    many_rows,
    many_row_groups,
    compressed_zeros,
    counted_zeros,
    repeated_text,
    prefixed_text,
]


if __name__ == "__main__":
    print(run(int(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])))
