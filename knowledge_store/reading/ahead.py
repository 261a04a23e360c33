"""Row groups of a store that is far away, on the way before their sequences are asked for.

What is asked of a bucket comes after some hundredths of a second, however small it is: a reader that waits for each would wait
most of the time. So the row groups of the batches that come next are read on threads, GROUPS at most, and kept as they are
stored: decoded they would take tens of times the memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa

BATCHES = 32  # that a reader looks ahead
GROUPS = 32  # on the way, or here and not asked for yet
THREADS = 8

Key = tuple[str, int, int]  # kind, place of the shard, row group


class ReadAhead:
    """What is on the way.

    Args:
        find: finds out where the sequences of the shard at a place are, which may take requests of its own.
        read: reads a row group as it is stored. Both are called on several threads.
    """

    def __init__(self, find: Callable[[int], object], read: Callable[[Key], pa.Table]):
        self._find, self._read = find, read
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="read ahead")
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        self._found: dict[int, Future[object]] = {}
        self._coming: dict[Key, Future[pa.Table]] = {}

    def found(self, place: int, *, wait: bool = False) -> bool:
        """Whether it is known where a shard's sequences are; where it is not, it will be.

        Args:
            wait: until it is.

        Raises:
            KnowledgeStoreError: where it is to be waited for, and cannot be found out.
        """
        if place not in self._found:
            self._found[place] = self._pool.submit(self._find, place)
        future = self._found[place]
        if wait:
            try:
                future.result()
            finally:
                if future.exception() is not None:  # the next one that asks tries again
                    self._found.pop(place, None)
        return future.done() and future.exception() is None

    def begin(self, keys: Iterable[Key]) -> None:
        """Have row groups on the way, and no others."""
        wanted = set(keys)
        for key in self._coming.keys() - wanted:
            self._coming.pop(key).cancel()
        for key in wanted - self._coming.keys():
            self._coming[key] = self._pool.submit(self._read, key)

    def take(self, key: Key) -> pa.Table | None:
        """A row group that is on the way or here, which is not kept; None for one that is not.

        Raises:
            KnowledgeStoreError: it could not be read.
        """
        future = self._coming.pop(key, None)
        return None if future is None else future.result()
