"""The page's server: an application of starlette over an open store."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from knowledge_store.catalogue.dumps import open_dumps
from knowledge_store.errors import InputError, KnowledgeStoreError
from knowledge_store.page.access import MAX_BODY, SESSION_SECONDS, Access, Authenticator, Sessions, cookie_name
from knowledge_store.page.answers import Page
from knowledge_store.page.questions import QUESTIONS, statement
from knowledge_store.sql.isolated import isolated_excerpt
from knowledge_store.sql.limits import MEMORY_LIMIT
from knowledge_store.sql.named_files import NamedFiles, checked_files
from knowledge_store.sql.statement import Statement
from knowledge_store.storage import Storage
from knowledge_store.store import KnowledgeStore

AT_ONCE = 2  # statements in processes of their own; others wait
ANSWERED_AT_ONCE = 4  # of the page's own
TIMEOUT = 3600.0  # seconds of a statement that a person can stop
LOOKED_AFTER = 0.2  # seconds between two looks whether the asker has gone
REFUSED_AFTER = 1.0  # seconds, so that nobody tries many tokens
LARGEST_ID = 2**63 - 1
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


def page_app(
    store: KnowledgeStore,
    *,
    hosts: Iterable[str] | None,
    files: NamedFiles | None = None,
    authenticator: Authenticator | None = None,
    memory_limit: float = MEMORY_LIMIT,
    timeout: float = TIMEOUT,
) -> Access:
    """The page over a store, as an ASGI application.

    Args:
        store: the store; its dumps are looked at again whenever the page is loaded.
        hosts: what the header `Host` may be ("127.0.0.1:8816"); None for any, which takes an authenticator.
        files: Parquet files that statements may read too, by their names; those that `student-train evaluate --keep-positions`
            wrote are shown beside the teacher's predictions.
        authenticator: says whether a token is the right one; with None the page is for whoever reaches it.
        memory_limit, timeout: in bytes and seconds, of a statement that a person runs.

    Raises:
        InputError: a file cannot be used, or `hosts` is None without an authenticator.
    """
    if hosts is None and authenticator is None:
        raise InputError("a page that answers under any name has to ask for a token: name its hosts, or give an authenticator")
    sessions = None if authenticator is None else Sessions(authenticator)
    server = _Server(store.storage, checked_files(files), sessions, memory_limit, timeout)
    names = None if hosts is None else frozenset(host.lower() for host in hosts)
    return Access(Starlette(routes=server.routes()), names, server.sessions)


class _Server:
    def __init__(
        self, storage: Storage, files: Mapping[str, str], sessions: Sessions | None, memory_limit: float, timeout: float
    ):
        self._storage, self._files, self.sessions = storage, files, sessions
        self._limits = memory_limit, timeout
        self._page = Page(open_dumps(storage), files)
        folder = resources.files("knowledge_store.page") / "static"
        self._static = {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.is_file()}
        self._statements = asyncio.Semaphore(AT_ONCE)
        self._answers = asyncio.Semaphore(ANSWERED_AT_ONCE)

    def routes(self) -> list[Route]:
        return [
            Route("/", self._home),
            Route("/static/{name}", self._file),
            Route("/sign-in", self._sign_in, methods=["POST"]),
            Route("/api/store", self._answered(self._store)),
            Route("/api/dump", self._answered(lambda asked: self._page.dump(asked["dump"]))),
            Route("/api/sequences", self._answered(lambda asked: self._page.sequences(asked["dump"], _number(asked, "page")))),
            Route("/api/sequence", self._answered(self._sequence)),
            Route("/api/position", self._answered(self._position)),
            Route("/api/question", self._answered(self._question)),
            Route("/api/sql", self._sql, methods=["POST"]),
        ]

    async def _home(self, request: Request) -> Response:
        return Response(self._static["page.html"], media_type="text/html")

    async def _file(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._static:
            return JSONResponse({"error": "there is no such file"}, 404)
        return Response(self._static[name], media_type=TYPES[name.rpartition(".")[2]])

    async def _sign_in(self, request: Request) -> Response:
        if self.sessions is None:
            return JSONResponse({"error": "this page asks for no token"}, 404)
        try:
            session = self.sessions.begin(str((await _body(request)).get("token", "")))
        except InputError as error:
            return JSONResponse({"error": str(error)}, 400)
        if session is None:
            await asyncio.sleep(REFUSED_AFTER)
            return JSONResponse({"error": "that is not the token of this server"}, 401)
        response = JSONResponse({})
        response.set_cookie(
            cookie_name(request.headers), session, max_age=SESSION_SECONDS, httponly=True, samesite="strict",
            secure=request.url.scheme == "https",
        )  # fmt: skip
        return response

    def _answered(self, answer: Callable[[Mapping[str, str]], Any]) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint that answers from its parameters, on a thread."""

        async def endpoint(request: Request) -> Response:
            try:
                async with self._answers:
                    found = await run_in_threadpool(answer, request.query_params)
                return JSONResponse(found)
            except KeyError as error:
                return JSONResponse({"error": f"this address lacks {error}"}, 400)
            except KnowledgeStoreError as error:
                return JSONResponse({"error": str(error)}, 400 if isinstance(error, InputError) else 500)

        return endpoint

    def _store(self, asked: Mapping[str, str]) -> Any:
        self._page = Page(open_dumps(self._storage), self._files)  # with what was committed meanwhile
        return {
            **self._page.store(),
            "questions": {name: {"title": q.title, "words": q.words, "needs": q.needs, "picture": q.picture}
                          for name, q in QUESTIONS.items()},
        }  # fmt: skip

    def _sequence(self, asked: Mapping[str, str]) -> Any:
        return self._page.sequence(asked["dump"], _number(asked, "id"), _number({"from": "0", **asked}, "from"))

    def _position(self, asked: Mapping[str, str]) -> Any:
        return self._page.position(asked["dump"], _number(asked, "id"), _number(asked, "position"))

    def _question(self, asked: Mapping[str, str]) -> Any:
        about = self._page.asked(asked["dump"], *(asked.get(name, "") for name in ("column", "text", "other")))
        return {"sql": statement(asked["name"], about)}

    async def _sql(self, request: Request) -> Response:
        try:
            sql = (await _body(request)).get("sql")
        except InputError as error:
            return JSONResponse({"error": str(error)}, 400)
        if not isinstance(sql, str):
            return JSONResponse({"error": "give a statement as `sql`"}, 400)
        return StreamingResponse(self._lines(request, sql), media_type="application/x-ndjson")

    async def _lines(self, request: Request, sql: str) -> AsyncIterator[bytes]:
        """The progress of a statement and then its answer or error, a JSON object a line. It ends when nobody listens."""
        loop, stopped = asyncio.get_running_loop(), threading.Event()
        messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

        def say(message: dict[str, Any]) -> None:
            loop.call_soon_threadsafe(messages.put_nowait, message)

        def ask() -> None:
            # On a thread of its own: its process ends with it.
            try:
                say({"answer": self._isolated(sql, stopped, lambda read, of: say({"read": read, "of": of}))})
            except KnowledgeStoreError as error:
                say({"error": str(error)})
            except Exception as error:  # the person is told, rather than left waiting
                say({"error": f"the server failed: {type(error).__name__}: {error}"})

        try:
            yield _line({"waiting": self._statements.locked()})
            async with self._statements:
                started = loop.time()
                asking = threading.Thread(target=ask, daemon=True)
                asking.start()
                while True:
                    try:
                        message = await asyncio.wait_for(messages.get(), LOOKED_AFTER)
                    except TimeoutError:
                        message = {}
                    if await request.is_disconnected():
                        break
                    yield _line({**message, "seconds": round(loop.time() - started, 3)})
                    if "answer" in message or "error" in message:
                        break
        finally:
            stopped.set()

    def _isolated(self, sql: str, stopped: threading.Event, hear: Callable[[int, int], None]) -> dict[str, Any] | None:
        statement = Statement(sql, *self._limits, files=self._files)
        return isolated_excerpt(self._storage.address, statement, stopped, hear)


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _number(asked: Mapping[str, str], name: str) -> int:
    """A parameter that is a whole number (InputError: it is none; KeyError: there is none)."""
    text = asked[name]
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= LARGEST_ID):
        raise InputError(f"{name} is {text!r}, and must be a whole number")
    return int(text)


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object that a request brings (InputError: it brings none)."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise InputError("send JSON, as application/json")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise InputError(f"a request has at most {MAX_BODY:,} bytes")
    try:
        found = json.loads(body)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError("send a JSON object")
    return found
