"""How much a server does at once, and the watch over its calls: who asks no more is served no more.

A call holds one of a number of slots. One thread looks at all calls that are watched, several times a second: a call whose
client has gone or cancelled is ended, and so is one whose client takes nothing for a minute. It is looked at from a thread of
its own because the one that serves it may be waiting: for the first row of a query, or for a client to read.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from knowledge_store.storage.served.messages import BusyError

INTERVAL = 0.1  # seconds between two looks at a call
STALLED = 60.0  # seconds after which a client that takes nothing is given up
ENDING = "the server is ending"


class Slots:
    """So many calls of a sort at once.

    Args:
        name: what the calls are, for the refusal, and the option that says how many.
        count: how many.
        patience: seconds that one more waits before it is refused.
    """

    def __init__(self, name: str, count: int, patience: float):
        self.name, self.count, self.patience = name, count, patience
        self._free = threading.Semaphore(count)
        self._lock = threading.Lock()
        self.taken = 0
        self.refused = 0

    def take(self) -> Callable[[], None]:
        """Take a slot; what is returned gives it back, once however often it is called.

        Raises:
            BusyError: there is none.
        """
        if not self._free.acquire(timeout=self.patience):
            with self._lock:
                self.refused += 1
            raise BusyError(f"the server answers {self.count} {self.name} at once, and all are taken: ask again later")
        with self._lock:
            self.taken += 1
        held = [True]

        def give_back() -> None:
            with self._lock:
                if not held:
                    return
                held.clear()
                self.taken -= 1
            self._free.release()

        return give_back


@dataclass
class Watched:
    """A call that is watched.

    Attributes:
        context: Flight's, of the call.
        end: ends what is done for it; called from the watching thread, once.
        waiting_since: since when its client has to take something; None while the server works.
        ended: why it was ended; empty while it was not.
    """

    context: Any
    end: Callable[[], None]
    waiting_since: float | None = None
    ended: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While the client has to take something."""
        self.waiting_since = time.monotonic()
        yield
        self.waiting_since = None


class Watch:
    """The thread that looks at calls; see above."""

    def __init__(self, stalled: float = STALLED):
        self._stalled = stalled
        self._calls: list[Watched] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def close(self) -> None:
        """End all calls, and look no more."""
        self._closed.set()
        with self._lock:
            calls = list(self._calls)
        for call in calls:
            _end(call, ENDING)

    @contextmanager
    def over(self, context: Any, end: Callable[[], None]) -> Iterator[Watched]:
        """Watch a call. Its context is not looked at after this one has ended."""
        call = Watched(context, end)
        with self._lock:
            self._calls.append(call)
        if self._closed.is_set():
            _end(call, ENDING)
        try:
            yield call
        finally:
            with call.lock:
                call.context = None
            with self._lock:
                self._calls.remove(call)

    def _look(self) -> None:
        while not self._closed.wait(INTERVAL):
            with self._lock:
                calls = list(self._calls)
            for call in calls:
                if reason := self._reason(call):
                    _end(call, reason)

    def _reason(self, call: Watched) -> str:
        with call.lock:
            if call.context is None:
                return ""
            if call.context.is_cancelled():
                return "its client has gone"
        since = call.waiting_since
        return "its client took nothing" if since is not None and time.monotonic() - since > self._stalled else ""


def _end(call: Watched, reason: str) -> None:
    """End what is done for a call, if it was not ended before."""
    if not call.ended:
        call.ended = reason
        call.end()
