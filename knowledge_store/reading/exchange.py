"""A stream on which sequences are asked for and come, in that order, begun again as often as it breaks.

A thread takes what comes as it comes, so that the server need not wait for who reads, and the line is not idle meanwhile. What
breaks the stream is handed to who waits for sequences, in whose thread it is begun again.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from knowledge_store.errors import StoreError
from knowledge_store.format.manifest import Manifest
from knowledge_store.kinds import Arrays
from knowledge_store.reading.transfer import Decoder, Received
from knowledge_store.storage.served import messages
from knowledge_store.storage.served.client import CALL_SECONDS, PATIENCE, Attempts, ServedStorage

QUIET_SECONDS = 10.0  # without anything that comes, after which waiting is told of
JOIN_SECONDS = 1.0  # that the end of a stream may take


@dataclass(eq=False)
class Asked:
    """Sequences that were asked for at once.

    Attributes:
        ordinals: which.
        parts: what has come of them, in their order.
        wanted: whether they are still to be read.
    """

    ordinals: tuple[int, ...]
    parts: list[Received] = field(default_factory=list)
    wanted: bool = True

    @property
    def left(self) -> int:
        """How many have not come."""
        return len(self.ordinals) - sum(map(len, self.parts))

    def sequences(self, start: int, stop: int) -> list[tuple[int, dict[str, Arrays]]]:
        """Some of those that have come (see `Received.sequences`)."""
        found: list[tuple[int, dict[str, Arrays]]] = []
        for part in self.parts:
            if start < len(part) and stop > 0:
                found += part.sequences(max(start, 0), min(stop, len(part)))
            start, stop = start - len(part), stop - len(part)
        return found


class Exchange:
    """The stream of a dump's sequences.

    Args:
        storage: where it is served.
        manifest: of the dump.
        snapshot: of its sequences (see `DumpReader.snapshot`).
        kinds: of knowledge.
    """

    def __init__(self, storage: ServedStorage, manifest: Manifest, snapshot: int, kinds: tuple[str, ...]):
        self.kinds = kinds
        self._storage, self._manifest = storage, manifest
        request = {"dump": manifest.dump, "snapshot": snapshot, "kinds": kinds}
        self._command = messages.to_bytes({"sequences": request})
        self._attempts = storage.attempts()
        self._line: _Line | None = None
        self._waiting: deque[Asked] = deque()  # for their sequences, in this order

    def ask(self, ordinals: tuple[int, ...]) -> Asked:
        """Have sequences on the way."""
        asked = Asked(ordinals)
        self._waiting.append(asked)
        if self._line is not None:
            self._line.ask(ordinals)
        return asked

    def answer(self, asked: Asked, start: int, stop: int) -> list[tuple[int, dict[str, Arrays]]]:
        """Some of what was asked for, once it has come (see `Received.sequences`).

        Raises:
            KnowledgeStoreError: what the server said, or it does not answer.
        """
        while len(asked.ordinals) - asked.left < stop:
            self._attempts.of(self._receive)
        return asked.sequences(start, stop)

    def _receive(self) -> None:
        """Take what comes next, on a line that is begun where there is none."""
        if self._line is None:
            self._waiting = deque(asked for asked in self._waiting if asked.wanted)
            self._line = _Line(self._storage, self._command, Decoder(self._manifest, self.kinds))
            for asked in self._waiting:
                asked.parts.clear()
                self._line.ask(asked.ordinals)
        try:
            received = self._line.next(self._attempts)
        except BaseException:
            self._end()
            raise
        if received is None:  # nothing was asked for, for a while, or the server ends
            self._end()
            return
        asked = self._waiting[0]
        asked.parts.append(received)
        if not len(received) or asked.left < 0:
            raise StoreError(f"{self._storage.address} sent other sequences than it was asked for")
        if not asked.left:
            self._waiting.popleft()

    def _end(self) -> None:
        if self._line is not None:
            self._line.end()
            self._line = None


class _Line:
    """A stream as long as it lasts.

    Args:
        storage: whose server it goes to.
        command: what is said of all that is asked for.
        decoder: of what comes.
    """

    def __init__(self, storage: ServedStorage, command: bytes, decoder: Decoder):
        from pyarrow import flight

        self._storage, self._decoder, self._answers = storage, decoder, False
        descriptor = flight.FlightDescriptor.for_command(command)
        self._writer, reader = storage.connection().do_exchange(descriptor, storage.options(None))
        self._chunks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # Whoever holds the line ends it, and a thread that held it too would never end.
        thread = threading.Thread(target=_take, args=(reader, self._chunks), name="served sequences", daemon=True)
        thread.start()
        self.end = weakref.finalize(self, _end, self._writer, reader, thread, os.getpid())

    def ask(self, ordinals: Sequence[int]) -> None:
        """Ask for sequences; what is wrong with the line, `next` says."""
        self._storage.connection()  # refuses a process that was forked
        with contextlib.suppress(pa.ArrowException, OSError):
            self._writer.write_metadata(np.array(ordinals, "<i8").tobytes())

    def next(self, attempts: Attempts) -> Received | None:
        """What comes next; None where the server has it hang up. When nothing comes for a while, it is told to `attempts`.

        Raises:
            Exception: the line broke (see `Attempts.failed`), or nothing comes.
        """
        try:
            chunk = self._chunks.get(timeout=QUIET_SECONDS)
        except queue.Empty:
            attempts.waiting(f"nothing came for {QUIET_SECONDS:g} s", CALL_SECONDS - QUIET_SECONDS + PATIENCE)
            try:
                chunk = self._chunks.get(timeout=CALL_SECONDS - QUIET_SECONDS)
            except queue.Empty:
                raise TimeoutError(f"nothing came for {CALL_SECONDS:g} s") from None
        if isinstance(chunk, StopIteration):
            raise OSError("it ended the stream")
        if isinstance(chunk, BaseException):
            raise chunk
        if chunk.data is not None:
            self._answers = True
            return self._decoder.received(chunk.data, chunk.app_metadata)
        if not self._answers:
            raise OSError("it answers nothing now")
        return None


def _take(reader: Any, chunks: queue.SimpleQueue[Any]) -> None:
    """Take all that comes, and then what ended it."""
    try:
        while True:
            chunk = reader.read_chunk()
            if chunk.data is None:
                reader.cancel()
            chunks.put(chunk)
    except BaseException as error:
        chunks.put(error)


def _end(writer: Any, reader: Any, thread: threading.Thread, process: int) -> None:
    """End a stream; a process that was forked has not its threads, and leaves it."""
    if process == os.getpid():
        reader.cancel()
        thread.join(JOIN_SECONDS)
        with contextlib.suppress(pa.ArrowException, OSError):
            writer.close()
