"""The sequences of a dump of a served store: they come decoded, in few bytes, some batches ahead of who reads them.

Which sequences come next the client says, since it knows the order: they are asked for on one stream, which lasts, and come on
it in the order in which they were asked for. So no more than `AHEAD` batches are on the way, whatever the network keeps; and
when the stream breaks, another one is asked for what has not come.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate, chain

import numpy as np

from knowledge_store.catalogue.dumps import Dumps
from knowledge_store.kinds import KINDS, Arrays
from knowledge_store.reading.exchange import Asked, Exchange
from knowledge_store.reading.reader import DumpReader
from knowledge_store.storage.served import messages
from knowledge_store.storage.served.client import ServedStorage

AHEAD = 8  # batches
AT_ONCE = 4  # of these, asked for in one message


class ServedReader(DumpReader):
    """Of a served store (see `DumpReader`); nothing is cached here. The arrays of `sequences` cannot be changed.

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
        self._lock = threading.RLock()
        self._exchange: Exchange | None = None
        # The batches that are on the way: their ordinals, and which part they are of what was asked for at once.
        self._coming: deque[tuple[tuple[int, ...], Asked, int]] = deque()

    @cached_property
    def row_groups(self) -> np.ndarray:
        request = {"dump": self.manifest.dump, "snapshot": self.snapshot}
        [data] = self._storage.called(messages.ROW_GROUPS, request)
        return np.frombuffer(data, "<i8").astype(np.int64)

    def sequence(self, ordinal: int, kinds: tuple[str, ...]) -> tuple[int, dict[str, Arrays]]:
        self._place(ordinal)
        if not kinds:
            return super().sequence(ordinal, kinds)
        with self._stream(kinds) as exchange:
            [(sequence_id, knowledge)] = exchange.answer(exchange.ask((ordinal,)), 0, 1)
        return sequence_id, {
            kind: {name: knowledge[kind][name].copy() for name in KINDS[kind].arrays(self.manifest)} for kind in kinds
        }

    def sequences(
        self, ordinals: Sequence[int], kinds: tuple[str, ...], upcoming: Sequence[Sequence[int]] = ()
    ) -> list[tuple[int, dict[str, Arrays]]]:
        if not ordinals or not kinds:
            return super().sequences(ordinals, kinds)
        with self._stream(kinds) as exchange:
            wanted = [tuple(batch) for batch in (ordinals, *upcoming) if batch]
            if any(standing != batch for (standing, _, _), batch in zip(self._coming, wanted, strict=False)):
                self._leave()
            missing = wanted[len(self._coming) :]
            # As many as may be at once, but for the end, and what is wanted now.
            if not self._coming or len(missing) >= AT_ONCE or len(wanted) <= AT_ONCE:
                for first in range(0, len(missing), AT_ONCE):
                    self._ask(exchange, missing[first : first + AT_ONCE])
            batch, asked, start = self._coming.popleft()
            return exchange.answer(asked, start, start + len(batch))

    def _ask(self, exchange: Exchange, batches: Sequence[tuple[int, ...]]) -> None:
        asked = exchange.ask(tuple(chain.from_iterable(batches)))
        for start, batch in zip(accumulate(map(len, batches), initial=0), batches, strict=False):
            self._coming.append((batch, asked, start))

    @contextmanager
    def _stream(self, kinds: tuple[str, ...]) -> Iterator[Exchange]:
        """The stream of some kinds, which no other thread uses meanwhile; after an error the next one is another."""
        with self._lock:
            if self._exchange is None or self._exchange.kinds != kinds:
                self._leave()
                self._exchange = Exchange(self._storage, self.manifest, self.snapshot, kinds)
            try:
                yield self._exchange
            except BaseException:
                self._leave()
                self._exchange = None
                raise

    def _leave(self) -> None:
        """What is on the way comes, and is not read."""
        for _, asked, _ in self._coming:
            asked.wanted = False
        self._coming.clear()
