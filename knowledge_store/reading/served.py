"""The sequences of a dump of a served store: they come decoded, in few bytes, some batches ahead of who reads them.

Which sequences come next the client says, since it knows the order. So no more than `AHEAD` batches are on the way, whatever
the network keeps; and a stream that breaks is asked for again from the first batch that has not come.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from functools import cached_property
from typing import Any

import numpy as np

from knowledge_store.catalogue.dumps import Dumps
from knowledge_store.errors import KnowledgeStoreError, StoreError
from knowledge_store.kinds import Arrays
from knowledge_store.reading.reader import DumpReader
from knowledge_store.reading.transfer import Decoder, Received
from knowledge_store.storage.served import messages
from knowledge_store.storage.served.client import CALL_SECONDS, Attempts, ServedStorage

AHEAD = 8  # batches
TICKET = 4  # of these, asked for at once

Batch = list[tuple[int, dict[str, Received]]]


class ServedReader(DumpReader):
    """Of a served store (see `DumpReader`); nothing is cached here.

    Args:
        dumps: of the store.
        name: of the dump.
    """

    def __init__(self, dumps: Dumps, name: str):
        super().__init__(dumps, name, 0)
        assert isinstance(dumps.storage, ServedStorage)
        self._storage = dumps.storage
        # What is read ahead are sequences, and not the row groups of files.
        self.ahead, self._ahead = AHEAD, None
        self._coming: deque[tuple[tuple[tuple[int, ...], tuple[str, ...]], Future[Batch]]] = deque()

    @cached_property
    def row_groups(self) -> np.ndarray:
        request = {"dump": self.manifest.dump, "snapshot": self.snapshot}
        [data] = self._storage.called(messages.ROW_GROUPS, request)
        return np.frombuffer(data, "<i8").astype(np.int64)

    def sequence(self, ordinal: int, kinds: tuple[str, ...]) -> tuple[int, dict[str, Arrays]]:
        self._place(ordinal)
        [found] = self._now((ordinal,), kinds)
        return _unpacked(found)

    def sequences(
        self, ordinals: Sequence[int], kinds: tuple[str, ...], upcoming: Sequence[Sequence[int]] = ()
    ) -> list[tuple[int, dict[str, Arrays]]]:
        if not ordinals or not kinds:
            return super().sequences(ordinals, kinds)
        wanted = [(tuple(batch), kinds) for batch in (ordinals, *upcoming) if batch]
        standing = [key for key, _ in self._coming]
        if standing != wanted[: len(standing)]:
            self._coming.clear()  # what is on the way comes, and is left
        missing = wanted[len(self._coming) :]
        # A ticket full at once, but for the end, and what is wanted now.
        if not self._coming or len(missing) >= TICKET or len(wanted) <= TICKET:
            for first in range(0, len(missing), TICKET):
                self._ask(missing[first : first + TICKET])
        _, future = self._coming.popleft()
        return [_unpacked(found) for found in future.result()]

    def _now(self, ordinals: tuple[int, ...], kinds: tuple[str, ...]) -> Batch:
        future: Future[Batch] = Future()
        _Ticket(self, [(ordinals, future)], kinds).fetch()
        return future.result()

    def _ask(self, batches: Sequence[tuple[tuple[int, ...], tuple[str, ...]]]) -> None:
        futures: list[tuple[tuple[int, ...], Future[Batch]]] = []
        for key in batches:
            future: Future[Batch] = Future()
            self._coming.append((key, future))
            futures.append((key[0], future))
        ticket = _Ticket(self, futures, batches[0][1])
        # No pool: a program that ends does not wait for what it will not read.
        threading.Thread(target=ticket.fetch, name="served sequences", daemon=True).start()


class _Ticket:
    """Batches that are asked for together.

    Args:
        reader: of the dump.
        batches: their ordinals, and where the sequences go.
        kinds: of knowledge.
    """

    def __init__(self, reader: ServedReader, batches: list[tuple[tuple[int, ...], Future[Batch]]], kinds: tuple[str, ...]):
        self._storage, self._manifest, self._snapshot = reader._storage, reader.manifest, reader.snapshot
        self._left, self._kinds = deque(batches), kinds

    def fetch(self) -> None:
        """Get them all, in as many attempts as it takes; what goes wrong goes to who waits for a batch."""
        try:
            attempts = self._storage.attempts()
            while self._left:
                attempts.of(lambda: self._stream(attempts))
        except BaseException as error:
            known = isinstance(error, KnowledgeStoreError)
            told = error if known else StoreError(f"{self._storage.address} was not read: {type(error).__name__}: {error}")
            for _, future in self._left:
                future.set_exception(told)

    def _stream(self, attempts: Attempts) -> None:
        """One attempt: the batches that have not come yet."""
        from pyarrow import flight

        request: dict[str, Any] = {"dump": self._manifest.dump, "snapshot": self._snapshot, "kinds": self._kinds}
        request["batches"] = [ordinals for ordinals, _ in self._left]
        ticket = flight.Ticket(messages.to_bytes({"sequences": request}))
        stream = self._storage.connection().do_get(ticket, self._storage.options(CALL_SECONDS))
        decoder = Decoder(self._manifest, self._kinds)
        while self._left:
            try:
                chunk = stream.read_chunk()
            except StopIteration:
                raise StoreError(f"{self._storage.address} sent fewer sequences than it was asked for") from None
            ordinals, future = self._left[0]
            found = decoder.batch(chunk.data, chunk.app_metadata.to_pybytes())
            if len(found) != len(ordinals):
                raise StoreError(f"{self._storage.address} sent other sequences than it was asked for")
            self._left.popleft()
            future.set_result(found)
            attempts.succeeded()


def _unpacked(sequence: tuple[int, dict[str, Received]]) -> tuple[int, dict[str, Arrays]]:
    sequence_id, knowledge = sequence
    return sequence_id, {kind: received.arrays() for kind, received in knowledge.items()}
