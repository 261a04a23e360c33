"""The address of a served store: `grpc+tls://host:port`, and behind it the store's name where several are served there."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from knowledge_store.errors import InputError

PLAIN, TLS = "grpc", "grpc+tls"
SCHEMES = (PLAIN, TLS)
_STORE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Address:
    """Where a store is served.

    Attributes:
        location: scheme, host and port, as Flight takes them.
        store: which of the stores there; empty where there is only one.
    """

    location: str
    store: str = ""

    def __str__(self) -> str:
        return f"{self.location}/{self.store}" if self.store else self.location


def is_served(store: object) -> bool:
    """Whether a place for a store is the address of a served one."""
    return isinstance(store, str) and store.partition("://")[0] in SCHEMES and "://" in store


def parse_address(text: str) -> Address:
    """The address that a text is.

    Raises:
        InputError: it is none.
    """
    example = "write it as grpc+tls://host:8815, and with /NAME behind it where several stores are served there"
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InputError(f"{text!r} is no address of a served store ({error}): {example}") from None
    store = parts.path.strip("/")
    if parts.username is not None or parts.password is not None:
        raise InputError("the address of a served store holds no token: give it by a file, or the environment")
    if parts.scheme not in SCHEMES or not host or port is None or parts.query or parts.fragment:
        raise InputError(f"{text!r} is no address of a served store: {example}")
    if store and not _STORE.fullmatch(store):
        raise InputError(f"{store!r} is no name of a served store: {example}")
    return Address(f"{parts.scheme}://{bracketed(host)}:{port}", store)


def bracketed(host: str) -> str:
    """A host as it stands before a port."""
    return f"[{host}]" if ":" in host else host


def split_host(text: str, option: str) -> tuple[str, int]:
    """Host and port of `host:port`; port 0 has the system choose one.

    Raises:
        InputError: it is none; names the option.
    """
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InputError(f"{option} is {text!r}: write it as host:port, such as 127.0.0.1:8815")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host that a server listens at."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
