"""A server that replays what a real `vllm serve` answered, with faults; and the recording of it.

`vllm_server/` has the tokenizer and the configuration of the teacher (2 layers, head size 64, random weights) and what vLLM
answered to each request. `PYTHONPATH=.:tests python tests/recorded_server.py save FOLDER` writes that teacher, to be served as
`tiny` with --dtype float32 --max-model-len 256 --max-logprobs 20 --enforce-eager, and `record URL` asks it. Run as a process
(`serve PORT`), the replay can be killed as a real server is.
"""

from __future__ import annotations

import gzip
import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "vllm_server"
RECORDING = FOLDER / "replies.json.gz"
MAX_LENGTH, COUNTS = 40, (5, 8)

# What a fault does with the reply to a request: another body, or a status and a body, or bytes and an end of the connection.
Fault = Callable[[dict[str, Any]], Any]


def key_of(path: str, request: dict[str, Any] | None) -> str:
    """By what a request is found in the recording."""
    if request is None:
        return path
    return " ".join([path, json.dumps(request.get("prompt")), str(request.get("prompt_logprobs"))])


def recording() -> dict[str, Any]:
    """Status and body of the reply to each request."""
    return json.loads(gzip.decompress(RECORDING.read_bytes()))


@dataclass
class RecordedServer:
    """The server, on a port of its own.

    Attributes:
        fault: what becomes of the reply to each completion; None for nothing.
        stop_after: ends the process in the middle of the reply to so many completions.
        requests: how many completions it was asked for.
        seen: the headers of each request.
        replies: what it answers.
    """

    port: int = 0
    fault: Fault | None = None
    stop_after: int | None = None
    requests: int = 0
    seen: list[dict[str, str]] = field(default_factory=list)
    replies: dict[str, Any] = field(default_factory=recording)

    def __post_init__(self) -> None:
        outer = self
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                outer.seen.append(dict(self.headers))
                self.answer(*outer.replies.get(key_of(self.path, None), (404, {"detail": "Not Found"})))

            def do_POST(self) -> None:
                outer.seen.append(dict(self.headers))
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, body = outer.replies.get(key_of(self.path, request), (400, {"error": {"message": "not recorded"}}))
                if self.path == "/v1/completions":
                    with lock:
                        outer.requests += 1
                        number = outer.requests
                    if number == outer.stop_after:
                        self.cut(json.dumps(body))
                        os._exit(1)
                    if outer.fault is not None:
                        changed = outer.fault(json.loads(json.dumps(body)))
                        if isinstance(changed, str):
                            return self.cut(changed)
                        status, body = changed if isinstance(changed, tuple) else (status, changed)
                self.answer(status, body)

            def answer(self, status: int, body: Any) -> None:
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                if status == 429:
                    self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(data)

            def cut(self, text: str) -> None:
                """Half of a reply, and no more."""
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text[: len(text) // 2].encode())
                self.wfile.flush()
                self.close_connection = True

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                """Whoever asked went away."""

        self.server = Server(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> RecordedServer:
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()


def served_model():
    """The teacher that was served: vLLM needs heads of at least 32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(FOLDER)
    return LlamaForCausalLM(config)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def rows() -> list[dict]:
    """The corpus that replies were recorded of."""
    from conftest import story_rows

    return [*story_rows(9), {"prompt": "Who lit the lamp early?", "completion": " The keeper did."}]


def record(url: str) -> None:
    """Ask a real server everything that the tests ask."""
    from tempfile import TemporaryDirectory

    import httpx2
    from conftest import write_jsonl
    from transformers import AutoTokenizer

    from teacher_dump.corpus.documents import read_documents
    from teacher_dump.corpus.rows import Start
    from teacher_dump.corpus.tokenisation import CorpusTokenizer
    from teacher_dump.teachers.fingerprint import DEPTH, PROMPTS, TEXT

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    with TemporaryDirectory() as folder:
        corpus = write_jsonl(Path(folder) / "c.jsonl", rows())
        sequences = CorpusTokenizer(tokenizer, MAX_LENGTH)
        tokens = [
            sequence.token_ids.tolist()
            for document in read_documents((corpus,), Start(0, 0, 1, 0, 0), 10_000, {})
            for sequence in sequences.sequences(document)
        ]
    text = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    completions = [(text[: PROMPTS + 1], DEPTH), *((ids, count) for ids in tokens for count in COUNTS), (tokens[0], 25)]
    requests: list[tuple[str, dict[str, Any] | None]] = [("/version", None), ("/v1/models", None)]
    requests.append(("/tokenize", {"model": "tiny", "prompt": TEXT, "add_special_tokens": False}))
    for ids, count in completions:
        more = {"max_tokens": 1, "temperature": 0, "return_token_ids": True}
        requests.append(("/v1/completions", {"model": "tiny", "prompt": ids, "prompt_logprobs": count, **more}))
    replies = {}
    with httpx2.Client(headers={"Authorization": f"Bearer {os.environ.get('VLLM_API_KEY', '')}"}, timeout=600) as client:
        for path, request in requests:
            reply = client.request("GET" if request is None else "POST", url + path, json=request)
            body = reply.json()
            for model in body.get("data", ()):
                model["root"] = model["id"]  # else a folder of whoever recorded it
            replies[key_of(path, request)] = (reply.status_code, body)
    RECORDING.write_bytes(gzip.compress(json.dumps(replies).encode(), mtime=0))
    print(f"{len(replies)} replies, {RECORDING.stat().st_size:,} bytes")


if __name__ == "__main__":
    command, argument, *stop_after = sys.argv[1:]
    if command == "save":
        from transformers import AutoTokenizer

        served_model().save_pretrained(argument)
        AutoTokenizer.from_pretrained(FOLDER).save_pretrained(argument)
    elif command == "record":
        record(argument)
    else:
        with RecordedServer(int(argument), stop_after=int(stop_after[0]) if stop_after else None):
            print("listening", flush=True)
            threading.Event().wait()
