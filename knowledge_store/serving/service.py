"""`knowledge-store serve`: the server from its options to its end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_store.configuration import ServeConfig
from knowledge_store.errors import InputError
from knowledge_store.serving.metrics import MetricsServer, json_line
from knowledge_store.serving.served import ServedStore
from knowledge_store.serving.server import Limits, StoreServer
from knowledge_store.sql.limits import check_limits
from knowledge_store.storage import StorePlace
from knowledge_store.storage.served.address import PLAIN, TLS, bracketed, is_loopback, is_served, split_host
from knowledge_store.storage.served.tokens import TokenFile

if TYPE_CHECKING:
    from knowledge_store.page.served import PageServer


def serve(config: ServeConfig, log: Callable[[str], None], ready: Callable[[str], None]) -> bool:
    """Serve stores until Ctrl-C. SIGHUP has the tokens read again.

    Args:
        config: the options.
        log: gets a line of JSON for each call, and for each time that the tokens are read again; one at a time.
        ready: gets a sentence for each store once it is served.

    Returns:
        Whether all calls have ended. One whose client takes nothing has not, and a process that ends as others do waits for it.

    Raises:
        InputError: an option, a token or a certificate cannot be used.
        StoreError, DamageError: a store cannot be opened.
    """
    host, port = split_host(config.bind, "--bind")
    certificate = _certificate(config)
    if certificate is None and not is_loopback(host) and not config.insecure:
        raise InputError(
            f"{host} can be reached from other machines, and without TLS whoever listens reads the tokens: give --tls-cert and"
            " --tls-key, or --insecure where nobody can"
        )
    limits = Limits(config.streams, config.queries, int(config.memory_limit * 2**30), config.timeout)
    check_limits(limits.memory_limit, limits.timeout)
    tokens = TokenFile(config.token_file)
    stores = _stores(config.stores)
    scheme = PLAIN if certificate is None else TLS

    lock = threading.RLock()  # a signal may come while its thread has it

    def say(facts: dict[str, Any]) -> None:
        with lock:
            log(json_line(facts))

    with contextlib.ExitStack() as held:
        server = StoreServer(f"{scheme}://{bracketed(host)}:{port}", stores, tokens, limits, say, certificate)
        held.callback(server.close)
        if config.metrics is not None:
            held.callback(_metrics(config.metrics, server).close)
        if config.page is not None:
            page = _page(config, tokens)
            held.callback(page.close)
            ready(f"The page is at {page.address}")
        for name, store in stores.items():
            path = f"/{name}" if len(stores) > 1 else ""
            ready(f"Serving {store.storage.address} at {scheme}://{bracketed(host)}:{server.port}{path}")
        with contextlib.suppress(KeyboardInterrupt):
            _wait(tokens, say)
    return server.ended


def _wait(tokens: TokenFile, say: Callable[[dict[str, Any]], None]) -> None:
    """Wait for Ctrl-C, and read the tokens again whenever it is asked for."""

    def read_again(number: int, frame: object) -> None:
        try:
            tokens.read_again()
        except InputError as error:
            say({"call": "tokens", "outcome": "refused", "reason": str(error)})
        else:
            say({"call": "tokens", "outcome": "ok"})

    before = signal.signal(signal.SIGHUP, read_again)
    try:
        threading.Event().wait()
    finally:
        signal.signal(signal.SIGHUP, before)


def _certificate(config: ServeConfig) -> tuple[bytes, bytes] | None:
    """Chain and key; None where there is to be no TLS (InputError: they cannot be used)."""
    if (config.tls_cert is None) != (config.tls_key is None):
        raise InputError("--tls-cert and --tls-key go together: give both")
    if config.tls_cert is None or config.tls_key is None:
        return None
    parts = []
    for option, path in (("--tls-cert", config.tls_cert), ("--tls-key", config.tls_key)):
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise InputError(f"{option} {path} cannot be read: {error.strerror}") from None
        if b"-----BEGIN " not in data:
            raise InputError(f"{option} {path} is no PEM file: it has no line that begins with -----BEGIN")
        parts.append(data)
    return parts[0], parts[1]


def _stores(places: tuple[StorePlace, ...]) -> dict[str, ServedStore]:
    """The stores by the last part of their names (InputError: two have the same)."""
    stores: dict[str, ServedStore] = {}
    for place in places:
        if is_served(place):
            raise InputError(f"{place} is served already: its clients open it there")
        address = place if isinstance(place, str | Path) else place.address
        whole = str(address).partition("?")[0] if "://" in str(address) else str(Path(address).resolve())
        name = whole.rstrip("/").rpartition("/")[2]
        if name in stores:
            raise InputError(f"two of the stores are called {name}: clients would not know which is meant; rename one")
        stores[name] = ServedStore(place)
    return stores


def _page(config: ServeConfig, tokens: TokenFile) -> PageServer:
    if len(config.stores) > 1:
        raise InputError("--page shows one store, and there are several: serve those that are to be looked at by themselves")
    try:
        from knowledge_store.page.served import PageServer
    except ImportError as error:
        raise InputError(f"--page needs {error.name}: pip install 'knowledge-store[serve]'") from None
    return PageServer(config.stores[0], config, tokens)


def _metrics(address: str, server: StoreServer) -> MetricsServer:
    host, port = split_host(address, "--metrics")
    try:
        return MetricsServer(host, port, server.metrics)
    except OSError as error:
        server.close()
        raise InputError(f"--metrics {address} cannot be listened at: {error.strerror or error}") from None
