"""The readers of a store: of one dump, of several together, and of several teachers; each is made when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from knowledge_store.catalogue.dumps import Dumps
from knowledge_store.errors import InputError
from knowledge_store.reading.batches import Batches
from knowledge_store.reading.mixture import Named, check_vocabularies, named_dumps, weights_of
from knowledge_store.reading.plan import ReadPlan
from knowledge_store.reading.reader import MEMORY_BYTES, DumpReader
from knowledge_store.reading.served import ServedReader
from knowledge_store.reading.teachers import TeachersReader
from knowledge_store.storage.served.client import ServedStorage


class Readers:
    """The readers of a store's dumps.

    Args:
        dumps: of the store.
        cache_size: most bytes of the cache on disk, 0 for none.
        memory: of each dump, bytes of decoded row groups that are kept (see `DumpReader`).
    """

    def __init__(self, dumps: Dumps, cache_size: int, memory: int = MEMORY_BYTES):
        self._dumps, self._cache_size, self._memory = dumps, cache_size, memory
        self._of_dumps: dict[str, DumpReader] = {}
        self._of_teachers: dict[tuple[str, ...], TeachersReader] = {}

    def clear(self) -> None:
        """Let go of all of them, and of their files."""
        self._of_dumps.clear()
        self._of_teachers.clear()

    def of_dump(self, dump: str | None) -> DumpReader:
        """That of one dump; None means the only one (InputError: there is no such dump)."""
        name = self._dumps.name(dump)
        if name not in self._of_dumps:
            self._of_dumps[name] = self._reader(name)
        return self._of_dumps[name]

    def _reader(self, name: str) -> DumpReader:
        if isinstance(self._dumps.storage, ServedStorage):
            return ServedReader(self._dumps, name)
        return DumpReader(self._dumps, name, self._cache_size, self._memory)

    def of_dumps(self, names: Sequence[str]) -> dict[str, DumpReader]:
        """Those of dumps that have something to read, and one vocabulary (InputError: they do not)."""
        readers = {name: self.of_dump(name) for name in names}
        for name, reader in readers.items():
            if not len(reader):
                raise InputError(f"dump {name!r} of {self._dumps.storage.address} has no committed shard yet")
        check_vocabularies([reader.manifest for reader in readers.values()], self._dumps.tokens)
        return readers

    def of_teachers(self, names: Iterable[str]) -> TeachersReader:
        """That of several teachers (InputError: they are not of one corpus, or have no sequence in common)."""
        key = tuple(names)
        if key not in self._of_teachers:
            self._of_teachers[key] = TeachersReader(self.of_dumps(key))
        return self._of_teachers[key]

    def batches(self, plan: ReadPlan, dump: Named) -> Batches:
        """As of `KnowledgeStore.read`."""
        if plan.teachers is None:
            names, weights = named_dumps(dump, self._dumps.name)
            return Batches(self.of_dumps(names), weights, plan)
        teachers = list(weights_of(plan.teachers, "teacher"))
        if dump not in (None, teachers[0], teachers[:1]):
            raise InputError("give dumps or teachers, not both: the first teacher's sequences are read")
        return Batches({teachers[0]: self.of_teachers(teachers)}, None, plan)
