"""A client of the completions of a vLLM server: token ids in, and of each the likeliest tokens that could have stood there.

Requests that fail as a server does that is busy, or is being restarted, are made again, later and later. What would be wrong
again is refused at once. No torch here.
"""

from __future__ import annotations

import os
import random
import re
import threading
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2
import numpy as np

from knowledge_store.errors import InputError
from knowledge_store.quantities import duration
from knowledge_store.reporter import SILENT, Reporter
from teacher_dump.teachers.protocol import Likeliest

KEY_VARIABLE = "VLLM_API_KEY"  # the one that vLLM's own server takes its key from
CONNECT_SECONDS, REPLY_SECONDS = 10.0, 600.0  # a reply waits for all that the server was asked before
FACT_SECONDS = 60.0  # what a server says of itself waits for nothing
PASSING = {408, 425, 429, 500, 502, 503, 504}  # HTTP statuses of a server that may answer later
IMPOSSIBLE = -9999.0  # what vLLM writes for −∞, which JSON does not have
SHOWN = 200  # characters of what a server says
WAYS = {
    "llamacpp": "llama.cpp's server, which gives no log-probabilities of a prompt: load its GGUF file here instead, with"
    " --teacher FOLDER --gguf-file FILE and no --teacher-url",
    "library": "Ollama's, which gives no log-probabilities of a prompt: load its GGUF file here instead, with --teacher FOLDER"
    " --gguf-file FILE and no --teacher-url",
}


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for.

    Attributes:
        failures: of one request in a row, after which it is given up.
        first_wait, longest_wait: seconds before it is made again; each wait is twice the last one, up to the longest.
    """

    failures: int = 12
    first_wait: float = 0.5
    longest_wait: float = 30.0

    def wait(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row."""
        return min(self.longest_wait, self.first_wait * 2.0 ** (failures - 1))

    @property
    def seconds(self) -> float:
        """All waits together."""
        return sum(self.wait(failures) for failures in range(1, self.failures))


@dataclass(frozen=True)
class ServedModel:
    """What a server says of a model.

    Attributes:
        name: that requests call it by. version: of the engine.
        max_length: tokens that it may be asked about; None where the server does not say.
    """

    name: str
    version: str
    max_length: int | None


class GivenUp(InputError):
    """A request that is not wanted any more."""


class _Failure(Exception):
    """A failure that may pass; its text says what happened, and `after` how many seconds the server asks for."""

    def __init__(self, text: str, after: float = 0.0):
        super().__init__(text)
        self.after = after


def server_address(url: str) -> str:
    """The address of a server, without the path of its interface.

    Args:
        url: `http://HOST:PORT`, with or without `/v1` or `/v1/completions`.

    Raises:
        InputError: it is none, it holds a password, or it is a chat endpoint.
    """
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        known, parts = False, urlsplit("")
    if "@" in parts.netloc or parts.query:
        raise InputError(f"--teacher-url holds a name, a password or a query: put the server's key into {KEY_VARIABLE} instead")
    if not known or parts.fragment:
        raise InputError(f"--teacher-url {url} is no server's address: give one such as http://127.0.0.1:8000")
    path = parts.path.rstrip("/")
    if path.endswith("/chat/completions"):
        raise InputError(
            f"--teacher-url {url} is a chat endpoint, which takes messages and gives no log-probabilities of a prompt: give the"
            f" address of a vLLM server, such as {parts.scheme}://{parts.netloc}"
        )
    path = path.removesuffix("/completions").removesuffix("/v1")
    return f"{parts.scheme}://{parts.netloc}{path}"


class CompletionsClient:
    """A vLLM server. Several threads may ask it at once.

    Args:
        address: see `server_address`.
        connections: that it is asked by at most at once.
        patience: with requests that fail.
        reporter: hears of a server that does not answer.
    """

    def __init__(self, address: str, connections: int, patience: Patience, *, reporter: Reporter = SILENT):
        self.address, self._patience, self._reporter = address, patience, reporter
        self._key = os.environ.get(KEY_VARIABLE, "")
        if self._key and not (self._key.isascii() and self._key.isprintable()):
            raise InputError(f"the key in {KEY_VARIABLE} has characters that no header can have: set it again")
        self._waiting = False
        try:
            self._http = httpx2.Client(
                headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
                limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
            )
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, OSError) as error:  # a proxy that the environment names
            raise InputError(f"no connection to {address} can be made: {self._safe(str(error))}") from None

    def close(self) -> None:
        """Close the connections to the server; nothing can be asked any more."""
        self._http.close()

    def served_model(self, preferred: str) -> ServedModel:
        """The model that a server serves, `preferred` where there are several.

        Raises:
            InputError: the server does not answer, refuses the key, is not vLLM's, or serves several others.
        """
        listed = self._once("GET", "/v1/models")
        models = listed.get("data") if isinstance(listed, dict) else None
        if not isinstance(models, list) or not all(
            isinstance(model, dict) and isinstance(model.get("id"), str) for model in models
        ):
            raise InputError(f"{self.address} lists no models under /v1/models: give the address of a vLLM server")
        owners = {str(model.get("owned_by")) for model in models}
        if owners - {"vllm"}:
            owner = self._safe(min(owners - {"vllm"}))
            unknown = (
                f"not vLLM's (its models are owned by {owner!r}), and no other is known to give log-probabilities of a prompt"
                ": serve the model with vLLM, or leave --teacher-url out to load it here"
            )
            way = WAYS.get(owner, unknown)
            raise InputError(f"the server at {self.address} is {way}")
        version = self._once("GET", "/version").get("version")
        if not isinstance(version, str):
            raise InputError(f"{self.address} does not say its version under /version: give the address of a vLLM server")
        chosen = [model for model in models if preferred in (model["id"], model.get("root"))] or models
        if len({str(model.get("root")) for model in chosen}) != 1:
            names = ", ".join(self._safe(model["id"]) for model in models) or "no model"
            raise InputError(f"{self.address} serves {names}: start a server with the one model that is the teacher")
        longest = chosen[0].get("max_model_len")
        # One token has to be generated, or the server refuses the request.
        return ServedModel(chosen[0]["id"], version, longest - 1 if isinstance(longest, int) and longest > 1 else None)

    def tokens_of(self, model: str, text: str) -> list[int] | None:
        """The token ids that the server's own tokenizer makes of a text, without special ones; None where it does not say."""
        request = {"model": model, "prompt": text, "add_special_tokens": False}
        try:
            reply = self._send("POST", "/tokenize", request)
        except (_Failure, InputError):
            return None
        tokens = reply.get("tokens") if isinstance(reply, dict) else None
        return tokens if isinstance(tokens, list) and all(isinstance(token, int) for token in tokens) else None

    def likeliest(self, model: str, token_ids: list[int], count: int, dropped: threading.Event | None = None) -> Likeliest:
        """What the model finds likeliest in the place of all tokens but the first, N of them.

        Args:
            model: by its served name.
            token_ids: N + 1.
            count: how many of the likeliest tokens, k.
            dropped: set, by another thread, once nobody waits for the reply any more.

        Raises:
            InputError: the reply is not about these tokens, or lacks some; the server refuses the request, or has failed too
                often in a row.
            GivenUp: nobody waits for it.
        """
        request = {
            "model": model,
            "prompt": token_ids,
            "prompt_logprobs": count,
            "max_tokens": 1,
            "temperature": 0,
            "return_token_ids": True,
        }
        failures, dropped = 0, dropped or threading.Event()
        while not dropped.is_set():
            try:
                reply = self._send("POST", "/v1/completions", request)
                self._waiting = False
                return read_likeliest(reply, token_ids, count, self.address)
            except _Failure as failure:
                failures += 1
                self._wait(failure, failures, dropped)
        raise GivenUp(f"what {self.address} was asked is not wanted any more")

    def _wait(self, failure: _Failure, failures: int, dropped: threading.Event) -> None:
        """Wait after so many failures of a request in a row (InputError: they are too many)."""
        if failures >= self._patience.failures and not dropped.is_set():
            raise InputError(
                f"the server at {self.address} failed {failures} times in a row, for {duration(self._patience.seconds)} or"
                f" longer (the last time: {failure}). What is committed stays: start the server again, and give the same"
                " command to resume"
            ) from None
        if not self._waiting and not dropped.is_set():
            self._waiting = True
            self._reporter.note(f"Waiting for the server at {self.address}: {failure}")
        seconds = max(self._patience.wait(failures), min(failure.after, self._patience.longest_wait))
        # Not all at the same moment, if many wait.
        dropped.wait(seconds * random.uniform(1.0, 1.5))

    def _once(self, method: str, path: str) -> Any:
        """What a server says, asked once: one that is not there is told at once."""
        try:
            return self._send(method, path, None)
        except _Failure as failure:
            raise InputError(
                f"the server at {self.address} does not answer ({failure}): start it, or correct --teacher-url"
            ) from None

    def _send(self, method: str, path: str, request: dict[str, Any] | None) -> Any:
        """The JSON of a reply.

        Raises:
            InputError: asking again would be in vain. _Failure: it may not.
        """
        try:
            timeout = httpx2.Timeout(REPLY_SECONDS if request else FACT_SECONDS, connect=CONNECT_SECONDS)
            response = self._http.request(method, self.address + path, json=request, timeout=timeout)
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise _Failure(self._safe(str(error)) or type(error).__name__) from None
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
            raise InputError(f"{self.address} cannot be asked: {self._safe(str(error))}") from None
        status, words = response.status_code, self._words(response)
        if status in PASSING:
            raise _Failure(f"HTTP status {status}{words}", _seconds(response.headers.get("Retry-After", "")))
        if status in (401, 403):
            refused = f"refuses the key in {KEY_VARIABLE}" if self._key else f"wants a key: put it into {KEY_VARIABLE}"
            raise InputError(f"the server at {self.address} {refused} (HTTP status {status})")
        if status == 400 and request is not None and "prompt_logprobs" in request and "logprobs" in words:
            raise InputError(
                f"the server at {self.address} does not give {request['prompt_logprobs']} log-probabilities a position{words}:"
                f" start it with --max-logprobs {request['prompt_logprobs']}, or keep fewer candidates"
            )
        if status != 200:
            raise InputError(
                f"the server at {self.address} refuses {path} with HTTP status {status}{words}: give the address of a vLLM"
                " server that serves the teacher"
            )
        try:
            return response.json()
        except ValueError:
            raise InputError(f"{self.address}{path} answers with what is no JSON: give the address of a vLLM server") from None

    def _words(self, response: httpx2.Response) -> str:
        """What a reply that is an error says, in brackets."""
        if response.status_code == 200:
            return ""
        try:
            body = response.json()
            error = body.get("error", body.get("detail", "")) if isinstance(body, dict) else ""
            text = str(error.get("message", "")) if isinstance(error, dict) else str(error)
        except ValueError:
            return ""
        return f" ({self._safe(text)})" if text else ""

    def _safe(self, text: str) -> str:
        """The beginning of what somebody else says, on one line, without the key."""
        text = text.replace(self._key, "…") if self._key else text
        text = re.sub(r"[^\x20-\x7e\xa0-\uffff]+", " ", text).strip().rstrip(".")
        return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _seconds(header: str) -> float:
    """What `Retry-After` asks for; 0 for a date."""
    return float(header) if re.fullmatch(r"\d{1,5}", header.strip()) else 0.0


def read_likeliest(reply: Any, token_ids: list[int], count: int, address: str) -> Likeliest:
    """What a reply of `/v1/completions` says of all tokens but the first, N of them.

    Args:
        reply: as JSON.
        token_ids: N + 1, those that were asked about.
        count: how many of the likeliest tokens were asked for, k.
        address: of the server, for sentences.

    Raises:
        InputError: it says nothing of them, is of other tokens, or lacks some.
    """
    try:
        [choice] = reply["choices"]
        entries, ids = choice.get("prompt_logprobs"), choice.get("prompt_token_ids")
    except (TypeError, KeyError, ValueError, AttributeError):
        raise InputError(f"{address} answers with what is no completion: give the address of a vLLM server") from None
    if not isinstance(entries, list):
        raise InputError(
            f"{address} gives no log-probabilities of the prompt: only vLLM's /v1/completions is known to. A GGUF file that"
            " llama.cpp serves is loaded by --teacher FOLDER --gguf-file FILE, without --teacher-url"
        )
    if ids is not None and ids != token_ids:
        raise InputError(
            f"{address} answers about other token ids than it was given ({_difference(token_ids, ids)}): it must not add,"
            " cut or change tokens"
        )
    if len(entries) != len(token_ids):
        raise InputError(
            f"{address} gives log-probabilities for {len(entries)} of {len(token_ids)} positions: nothing of the shard was"
            " written; look at the server's log"
        )
    length = len(token_ids) - 1
    found = Likeliest(
        np.full((length, count), -1, np.int64),
        np.full((length, count), -np.inf),
        np.array(token_ids[1:], np.int64),
        np.full(length, -np.inf),
    )
    for place, (token, entry) in enumerate(zip(token_ids[1:], entries[1:], strict=True)):
        if not entry:
            raise InputError(f"{address} gives no log-probabilities for position {place + 1} of {len(token_ids)}")
        try:
            logprobs = {int(name): float(values["logprob"]) for name, values in entry.items()}
        except (TypeError, ValueError, KeyError, AttributeError):
            raise InputError(f"{address} gives log-probabilities that cannot be read, at position {place + 1}") from None
        if token not in logprobs:
            raise InputError(
                f"{address} answers about other token ids than it was given: at position {place + 1} it says nothing of token"
                f" {token}, which stands there"
            )
        found.token_logprobs[place] = logprobs[token]
        # Of tokens that are as likely, the one of the lower id first: the server's order says nothing.
        likeliest = sorted(logprobs.items(), key=lambda pair: (-pair[1], pair[0]))[:count]
        found.ids[place, : len(likeliest)] = [pair[0] for pair in likeliest]
        found.logprobs[place, : len(likeliest)] = [pair[1] for pair in likeliest]
    for values in (found.logprobs, found.token_logprobs):
        values[values <= IMPOSSIBLE] = -np.inf
    return found


def _difference(given: list[int], answered: Any) -> str:
    """Where two lists of token ids differ first."""
    if not isinstance(answered, list) or len(answered) != len(given):
        return f"{len(answered) if isinstance(answered, list) else 'no'} tokens for {len(given)}"
    place = next(place for place, pair in enumerate(zip(given, answered, strict=True)) if pair[0] != pair[1])
    return f"token {answered[place]!r} for {given[place]} at position {place}"
