"""Streams of sequences: a client asks for some, again and again, and gets them in the order in which it asked.

A stream lasts as long as its client reads, and takes a slot only while something is made and sent. One on which nothing is
asked for a while, and every one when the server ends, is told to hang up: its client begins another when it wants more. So no
more is made than was asked for, whatever the network keeps; and of much that is asked for at once, a part at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa

from knowledge_store.errors import InputError
from knowledge_store.kinds import Arrays
from knowledge_store.reading.packed import Packed
from knowledge_store.reading.transfer import Encoder, packed_bytes, received_bytes
from knowledge_store.serving.limits import Slots, Watch
from knowledge_store.serving.metrics import Call
from knowledge_store.serving.requests import from_bytes
from knowledge_store.serving.served import ServedStore, check_kinds
from knowledge_store.storage.served import messages

STANDING = 256  # streams, most of which rest
PART_BYTES = 2**20  # of what is sent at once, but for its last sequence

_SHAPE = {"sequences": {"dump": str, "snapshot": int, "kinds": [str]}}


class SequenceStreams:
    """Answers clients that ask for sequences.

    Args:
        slots: how many are answered at once.
        watch: over the streams.
    """

    def __init__(self, slots: Slots, watch: Watch):
        self._slots, self._watch = slots, watch
        self.standing = Slots("streams that stand", STANDING, 0.0)

    def answer(self, context: Any, call: Call, store: ServedStore, command: bytes, reader: Any, writer: Any) -> None:
        """Serve a stream to its end.

        Raises:
            InputError: what is asked for is not there, or this is no request.
            BusyError: as many are answered as may be.
            StoreError: the dump has other sequences than the client knows.
        """
        request = from_bytes(command, _SHAPE)["sequences"]
        dump, snapshot, kinds = request["dump"], request["snapshot"], tuple(request["kinds"])
        call.facts["dump"] = dump[:100]
        with store.reader(dump, snapshot) as found:
            check_kinds(found, kinds)
            encoder = Encoder(found.manifest, kinds)
        leave = self.standing.take()
        line = _Line(writer)
        try:
            writer.begin(encoder.schema)
            with self._watch.over(context, line.end) as watched:
                while not watched.ended:
                    with watched.waiting():
                        ordinals = _asked(reader)
                    if ordinals is None or not line.begin(self._slots):
                        return
                    for part in _parts(store, dump, snapshot, kinds, ordinals):
                        batch, layouts = encoder.batch(part)
                        with watched.waiting():
                            if layouts is None:
                                writer.write_batch(batch)
                            else:
                                writer.write_with_metadata(batch, layouts)
                        call.sent(received_bytes(batch), len(part))
                        if watched.ended:
                            return
                    line.rest()
        finally:
            line.close()
            leave()


class _Line:
    """What a stream is at: it rests, or is being answered, or was told to hang up."""

    def __init__(self, writer: Any):
        self._writer = writer
        self._lock = threading.Lock()  # so that two threads never write at once, nor one after the stream's end
        self._rests, self._told = True, False
        self._give_back: Callable[[], None] = lambda: None

    def begin(self, slots: Slots) -> bool:
        """Take a slot for an answer (BusyError: there is none); False where the client was told to hang up."""
        with self._lock:
            self._rests = False
            if self._told:
                return False
        self._give_back = slots.take()
        return True

    def rest(self) -> None:
        """It was answered."""
        self._give_back()
        with self._lock:
            self._rests = True

    def close(self) -> None:
        """Nothing is written to it any more."""
        self._give_back()
        with self._lock:
            self._rests = False

    def end(self) -> None:
        """From another thread: give back its slot and, when it rests, have the client hang up."""
        self._give_back()
        # Where the network takes nothing, this waits; whoever watches the streams must not.
        threading.Thread(target=self._hang_up, name="hang up", daemon=True).start()

    def _hang_up(self) -> None:
        with self._lock:
            if self._rests:
                self._told = True
                with suppress(pa.ArrowException, OSError):
                    self._writer.write_metadata(messages.HANG_UP)


def _asked(reader: Any) -> list[int] | None:
    """The ordinals that are asked for next; None at the end (InputError: it is no request)."""
    try:
        chunk = reader.read_chunk()
    except StopIteration:
        return None
    data = b"" if chunk.app_metadata is None else chunk.app_metadata.to_pybytes()
    if chunk.data is not None or not data or len(data) % 8:
        raise InputError("sequences are asked for by their ordinals, int64, as the metadata of messages without data")
    if len(data) > 8 * messages.MAX_SEQUENCES:
        raise InputError(f"at most {messages.MAX_SEQUENCES:,} sequences are sent at once")
    ordinals: list[int] = np.frombuffer(data, "<i8").tolist()
    return ordinals


def _parts(
    store: ServedStore, dump: str, snapshot: int, kinds: tuple[str, ...], ordinals: Sequence[int]
) -> Iterator[list[tuple[int, dict[str, Packed | Arrays]]]]:
    """Sequences, as many at a time as have `PART_BYTES`."""
    at = 0
    while at < len(ordinals):
        found: list[tuple[int, dict[str, Packed | Arrays]]] = []
        size = 0
        with store.reader(dump, snapshot) as reader:
            while at < len(ordinals) and size < PART_BYTES:
                found.append(reader.packed(ordinals[at], kinds))
                size += sum(map(packed_bytes, found[-1][1].values()))
                at += 1
        yield found
