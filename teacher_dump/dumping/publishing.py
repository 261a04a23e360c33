"""Committing shards while the teacher works on the next one: a thread that publishes them, and counts what it committed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from knowledge_store.format.commits import CommitRecord
from knowledge_store.kinds import Arrays
from teacher_dump.dumping.plan import ShardInput

LONGEST_WAIT = 1.0  # seconds, after which a change is seen that was taken when Ctrl-C fell

Knowledge = dict[str, list[Arrays]]  # for each kind, the arrays of each sequence of a shard, in order


@dataclass(frozen=True)
class Committed:
    """What a call of `dump` or `repair` has committed so far.

    Attributes:
        shards, positions, bytes: how many; bytes of the shards' files.
    """

    shards: int = 0
    positions: int = 0
    bytes: int = 0

    def plus(self, record: CommitRecord, shard: ShardInput) -> Committed:
        """With one shard more."""
        return Committed(
            shards=self.shards + 1,
            positions=self.positions + shard.positions,
            bytes=self.bytes + sum(file.bytes for file in record.files.values()),
        )

    def and_others(self, other: Committed) -> Committed:
        """Both together."""
        return Committed(self.shards + other.shards, self.positions + other.positions, self.bytes + other.bytes)


class ShardPublisher:
    """Publishes shards one after the other in a thread of its own.

    Ctrl-C may fall between any two steps of whoever hands shards over: while one is handed over, while it is waited for, or
    twice. So the thread that commits a shard also counts it, and `close` waits for that thread, however often Ctrl-C is
    pressed: after it, `committed` is exactly what was committed.
    """

    def __init__(self, publish: Callable[[ShardInput, Knowledge], CommitRecord]):
        self.committed = Committed()  # replaced as a whole, by the thread alone
        self._publish = publish
        self._error: BaseException | None = None
        self._busy = self._ended = False
        # Simple queues, unlike events and joins of threads, stay whole when Ctrl-C falls into them.
        self._jobs: SimpleQueue[tuple[ShardInput, Knowledge] | None] = SimpleQueue()
        self._changes: SimpleQueue[None] = SimpleQueue()
        # A daemon: Ctrl-C may fall before anybody can close it, and waiting for work must not keep the process alive.
        threading.Thread(target=self._work, name="writer", daemon=True).start()

    def _work(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                self.committed = self.committed.plus(self._publish(*job), job[0])
                del job  # its arrays are not needed while this waits for the next
                self._busy = False
                self._changes.put(None)
        except BaseException as error:
            self._error = error
        finally:
            self._ended = True
            self._changes.put(None)

    def check(self) -> None:
        """Raise what the thread met, if it met anything."""
        if self._error is not None:
            raise self._error

    def hand_over(self, shard: ShardInput, knowledge: Knowledge) -> None:
        """Have a shard published, as soon as the one before it is.

        Raises:
            whatever publishing an earlier one raised.
        """
        while self._busy and not self._ended:
            self._wait()
        self.check()
        self._busy = True
        self._jobs.put((shard, knowledge))

    def close(self) -> None:
        """Wait until whatever was handed over is committed (or has failed, see `check`), and end the thread.

        Raises:
            KeyboardInterrupt: Ctrl-C while it waited, which it did to the end all the same.
        """
        interruption: KeyboardInterrupt | None = None
        while not self._ended:
            try:
                self._jobs.put(None)
                while not self._ended:
                    self._wait()
            except KeyboardInterrupt as error:
                interruption = error
        if interruption is not None:
            raise interruption

    def _wait(self) -> None:
        with suppress(Empty):
            self._changes.get(timeout=LONGEST_WAIT)
