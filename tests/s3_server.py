"""A small server of S3's language, in memory, for tests: conditional PUTs, ranges, listings by pages, and faults on demand."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 1000  # names in an answer to a listing, as on S3
Fault = Callable[[str, str], str | None]  # of a request's method and key: "503", "403", "drop", "stall", or None


class S3Server:
    """Objects by key, of one bucket `bucket`.

    Attributes:
        objects: the bytes of each.
        heeds: whether `If-None-Match: *` is; where it is not, whoever comes last has written.
        fault: what is to go wrong.
        requests: how many there were, by "GET", "LIST", "HEAD", "PUT", "DELETE".
        sent: bytes of objects that were sent.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.written: dict[str, float] = {}
        self.heeds = True
        self.fault: Fault = lambda method, key: None
        self.lock = threading.Lock()
        self.forget()
        handler = type("Handler", (_Handler,), {"s3": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def forget(self) -> None:
        """Count from nothing."""
        self.requests: Counter[str] = Counter()
        self.sent = 0

    def count(self, what: str, sent: int = 0) -> None:
        with self.lock:
            self.requests[what] += 1
            self.sent += sent

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server for as long as this context lasts."""
    server = S3Server()
    try:
        yield server
    finally:
        server.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    s3: S3Server

    def log_message(self, *arguments: object) -> None:
        pass

    def _begin(self) -> tuple[str, dict[str, list[str]], bytes, str | None]:
        """Key, query and body of the request, and what is to go wrong with it."""
        url = urlsplit(self.path)
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if bucket != "bucket":
            return key, {}, body, "no bucket"
        return key, parse_qs(url.query, keep_blank_values=True), body, self.s3.fault(self.command, key)

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.get("length", str(len(body))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()

    def _error(self, status: int, code: str) -> None:
        self._answer(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())

    def _failed(self, fault: str | None) -> bool:
        if fault == "no bucket":
            self._error(404, "NoSuchBucket")
        elif fault == "stall":
            time.sleep(3600)
        elif fault == "drop":
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(2)
        elif fault is not None and fault.isdecimal():
            self._error(int(fault), {"503": "SlowDown", "403": "SignatureDoesNotMatch"}.get(fault, "Error"))
        else:
            return False
        return True

    def do_GET(self) -> None:
        key, query, _, fault = self._begin()
        self.s3.count("GET" if key else "LIST")
        if self._failed(fault):
            return
        if not key:
            self._list(query)
            return
        data = self.s3.objects.get(key)
        if data is None:
            self._error(404, "NoSuchKey")
            return
        headers = {"ETag": _etag(data), "Last_Modified": self.date_time_string(self.s3.written[key])}
        status, start, end = 200, 0, len(data)
        if "Range" in self.headers:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            start = int(first)
            end = min(int(last) + 1 if last else len(data), len(data))
            if start >= len(data):
                self._error(416, "InvalidRange")
                return
            status, headers["Content_Range"] = 206, f"bytes {start}-{end - 1}/{len(data)}"
        part = data[start:end]
        with self.s3.lock:
            self.s3.sent += len(part)
        if fault == "half":  # the connection breaks in the middle of the answer
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self._answer(status, part, **headers)

    def do_HEAD(self) -> None:
        key, _, _, fault = self._begin()
        self.s3.count("HEAD")
        if self._failed(fault):
            return
        data = self.s3.objects.get(key)
        if data is None:
            self._answer(404)
            return
        self._answer(200, ETag=_etag(data), Last_Modified=self.date_time_string(self.s3.written[key]), length=str(len(data)))

    def do_PUT(self) -> None:
        key, _, body, fault = self._begin()
        self.s3.count("PUT")
        if self._failed(fault):
            return
        with self.s3.lock:
            if self.s3.heeds and self.headers.get("If-None-Match") == "*" and key in self.s3.objects:
                self._error(412, "PreconditionFailed")
                return
            self.s3.objects[key], self.s3.written[key] = body, time.time()
        if fault == "drop after":  # what it did nobody hears
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self._answer(200, ETag=_etag(body))

    def do_DELETE(self) -> None:
        key, _, _, fault = self._begin()
        self.s3.count("DELETE")
        if not self._failed(fault):
            self.s3.objects.pop(key, None)
            self._answer(204)

    def do_POST(self) -> None:  # DeleteObjects
        _, _, body, fault = self._begin()
        self.s3.count("DELETE")
        if self._failed(fault):
            return
        keys = [part.partition("</Key>")[0] for part in body.decode().split("<Key>")[1:]]
        for key in keys:
            self.s3.objects.pop(key, None)
        deleted = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
        self._answer(200, f"<DeleteResult>{deleted}</DeleteResult>".encode())

    def _list(self, query: dict[str, list[str]]) -> None:
        prefix, after = query.get("prefix", [""])[0], query.get("continuation-token", [""])[0]
        divided = "delimiter" in query
        found: dict[str, bool] = {}  # keys, and prefixes that stand for more
        for key in sorted(self.s3.objects):
            if key.startswith(prefix):
                rest, slash, _ = key[len(prefix) :].partition("/")
                found[f"{prefix}{rest}/" if divided and slash else key] = bool(divided and slash)
        names = [name for name in found if name > after]
        parts = []
        for name in names[:PAGE]:
            if found[name]:
                parts.append(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>")
                continue
            data = self.s3.objects[name]
            written = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(self.s3.written[name]))
            etag, size = escape(_etag(data)), len(data)
            parts.append(
                f"<Contents><Key>{escape(name)}</Key><LastModified>{written}</LastModified><ETag>{etag}</ETag>"
                f"<Size>{size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            )
        more = len(names) > PAGE
        token = f"<NextContinuationToken>{escape(names[PAGE - 1])}</NextContinuationToken>" if more else ""
        truncated = f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}"
        self._answer(200, f"<ListBucketResult>{truncated}{''.join(parts)}</ListBucketResult>".encode())


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'
