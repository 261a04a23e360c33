"""Damage of every sort to every sort of file, and what each way of reading says of it.

Stores are made by numpy. One fault at a time is made, what could meet it is read, in a way drawn at random, and the file is put
back. An answer must be the one of the sound store, or an error that names the file. A fault is a function of seed and number
alone, so a failure is repeated with `try_faults(seed, [number], folder)`.

Before that, every STEPth bit of every Parquet and JSON file is flipped once and given to what all readers read through.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stores import DRAW_WEIGHT, commit, drawn_sequences, make_manifest, random_sequences, table_file_of, words

from knowledge_store import DamageError, DumpWriter, KnowledgeStore, StoreError, verify
from knowledge_store.format.integrity import CheckedFile
from knowledge_store.format.manifest import Manifest
from knowledge_store.format.records import unseal
from knowledge_store.format.sequences import tokens_table
from knowledge_store.kinds import Arrays
from knowledge_store.storage.local import LocalStorage
from torture.heartbeat import beat

VOCABULARY = 211
DUMPS = ("drawn", "plain")  # by name: a dump that is closed is not among those of a store
ORDER = "ORDER BY dump, sequence_id"
QUERIES = {
    "positions": [
        f'SELECT * EXCLUDE (token_text) FROM positions {ORDER}, "position"',
        "SELECT dump, sum(tail_logprob), count(*) FROM positions GROUP BY 1 ORDER BY 1",
        f'SELECT * EXCLUDE (token_text) FROM candidates {ORDER}, "position", rank',
    ],
    "sequences": [f"SELECT * FROM sequences {ORDER}", "SELECT sum(length), count(*) FROM sequences"],
    "tokens": ["SELECT * FROM tokens ORDER BY dump, token_id", f'SELECT token_text FROM positions {ORDER}, "position"'],
    "index": ["SELECT * FROM shards ORDER BY dump, shard", "SELECT * FROM dumps ORDER BY dump"],
}

Change = Callable[[bytearray, random.Random, list[int]], None]


def flip(data: bytearray, chance: random.Random, places: list[int]) -> None:
    """One bit, near a page's header every other time."""
    near = chance.choice(places) + chance.randrange(64) if places and chance.random() < 0.5 else chance.randrange(len(data))
    data[min(near, len(data) - 1)] ^= 1 << chance.randrange(8)


def flips(data: bytearray, chance: random.Random, places: list[int]) -> None:
    """A few bits."""
    for _ in range(chance.randint(2, 6)):
        flip(data, chance, places)


def overwritten(data: bytearray, chance: random.Random, places: list[int]) -> None:
    """A stretch of zeros or of noise, as of a lost sector."""
    start, length = chance.randrange(len(data)), chance.choice([1, 8, 64, 512])
    end = min(start + length, len(data))
    data[start:end] = bytes(end - start) if chance.random() < 0.5 else chance.randbytes(end - start)


def cut(data: bytearray, chance: random.Random, places: list[int]) -> None:
    """The end is lost."""
    del data[chance.randrange(len(data)) :]


def longer(data: bytearray, chance: random.Random, places: list[int]) -> None:
    """Something is added at the end or put in."""
    place = chance.choice([len(data), chance.randrange(len(data))])
    data[place:place] = chance.randbytes(chance.randint(1, 40))


def pages_swapped(data: bytearray, chance: random.Random, places: list[int]) -> None:
    """Two pages of a Parquet file, or two stretches of any other, change places."""
    starts = sorted(set(places)) if len(places) > 2 else sorted(chance.sample(range(len(data)), min(4, len(data))))
    if len(starts) < 3:
        return flip(data, chance, places)
    a, b = sorted(chance.sample(range(len(starts) - 1), 2)) if len(starts) > 2 else (0, 1)
    pieces = [bytes(data[start:end]) for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]
    pieces[a], pieces[b] = pieces[b], pieces[a]
    data[starts[0] :] = b"".join(pieces)
    return None


CHANGES: dict[str, tuple[int, Change]] = {
    "flip": (70, flip),
    "flips": (8, flips),
    "overwritten": (6, overwritten),
    "cut": (4, cut),
    "longer": (2, longer),
    "pages swapped": (6, pages_swapped),
}
STEP = 7
SWAPPED = 4  # files, beside the weights above
LEFTOVERS = 25  # one fault in so many is to a file without a commit record


def shards_of(seed: int) -> list[tuple[Manifest, list[list[Arrays]]]]:
    """The dumps of a store, and the sequences of their shards: one with draws and a calibration, and a plain one."""
    corpus = {"files": [{"name": "numbers.jsonl", "bytes": 1, "sha256": f"{seed:02}"}]}
    selection = {"name": "top-k", "k": 3, "draw_weight": DRAW_WEIGHT, "draw_seed": 0}
    calibration = {"temperature": 2.0, "sha256": "00"}
    drawn = make_manifest("drawn", VOCABULARY, selection=selection, calibration=calibration, corpus=corpus)
    plain = make_manifest("plain", VOCABULARY, corpus=corpus)
    return [
        (manifest, [sequences(seed + shard, 3, VOCABULARY, 3) for shard in range(2)])
        for manifest, sequences in ((drawn, drawn_sequences), (plain, random_sequences))
    ]


def make_store(folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> Path:
    """Two dumps, one with draws and a calibration, in shards of several row groups, and small blocks; of a corpus `seed`."""
    monkeypatch.setattr("knowledge_store.writing.row_groups.ROW_GROUP_BYTES", 20 * 2048)
    monkeypatch.setattr("knowledge_store.format.integrity.BLOCK_BYTES", 512)
    texts = words(VOCABULARY)
    for manifest, shards in shards_of(seed):
        writer = DumpWriter.open(folder, manifest, tokens_table(texts, texts))
        for shard, sequences in enumerate(shards):
            commit(writer, shard, sequences)
    return folder


def page_places(data: bytes) -> list[int]:
    """Where column chunks of a Parquet file begin, which is where the header of a page stands."""
    metadata = pq.read_metadata(pa.BufferReader(data))
    chunks = [metadata.row_group(g).column(c) for g in range(metadata.num_row_groups) for c in range(metadata.num_columns)]
    places = {place for each in chunks for place in (each.dictionary_page_offset, each.data_page_offset) if place}
    return sorted(places)


@dataclass
class Sound:
    """A store as it should be: its files, and all that is read from it."""

    path: Path
    files: dict[Path, bytes]
    places: dict[Path, list[int]]
    answers: dict[str, Any]
    opened: KnowledgeStore
    stranger: dict[Path, bytes]  # files of another store, under the names of this one's


def read_items(store: KnowledgeStore) -> Any:
    """Each sequence by itself."""
    return [
        {name: array.tobytes() for name, array in store[dump, item].items()}
        for dump in DUMPS
        for item in range(len(store.sequences(dump)))
    ]


def read_batches(store: KnowledgeStore) -> Any:
    """An epoch of each dump."""
    return [
        {name: (array.shape, array.tobytes()) for name, array in batch.items()}
        for dump in DUMPS
        for batch in store.batches(dump, batch_size=5, seed=1)
    ]


def fresh(sound: Sound) -> KnowledgeStore:
    """The store opened again as far as Parquet files go: what they do not hold is as it was."""
    opened = sound.opened
    return KnowledgeStore(replace(opened._dumps, storage=LocalStorage(opened.address)), cache_size=0)


def take_stock(path: Path) -> Sound:
    """Read everything of a sound store."""
    opened = KnowledgeStore.open(path, cache_size=0)
    files = {each: each.read_bytes() for each in sorted(path.rglob("*")) if each.is_file()}
    places = {each: page_places(data) for each, data in files.items() if each.suffix == ".parquet"}
    answers: dict[str, Any] = {"items": read_items(opened), "batches": read_batches(opened)}
    for queries in QUERIES.values():
        answers |= {query: opened.sql(query) for query in queries}
    assert not verify(path).damage
    return Sound(path, files, places, answers, opened, {})


def sort_of(path: Path) -> str:
    """What a file is."""
    if path.suffix == ".parquet":
        return "tokens" if path.name == "tokens.parquet" else path.parent.name
    return "commits" if path.parent.name == "commits" else path.name


def fault_of(seed: int, number: int, sound: Sound) -> tuple[str, dict[Path, bytes], random.Random]:
    """A fault: what it is called, and the files as they stand after it."""
    chance = random.Random(f"{seed} {number}")
    by_sort: dict[str, list[Path]] = {}
    for path in sound.files:
        by_sort.setdefault(sort_of(path), []).append(path)
    # Knowledge is most of any store: as many faults as to all the others.
    sort = chance.choice([*sorted(by_sort), *["positions"] * 4, *["sequences"] * 2])
    names = [*CHANGES, "files swapped"]
    name = chance.choices(names, [*(weight for weight, _ in CHANGES.values()), SWAPPED])[0]
    path = chance.choice(by_sort[sort])
    if name == "files swapped" and sound.stranger and sort != "store.json" and chance.random() < 0.5:
        return f"files of another store: {sort}", strange(path, sort, sound, chance), chance
    others = [other for other in by_sort[sort] if sound.files[other] != sound.files[path]]
    if name == "files swapped" and others:
        other = chance.choice(others)
        return f"{name}: {sort}", {path: sound.files[other], other: sound.files[path]}, chance
    name = "flip" if name == "files swapped" else name
    data = bytearray(sound.files[path])
    while data == sound.files[path]:  # zeros may be written over zeros
        CHANGES[name][1](data, chance, sound.places.get(path, []))
    return f"{name}: {sort}", {path: bytes(data)}, chance


def strange(path: Path, sort: str, sound: Sound, chance: random.Random) -> dict[Path, bytes]:
    """A file of another store that has its name here, by itself or with the others of its shard or dump."""
    together = [path]
    if chance.random() < 0.7:
        dump = sound.path / path.relative_to(sound.path).parts[0]
        if path.parent == dump:
            together = [dump / "manifest.json", dump / "tokens.parquet"]
        else:
            together = [each for each in sound.files if each.parent.parent == dump and each.stem == path.stem]
    return {each: sound.stranger[each] for each in sorted(together, key=lambda each: each != path)}


def readings(sound: Sound, files: Collection[Path], chance: random.Random) -> list[tuple[str, Callable[[], Any]]]:
    """All that could meet a fault in such a file. A store is opened anew for each; now and then from the very beginning."""
    sort = sort_of(next(iter(files)))
    from_records = any(sort_of(each) in ("commits", "manifest.json", "store.json") for each in files)
    whole = from_records or chance.random() < 0.05

    def opened() -> KnowledgeStore:
        return KnowledgeStore.open(sound.path, cache_size=0) if whole else fresh(sound)

    chosen = [*QUERIES["index"], QUERIES["positions"][1]] if whole else QUERIES.get(sort, [])
    found: list[tuple[str, Callable[[], Any]]] = [(query, lambda query=query: opened().sql(query)) for query in chosen]
    if sort in ("positions", "sequences") or whole:
        found += [("items", lambda: read_items(opened())), ("batches", lambda: read_batches(opened()))]
    return [chance.choice(found)]


def flip_in_turn(sound: Sound, first: int, step: int, end: float = math.inf) -> Counter[str]:
    """Flip every `step`th bit of each Parquet and JSON file, one at a time, and read the file as all readers do.

    Args:
        end: when to stop at the latest, on the monotonic clock.
    """
    counts: Counter[str] = Counter()
    published = {path: table_file_of(path) for path in sound.files if path.suffix == ".parquet"}
    for path, data in sound.files.items():
        sealed = None if path.suffix == ".parquet" else unseal(data, path)
        for bit in range(first % step, 8 * len(data), step):
            if time.monotonic() > end:
                path.write_bytes(data)
                return counts
            beat(f"bit {bit} of {path}")
            harmed = bytearray(data)
            harmed[bit // 8] ^= 1 << bit % 8
            counts["faults"] += 1
            counts["bits in turn"] += 1
            try:
                if sealed is None:
                    path.write_bytes(harmed)
                    read = CheckedFile(published[path]).read()
                    right = bytes(read) == data
                else:
                    right = unseal(bytes(harmed), path) == sealed
                assert right, f"SILENT: bit {bit} of {path}"
                counts["right answers"] += 1
            except DamageError as error:
                assert str(path) in str(error)
                counts["refused by name"] += 1
            counts["survived"] += 1
        path.write_bytes(data)
    return counts


def try_fault(seed: int, number: int, sound: Sound) -> Counter[str]:
    """Make one fault, read, and put everything back. AssertionError: an answer was neither right nor refused by name."""
    name, files, chance = fault_of(seed, number, sound)
    counts = Counter({"faults": 1, name.split(":")[0]: 1, f"in {name.split(': ')[1]}": 1})
    sort = sort_of(next(iter(files)))
    told = f"fault {number} of seed {seed} ({name}, {', '.join(map(str, files))})"
    beat(told)
    meanwhile = None
    if len(files) == 1 and sort in ("positions", "sequences", "tokens") and chance.random() < 0.25:
        meanwhile = fresh(sound)  # files that are open while they are damaged
        meanwhile[meanwhile.dumps[0], 0]
    stamps = {path: path.stat() for path in files}
    keep_time = chance.random() < 0.5
    try:
        for path, data in files.items():
            path.write_bytes(data)
            if keep_time:  # as a disk that decays does
                os.utime(path, ns=(stamps[path].st_atime_ns, stamps[path].st_mtime_ns))
        reads = readings(sound, files, chance)
        if meanwhile is not None:
            reads += [("items", lambda: read_items(meanwhile)), ("batches", lambda: read_batches(meanwhile))]
        for reading, read in reads:
            counts["readings"] += 1
            try:
                answer, expected = read(), sound.answers[reading]
                right = answer.equals(expected) if isinstance(expected, pa.Table) else answer == expected
                assert right, f"SILENT: {told} gave another answer to {reading}"
                counts["right answers"] += 1
            except (DamageError, StoreError) as error:
                named = any(str(path) in str(error) for path in files)
                assert named, f"{told} is blamed on something else by {reading}: {error}"
                counts["refused by name"] += 1
        if chance.random() < 0.1:
            found = verify(sound.path)
            damage = found.damage + found.closed
            same = all(data.split() == sound.files[path].split() for path, data in files.items())
            assert same or any(str(path) in sentence for path in files for sentence in damage), f"verify misses {told}"
            counts["verified"] += 1
    finally:
        for path in files:
            path.write_bytes(sound.files[path])
            os.utime(path, ns=(stamps[path].st_atime_ns, stamps[path].st_mtime_ns))
    counts["survived"] += 1
    return counts


def try_leftover(seed: int, number: int, sound: Sound) -> Counter[str]:
    """Damage a file that was left without a commit record, and go on with the dump: nothing vouches for it but itself.

    AssertionError: it was committed, and reads otherwise than it should, or it was refused without its name.
    """
    chance = random.Random(f"{seed} {number} leftover")
    manifest, shards = chance.choice(shards_of(0))
    folder, shard, table = sound.path / manifest.dump, chance.randrange(2), chance.choice(["positions", "sequences"])
    path, record = folder / table / f"{shard:05d}.parquet", folder / "commits" / f"{shard:05d}.json"
    name = chance.choice([each for each in CHANGES if each != "flip"] + ["flip"] * 6)
    data = bytearray(sound.files[path])
    while data == sound.files[path]:
        CHANGES[name][1](data, chance, [len(data) - 600, *sound.places[path]])  # footers as often as pages
    told = f"leftover {number} of seed {seed} ({name}, {path})"
    beat(told)
    counts = Counter({"faults": 1, "leftovers": 1, f"in {table}": 1})
    try:
        record.unlink()
        path.write_bytes(data)
        writer = DumpWriter.open(sound.path, manifest, tokens_table(words(VOCABULARY), words(VOCABULARY)))
        try:
            commit(writer, shard, shards[shard])
        except (DamageError, StoreError) as error:
            assert str(path) in str(error), f"{told} is blamed on something else: {error}"
            counts["refused by name"] += 1
        else:
            opened = KnowledgeStore.open(sound.path, cache_size=0)
            assert read_items(opened) == sound.answers["items"], f"SILENT: {told} was committed, and has other items"
            for query in QUERIES[table]:
                assert opened.sql(query).equals(sound.answers[query]), (
                    f"SILENT: {told} was committed, and answers {query} otherwise"
                )
            counts["right answers"] += 1
    finally:
        for each in (path, record):
            each.write_bytes(sound.files[each])
        for each in sound.path.rglob(".tmp-*"):
            each.unlink()
        # The index knows a record by its size and time.
        sound.opened._dumps = KnowledgeStore.open(sound.path, rebuild_index=True, cache_size=0)._dumps
    counts["survived"] += 1
    return counts


def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Sound:
    """The store to damage."""
    folder.mkdir(parents=True, exist_ok=True)
    store = make_store(folder / "store", monkeypatch)
    other = make_store(folder / "stranger", monkeypatch, seed=50)
    sound = take_stock(store)
    sound.stranger.update(
        {path: (other / path.relative_to(store)).read_bytes() for path in sound.files if path.name != "store.json"}
    )
    return sound


def try_faults(
    seed: int, numbers: Iterable[int], folder: Path, step: int | None = None, flips_end: float = math.inf
) -> dict[str, int]:
    """Make the faults of these numbers, one after the other.

    Args:
        step: flip every `step`th bit of the store first, one at a time; None for none.
        flips_end: when to stop that at the latest, on the monotonic clock.
    """
    counts: Counter[str] = Counter({"silent": 0})
    with pytest.MonkeyPatch.context() as monkeypatch:
        sound = prepare(folder, monkeypatch)
        if step:
            counts.update(flip_in_turn(sound, seed, step, flips_end))
        for number in numbers:
            counts.update((try_fault if number % LEFTOVERS else try_leftover)(seed, number, sound))
    return dict(counts)


def run(seed: int, minutes: float, folder: Path) -> dict[str, int]:
    """Bits in turn for half of the time at most, then faults drawn at random until it is over."""
    began = time.monotonic()
    end = began + 60 * minutes

    def numbers() -> Iterable[int]:
        for number in count():
            if time.monotonic() > end:
                return
            yield number

    return try_faults(seed, numbers(), folder, step=STEP, flips_end=(began + end) / 2)
