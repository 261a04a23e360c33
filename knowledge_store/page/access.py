"""Which requests are answered: those that name this server by its own name, come from its own page, and are signed in where a
token is asked for.

A web site that a person visits can have the browser ask any address of this machine. It cannot read the answer, unless its own
name stands for that address too (DNS rebinding): then the request has that name in `Host`. So `Host` is checked, also on
loopback, and a request that another site caused is refused by `Origin` and `Sec-Fetch-Site`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

Authenticator = Callable[[str], bool]

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
PUBLIC = ("/", "/sign-in")
STATIC = "/static/"
SESSION_SECONDS = 12 * 3600
MAX_SESSIONS = 1000
MAX_BODY = 1_000_000  # bytes


class Sessions:
    """Who has shown the token: random names that browsers keep in a cookie.

    Args:
        accepts: says whether a token is the right one.
    """

    def __init__(self, accepts: Authenticator):
        self._accepts = accepts
        self._begun: dict[str, tuple[float, str]] = {}

    def begin(self, token: str) -> str | None:
        """A new session's name, where the token is accepted."""
        if not self._accepts(token):
            return None
        while len(self._begun) >= MAX_SESSIONS:
            del self._begun[next(iter(self._begun))]
        name = secrets.token_urlsafe(32)
        self._begun[name] = (time.monotonic() + SESSION_SECONDS, token)
        return name

    def known(self, name: str) -> bool:
        """Whether a session has begun and not ended: with its time, or as its token is taken back."""
        until, token = self._begun.get(name, (0.0, ""))  # a name is of 256 random bits: how long this takes says nothing
        return until > time.monotonic() and self._accepts(token)


def cookie_name(headers: Headers) -> str:
    """The cookie of this server: browsers send the cookies of all ports of a host to each."""
    _, _, port = headers.get("host", "").rpartition(":")
    return f"knowledge-store-{port}" if port.isdigit() else "knowledge-store"


class Access:
    """The ASGI application behind these checks; all responses have HEADERS.

    Args:
        app: the application.
        hosts: what `Host` may be, in small letters; None for any, where a token is asked for.
        sessions: who is signed in; None where no token is asked for.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None, sessions: Sessions | None):
        self._app, self._hosts, self._sessions = app, hosts, sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send_with_headers)
        else:
            status, sentence = refusal
            await JSONResponse({"error": sentence}, status)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers, path = Headers(scope=scope), scope["path"]
        named = [host.lower() for host in headers.getlist("host")]
        if scope["type"] != "http" or len(named) != 1 or (self._hosts is not None and named[0] not in self._hosts):
            names = " or ".join(sorted(self._hosts or ())) or "its name"
            return 421, f"this server answers as {names} alone: open that address"
        for origin in headers.getlist("origin"):
            if origin.lower() not in (f"http://{named[0]}", f"https://{named[0]}"):
                return 403, "this request comes from another site, and is refused"
        # A link of another page may lead here, and nothing else of it may.
        linked = path == "/" and headers.get("sec-fetch-mode", "navigate") == "navigate"
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none") and not linked:
            return 403, "this request comes from another site, and is refused"
        if self._sessions is None or path in PUBLIC or path.startswith(STATIC):
            return None
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(cookie_name(headers))
        except CookieError:
            cookie = None
        if cookie is None or not self._sessions.known(cookie.value):
            return 401, "give the token of this server"
        return None
