"""The page on this machine: what `knowledge-store browse` starts."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import uvicorn

from knowledge_store.errors import InputError
from knowledge_store.page.access import Access
from knowledge_store.page.app import page_app
from knowledge_store.sql.named_files import NamedFiles
from knowledge_store.store import KnowledgeStore

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
HTTP_PORT = 80
LAST_PORT = 65535


def parse_address(text: str) -> tuple[str, int]:
    """The host and port of "127.0.0.1:8816" or "[::1]:8816".

    Raises:
        InputError: it is not these two.
    """
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= LAST_PORT):
        raise InputError(f"an address is HOST:PORT, such as 127.0.0.1:8816, and not {text!r}")
    return host, int(port)


def host_names(port: int) -> list[str]:
    """What a browser on this machine may call the page in `Host`."""
    names = [f"{name}:{port}" for name in LOOPBACK]
    return [*names, *LOOPBACK] if port == HTTP_PORT else names


def listen(address: str) -> socket.socket:
    """A socket that listens on an address of this machine alone.

    Raises:
        InputError: others could reach it too, or it is taken or none of this machine's.
    """
    host, port = parse_address(address)
    try:
        alone = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        alone = False
    if not alone:
        raise InputError(
            f"--bind {address} could be reached from other machines, and this page asks for no token: bind an address of this"
            " machine, such as 127.0.0.1:8816, or serve the store with `knowledge-store serve --page`"
        )
    return bound(host, port, f"--bind {address}")


def bound(host: str, port: int, named: str) -> socket.socket:
    """A socket that listens (InputError: it cannot; `named` is what says where)."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(f"{named} cannot be used ({error.strerror}): give another port") from None


def has_browser() -> bool:
    """Whether a browser that is opened here would be seen by whoever started this."""
    if "SSH_CONNECTION" in os.environ:
        return False
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def browse(
    store: KnowledgeStore, listening: socket.socket, files: NamedFiles, announce: Callable[[str], None], opens: bool
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        store: the store.
        listening: from `listen`.
        files: as of `page_app`.
        announce: told the address when it can be asked.
        opens: whether to open it in a browser.

    Raises:
        InputError: a file cannot be used.
    """
    app = page_app(store, hosts=host_names(listening.getsockname()[1]), files=files)
    address = address_of(listening)
    announce(address)
    if opens and has_browser():
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
    with suppress(KeyboardInterrupt):  # how it is meant to end
        uvicorn.Server(configuration(app)).run(sockets=[listening])


def address_of(listening: socket.socket, scheme: str = "http") -> str:
    """What a browser opens."""
    host, port = listening.getsockname()[:2]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/"


def configuration(app: Access, certificate: Path | None = None, key: Path | None = None) -> uvicorn.Config:
    """How the page is served. There is no access log: addresses name what somebody looked at."""
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=1,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
