"""The page beside a server of stores, for those who have one of its tokens: `knowledge-store serve --page`."""

from __future__ import annotations

import threading

import uvicorn

from knowledge_store.configuration import ServeConfig
from knowledge_store.errors import InputError
from knowledge_store.page.app import page_app
from knowledge_store.page.browse import address_of, bound, configuration, host_names
from knowledge_store.storage import StorePlace
from knowledge_store.storage.served.address import is_loopback, split_host
from knowledge_store.storage.served.tokens import TokenFile
from knowledge_store.store import KnowledgeStore


class PageServer:
    """The page of a store, on a thread of its own until it is closed.

    Args:
        store: the store.
        config: the options of `serve`: where the page is, its certificate, and the limits of its SQL.
        tokens: what lets people in.

    Raises (on construction):
        InputError: the address cannot be used, or others could read the tokens on their way.
    """

    def __init__(self, store: StorePlace, config: ServeConfig, tokens: TokenFile):
        assert config.page is not None
        host, port = split_host(config.page, "--page")
        alone, scheme = is_loopback(host), "http" if config.tls_cert is None else "https"
        if config.tls_cert is None and not alone and not config.insecure:
            raise InputError(
                f"--page {config.page} can be reached from other machines, and without TLS whoever listens reads the tokens:"
                " give --tls-cert and --tls-key, or --insecure where nobody can"
            )
        listening = bound(host, port, f"--page {config.page}")
        app = page_app(
            KnowledgeStore.open(store),
            hosts=host_names(listening.getsockname()[1]) if alone else None,
            authenticator=lambda token: tokens.holder(token) is not None,
            memory_limit=config.memory_limit * 2**30,
            timeout=config.timeout,
        )
        self.address = address_of(listening, scheme)
        self._listening = listening
        self._server = uvicorn.Server(configuration(app, config.tls_cert, config.tls_key))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer no more."""
        self._server.should_exit = True
        self._thread.join()
        self._listening.close()
