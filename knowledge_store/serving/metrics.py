"""What a server counts, in the text format of Prometheus, and one line of JSON for each call."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Log = Callable[[dict[str, Any]], None]
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "knowledge_store"


class Metrics:
    """Counts of the calls that a server answered.

    Args:
        gauges: numbers that are asked for when somebody looks, by name, each with its help.
    """

    def __init__(self, gauges: dict[str, tuple[str, Callable[[], float]]]):
        self._gauges = gauges
        self._lock = threading.Lock()
        self._calls: dict[tuple[str, str], int] = defaultdict(int)
        self._seconds: dict[str, float] = defaultdict(float)
        self._bytes: dict[str, int] = defaultdict(int)
        self._sequences = 0

    def count(self, call: str, outcome: str, seconds: float) -> None:
        """Count a call that has ended."""
        with self._lock:
            self._calls[call, outcome] += 1
            self._seconds[call] += seconds

    def sent(self, call: str, size: int, sequences: int) -> None:
        """Count bytes that were sent, and the sequences in them."""
        with self._lock:
            self._bytes[call] += size
            self._sequences += sequences

    def text(self) -> str:
        """All of them."""
        with self._lock:
            families: list[tuple[str, str, str, list[tuple[str, float]]]] = [
                ("calls_total", "counter", "Calls by what was asked for and how they ended.", [
                    (f'{{call="{call}",outcome="{outcome}"}}', count) for (call, outcome), count in sorted(self._calls.items())
                ]),
                ("call_seconds_total", "counter", "Seconds that calls took, from the request to the last byte.", [
                    (f'{{call="{call}"}}', seconds) for call, seconds in sorted(self._seconds.items())
                ]),
                ("sent_bytes_total", "counter", "Bytes of sequences, answers and files that were sent.", [
                    (f'{{call="{call}"}}', size) for call, size in sorted(self._bytes.items())
                ]),
                ("sequences_sent_total", "counter", "Sequences that were sent to be trained on.", [("", self._sequences)]),
            ]  # fmt: skip
        families += [(name, "gauge", words, [("", number())]) for name, (words, number) in self._gauges.items()]
        lines = []
        for name, kind, words, values in families:
            lines += [f"# HELP {PREFIX}_{name} {words}", f"# TYPE {PREFIX}_{name} {kind}"]
            lines += [f"{PREFIX}_{name}{labels} {value:.15g}" for labels, value in values]
        return "\n".join(lines) + "\n"


def resident_bytes() -> float:
    """Memory of this process that is in use, in bytes; 0 where the system does not say."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    return 0.0


class MetricsServer:
    """Serves `Metrics.text` at http://HOST:PORT/metrics.

    Raises (on construction):
        OSError: there is no listening there.
    """

    def __init__(self, host: str, port: int, metrics: Metrics):
        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                found = self.path.partition("?")[0] == "/metrics"
                body = metrics.text().encode() if found else b"there is only /metrics here\n"
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", CONTENT_TYPE if found else "text/plain")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *words: Any) -> None:
                pass

        self._server = ThreadingHTTPServer((host, port), Handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        """Serve no more."""
        self._server.shutdown()
        self._server.server_close()


class Call:
    """One call: what was asked, by whom, and what became of it.

    Args:
        log, metrics: where it is told once it has ended.
        facts: what is said of it: call, who, peer, store, and what it asks for.
    """

    def __init__(self, log: Log, metrics: Metrics, facts: dict[str, Any]):
        self._log, self._metrics = log, metrics
        self.facts = facts
        self.bytes = self.sequences = 0
        self._began = time.monotonic()
        self._ended = False

    def sent(self, size: int, sequences: int = 0) -> None:
        """So many bytes of it were sent, and sequences in them."""
        self.bytes += size
        self.sequences += sequences
        self._metrics.sent(self.facts["call"], size, sequences)

    def end(self, outcome: str, reason: str = "") -> None:
        """It has ended: "ok", "refused", "failed" or "cancelled". Said again, it stays as it was."""
        if self._ended:
            return
        self._ended = True
        seconds = time.monotonic() - self._began
        self._metrics.count(self.facts["call"], outcome, seconds)
        facts = {**self.facts, "outcome": outcome, "seconds": round(seconds, 4), "bytes": self.bytes}
        if self.sequences:
            facts["sequences"] = self.sequences
        if reason:
            facts["reason"] = reason
        self._log(facts)


def json_line(facts: dict[str, Any]) -> str:
    """A line of a log: when, and what."""
    now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
    return json.dumps({"time": f"{now}Z", **facts}, ensure_ascii=True, default=str)
