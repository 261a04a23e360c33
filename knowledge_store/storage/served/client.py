"""A served store as its clients see it: a storage that is only read, with its facts and answers to SQL.

A call that breaks is made again, until the server answers or patience ends: what is asked for says itself what it is, so that
nothing is lost or repeated. A process that was forked after a call cannot make one (the library's threads are not forked):
loaders start their workers by `spawn` or `forkserver`.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from knowledge_store.errors import InputError, KnowledgeStoreError, StoreError
from knowledge_store.quantities import duration
from knowledge_store.reporter import SILENT, Reporter
from knowledge_store.storage.protocol import Entry
from knowledge_store.storage.served import messages
from knowledge_store.storage.served.address import PLAIN, TLS, parse_address
from knowledge_store.storage.served.messages import BusyError, library_error, to_bytes
from knowledge_store.storage.served.tokens import ENVIRONMENT, environment_token, read_tokens

if TYPE_CHECKING:
    from pyarrow import flight


FIRST_PATIENCE = 3.0  # seconds in which a server that was never reached has to answer
PATIENCE = 120.0  # the same of one that is away
WAITS = (0.1, 5.0)  # seconds between two attempts, the first and the longest
SAID_SECONDS = 30.0  # between two times that waiting is told of
CALL_SECONDS = 120.0  # of a call that answers with little
BLOCK = 2**20  # bytes of a file, asked for at once
BLOCKS = 16  # kept

ROOTS = "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"

Made = TypeVar("Made")


class ServedStorage:
    """The files of a served store (see `Storage`).

    Args:
        address: where it is served.
        token_file: a file of the token; None takes the token from the environment variable KNOWLEDGE_STORE_TOKEN.
        reporter: hears when the server is waited for.

    Raises (on construction):
        InputError: the address or the token cannot be used.
    """

    forkable = False  # the library's threads are not in a forked process, which waits for them for ever
    at_once = 8

    def __init__(self, address: str, token_file: str | Path | None = None, reporter: Reporter = SILENT):
        self._place = parse_address(address)
        self.address = str(self._place)
        self._token_file = None if token_file is None else str(token_file)
        self._secret = self._token()
        self.reporter = reporter
        self._begin()

    def _begin(self) -> None:
        self._client: flight.FlightClient | None = None
        self._lock = threading.Lock()
        self._reached = False
        self._process = os.getpid()
        self._block = lru_cache(BLOCKS)(self._read_block)

    def __getstate__(self) -> dict[str, Any]:
        # The token too: a worker may have the environment of a process that began before it was set.
        return {name: self.__dict__[name] for name in ("_place", "address", "_token_file", "_secret", "reporter")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._begin()

    def __repr__(self) -> str:
        return f"ServedStorage({self.address!r})"

    # Calls

    _secret = ""

    def _token(self) -> str:
        """The token, as it stands now: the file may be another one by the time of the next call."""
        if self._token_file is not None:
            return read_tokens(self._token_file)[0].secret
        text = os.environ.get(ENVIRONMENT, "")
        if not text.strip():
            if self._secret:
                return self._secret
            raise InputError(
                f"a served store asks for a token: put it into the environment variable {ENVIRONMENT}, or name its file"
                " (commands take --token-file, Python `token_file=`)"
            )
        return environment_token(text)

    def connection(self) -> flight.FlightClient:
        """The connection of this process.

        Raises:
            StoreError: this process was forked from one that had a connection.
        """
        from pyarrow import flight

        if self._process != os.getpid():
            raise StoreError(
                f"this process was forked from one that reads {self.address}, and cannot read it: start it by spawn or"
                ' forkserver, as in DataLoader(…, multiprocessing_context="spawn")'
            )
        with self._lock:
            if self._client is None:
                os.environ.setdefault(*messages.QUIET)
                _check_roots()
                self._client = flight.FlightClient(self._place.location)
            return self._client

    def options(self, seconds: float | None = CALL_SECONDS) -> flight.FlightCallOptions:
        """Of a call: who calls, and about which store."""
        from pyarrow import flight

        headers = [(messages.AUTHORIZATION.encode(), f"{messages.BEARER}{self._token()}".encode())]
        if self._place.store:
            headers.append((messages.STORE_HEADER.encode(), self._place.store.encode()))
        return flight.FlightCallOptions(timeout=seconds, headers=headers)

    def close(self) -> None:
        """Close the connection; it is opened again when something is asked for."""
        with self._lock:
            if self._client is not None and self._process == os.getpid():
                self._client.close()
            self._client = None

    def attempts(self) -> Attempts:
        """Attempts at one call (see `Attempts`)."""
        return Attempts(self)

    def called(self, what: str, request: dict[str, Any]) -> list[bytes]:
        """The results of an action.

        Raises:
            KnowledgeStoreError: what the server said, or it does not answer.
        """
        from pyarrow import flight

        def call() -> list[bytes]:
            action = flight.Action(what, to_bytes(request))
            return [result.body.to_pybytes() for result in self.connection().do_action(action, self.options())]

        return self.attempts().of(call)

    # As of `Storage`

    @property
    def cache_key(self) -> str:
        return self.address

    def locate(self, name: str) -> str:
        return f"{self.address}/{name}"

    def external_address(self, name: str) -> str:
        raise InputError(f"no other program opens files of {self.address}, which is a served store: ask it by ADBC")

    def size(self, name: str) -> int:
        return int(json.loads(self.called(messages.SIZE, {"name": name})[0]))

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        parts, at = [], start
        while end is None or at < end:
            number, skipped = divmod(at, BLOCK)
            block = self._block(name, number)
            part = block[skipped : None if end is None else skipped + end - at]
            parts.append(part)
            at += len(part)
            if len(block) < BLOCK and at >= number * BLOCK + len(block):
                break
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_block(self, name: str, number: int) -> bytes:
        span = {"start": number * BLOCK, "end": (number + 1) * BLOCK}
        return self.called(messages.READ, {"name": name, **span})[0]

    def files(self, prefix: str) -> list[Entry]:
        return [Entry(*entry) for entry in json.loads(self.called(messages.FILES, {"name": prefix})[0])]

    def folders(self, prefix: str) -> list[str]:
        return list(json.loads(self.called(messages.FOLDERS, {"name": prefix})[0]))

    def version(self, name: str) -> str:
        return str(self.size(name))

    def leftovers(self, prefix: str) -> list[str]:
        return []

    def _refused(self, *what: Any) -> Any:
        """What would write (InputError)."""
        raise InputError(f"{self.address} is a served store, which is only read: write to its folder, where it is served")

    probe = create = replace = make_lasting = remove = remove_folder = rename_folder = _refused
    exclusive_lock = remove_leftovers = _refused


class Attempts:
    """Attempts at a call, with longer and longer waits between them, until patience ends.

    Args:
        storage: what is called.
    """

    def __init__(self, storage: ServedStorage):
        self._storage = storage
        self._wait = WAITS[0]
        self._since: float | None = None
        self._waited_since = self._said = 0.0  # 0 where nothing was told

    def of(self, call: Callable[[], Made]) -> Made:
        """What a call gives, in the attempt in which it does.

        Raises:
            KnowledgeStoreError: what the server said, or it does not answer.
        """
        while True:
            try:
                result = call()
            except KnowledgeStoreError:
                raise
            except Exception as error:
                self.failed(error)
            else:
                self.succeeded()
                return result

    def succeeded(self) -> None:
        """The server answered."""
        self._storage._reached = True
        self._wait, self._since = WAITS[0], None
        if self._said:
            waited = duration(time.monotonic() - self._waited_since)
            self._storage.reporter.note(f"{self._storage.address} answers again after {waited}: reading goes on.")
            self._said = 0.0

    def waiting(self, why: str, left: float) -> None:
        """Tell that the server is waited for, and so many seconds more; not more often than every `SAID_SECONDS`."""
        now = time.monotonic()
        if not self._said:
            self._waited_since = now
        if not self._said or now - self._said >= SAID_SECONDS:
            self._said = now
            self._storage.reporter.note(f"Waiting for {self._storage.address} for up to {duration(left)} more: {why}.")

    def failed(self, error: Exception) -> None:
        """Wait for the next attempt.

        Raises:
            KnowledgeStoreError: there is to be none.
        """
        import pyarrow as pa
        from pyarrow import flight

        said = library_error(error)
        if said is not None and not isinstance(said, BusyError):
            raise said from None
        if isinstance(error, (flight.FlightUnauthenticatedError, flight.FlightUnauthorizedError)):
            reason = str(error).partition(". Detail:")[0]
            raise InputError(f"{self._storage.address} lets nobody in with this token: {reason}") from None
        if not isinstance(error, (pa.ArrowException, OSError)):
            raise error
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        patience = PATIENCE if self._storage._reached or said else FIRST_PATIENCE
        if now - self._since > patience:
            raise (said or self.lost(error)) from None
        if patience == PATIENCE:
            self.waiting(str(said) if said else f"it does not answer ({_reason(error)})", patience - (now - self._since))
        time.sleep(self._wait)
        self._wait = min(2 * self._wait, WAITS[1])
        if said is None:
            self._storage.close()

    def lost(self, error: Exception) -> StoreError:
        """What to say of a server that does not answer."""
        reason = _reason(error)
        advice = "is `knowledge-store serve` running there, and the address right?"
        if "certificate" in reason:
            advice = f"name a file of the authority's certificate in {ROOTS}, and the host as its certificate does"
        elif "wrong version number" in reason:
            advice = f"it is served without TLS, as {PLAIN}://"
        elif reason.endswith("Socket closed") and self._storage.address.startswith(f"{PLAIN}://"):
            advice = f"is it served with TLS, as {TLS}://?"
        return StoreError(f"{self._storage.address} does not answer ({reason}): {advice}")


def _reason(error: Exception) -> str:
    """What the library says of a call that failed, without what it says of itself."""
    return str(error).partition(". Detail:")[0].partition("gRPC client debug context")[0].strip(" .")[:300]


def _check_roots() -> None:
    path = os.environ.get(ROOTS)
    if path and not os.access(path, os.R_OK):
        raise InputError(f"{ROOTS} names {path}, which cannot be read: name a file of certificates, PEM, or leave it out")
