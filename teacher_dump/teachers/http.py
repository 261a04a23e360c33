"""A teacher behind a vLLM server (see `completions`). Its tokenizer and configuration lie here, and its weights do not.

It gives the likeliest tokens and nothing else. Requests for a batch are made when it is asked for, and several batches may be
asked for before the first is read, so that the server always has as many as `--batch-size` at once.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from knowledge_store.errors import InputError
from knowledge_store.reporter import SILENT, Reporter
from teacher_dump.teachers.completions import CompletionsClient, Patience, ServedModel, server_address
from teacher_dump.teachers.files import find_folder, stated_sizes
from teacher_dump.teachers.fingerprint import DEPTH, PROMPTS, TEXT, fingerprint, same_fingerprint
from teacher_dump.teachers.loading import SERVER
from teacher_dump.teachers.protocol import Ability, Batching, Likeliest, WithoutGradients, WithoutTexts
from teacher_dump.teachers.tokenizer import load_tokenizer, token_texts

BATCHES_AHEAD = 2
PATIENCE = Patience()


@dataclass(frozen=True)
class _Request:
    """What is asked about a sequence (see `CompletionsClient.likeliest`), and the reply that is to come."""

    token_ids: list[int]
    count: int
    dropped: threading.Event
    reply: Future[Likeliest]


_Requests: TypeAlias = "queue.SimpleQueue[_Request | None]"


def _answer(client: CompletionsClient, model: str, requests: _Requests) -> None:
    """Make requests, one after the other, until there is a None."""
    while (request := requests.get()) is not None:
        if not request.reply.set_running_or_notify_cancel():
            continue
        try:
            request.reply.set_result(client.likeliest(model, request.token_ids, request.count, request.dropped))
        except BaseException as error:  # whoever waits for the reply raises it
            request.reply.set_exception(error)


def _end(client: CompletionsClient, requests: _Requests, threads: int) -> None:
    for _ in range(threads):
        requests.put(None)
    client.close()


@dataclass
class HttpPrediction:
    """What was asked about a batch of B sequences (see `protocol.Prediction`).

    Attributes:
        teacher: whose.
        hidden: there is none.
        replies: B of them, each about all tokens of a sequence but the first.
        starts: int64 (B,), where the sequences begin in the padded batch.
        dropped: set once nobody waits for them.
    """

    teacher: HttpTeacher
    replies: list[Future[Likeliest]]
    starts: np.ndarray
    dropped: threading.Event
    hidden: None = None

    def likeliest(self, rows: np.ndarray, positions: np.ndarray) -> Likeliest:
        """See `protocol.Prediction`; waits for the replies."""
        replies, positions = [reply.result() for reply in self.replies], positions - self.starts[rows]
        parts = [reply.part(positions[rows == row]) for row, reply in enumerate(replies)]
        order = np.argsort(np.concatenate([np.flatnonzero(rows == row) for row in range(len(replies))]))
        names = ("ids", "logprobs", "token_ids", "token_logprobs")
        return Likeliest(*(np.concatenate([getattr(part, name) for part in parts])[order] for name in names))

    def drop(self) -> None:
        """See `protocol.Prediction`."""
        self.dropped.set()
        for reply in self.replies:
            reply.cancel()

    def layer_states(self, layer: int) -> Any:
        """Never asked for."""
        raise NotImplementedError

    def logit_slices(self, rows: Any, positions: Any) -> Any:
        """Never asked for."""
        raise NotImplementedError

    def input_gradients(self, rows: Any, positions: Any, slopes: Any) -> Any:
        """Never asked for."""
        raise NotImplementedError


@dataclass
class HttpTeacher(WithoutGradients, WithoutTexts):
    """A teacher behind a server (see `protocol.Teacher`).

    Attributes:
        description: what the manifest says of it; instead of its files' hashes the engine, its version, the name that the
            model is served by, and a fingerprint.
        tokenizer: the one of the folder.
        client: of the server.
        connections: requests at once.
        fingerprint_prompt: token ids, whose beginnings are the prompts of its fingerprint.
        fingerprint_answers: what it says to them.
    """

    description: dict[str, Any]
    tokenizer: Any
    client: CompletionsClient
    connections: int
    fingerprint_prompt: list[int]
    fingerprint_answers: Likeliest
    _requests: _Requests = field(default_factory=queue.SimpleQueue, repr=False)

    def __post_init__(self) -> None:
        for number in range(self.connections):
            arguments = (self.client, self.description["served_name"], self._requests)
            # None of them keeps a process from ending.
            threading.Thread(target=_answer, args=arguments, name=f"request {number}", daemon=True).start()
        weakref.finalize(self, _end, self.client, self._requests, self.connections)

    @property
    def vocabulary_size(self) -> int:
        """Rows of its head, by its configuration."""
        return int(self.description["vocabulary_size"])

    @property
    def device(self) -> str:
        """Where what it says is worked with."""
        return "cpu"

    @property
    def device_name(self) -> str:
        """What runs it: nothing is known of its devices."""
        return f"a server of vLLM {self.description['engine_version']}"

    @property
    def abilities(self) -> frozenset[Ability]:
        """What it can give."""
        return frozenset({Ability.LIKELIEST})

    @property
    def impossible_tokens(self) -> np.ndarray:
        """Not known beforehand: where one is a target, what it says of it is refused."""
        return np.zeros(0, np.int64)

    @property
    def has_experts(self) -> bool:
        """Not known."""
        return False

    @property
    def ahead(self) -> int:
        """Twice as many as it is asked at once: one waits for the next while another is being read."""
        return BATCHES_AHEAD * self.connections

    def batching(self, longest: int, room: int) -> Batching:
        """Each sequence is asked about by itself."""
        return Batching()

    def predict(
        self,
        token_ids: np.ndarray,
        attention_mask: np.ndarray,
        gradients: bool = False,
        layers: Collection[int] = (),
        likeliest: int = 0,
    ) -> HttpPrediction:
        """Ask for a batch (see `protocol.Teacher`); returns at once."""
        dropped = threading.Event()
        replies: list[Future[Likeliest]] = []
        for row, mask in zip(token_ids, attention_mask, strict=True):
            replies.append(Future())
            self._requests.put(_Request(row[mask].tolist(), likeliest, dropped, replies[-1]))
        return HttpPrediction(self, replies, attention_mask.argmax(axis=1), dropped)

    def tokens(self) -> tuple[list[str | None], list[str | None]]:
        """For each token id its text and the tokenizer's own name for it (see `tokenizer.token_texts`)."""
        return token_texts(self.tokenizer, self.vocabulary_size)

    def recognise(self, kept: Mapping[str, Any]) -> None:
        """Take over the fingerprint of a teacher that a manifest describes, if it says the same up to numeric noise. How much
        the server takes at once is no part of what it is: that it is enough was seen when it was opened."""
        if kept.get("engine") == SERVER and "max_positions" in kept:
            self.description["max_positions"] = kept["max_positions"]
        if isinstance(prompts := kept.get("fingerprint"), list) and same_fingerprint(prompts, self.fingerprint_answers):
            self.description["fingerprint"] = prompts

    def check_unchanged(self) -> None:
        """See `protocol.Teacher`: a server may have been started again with another model, under the name of the first."""
        name, before = self.description["served_name"], self.fingerprint_answers
        now = self.client.likeliest(name, self.fingerprint_prompt, before.ids.shape[1])
        if not same_fingerprint(fingerprint(before), now):
            raise InputError(
                f"the server at {self.client.address} answers to fixed prompts as another model than at the start, under the"
                f" same name, {name}: nothing of this shard was kept. Serve the model that the dump was begun with, and resume"
            )


def open_server(
    teacher: str,
    url: str,
    longest: int,
    connections: int,
    revision: str | None = None,
    *,
    reporter: Reporter = SILENT,
) -> HttpTeacher:
    """Find a server, and make sure that it can be the teacher.

    Args:
        teacher: a local folder or a hub id, of whose files the tokenizer and the configuration are used.
        url: of the server.
        longest: tokens of the longest sequence that it is going to be asked about.
        connections: requests at once.
        revision: of a hub id.
        reporter: hears of a server that does not answer for a while.

    Raises:
        InputError: the server does not answer, refuses the key, is not vLLM's, has another tokenizer or knows fewer positions.
    """
    address = server_address(url)
    folder = find_folder(teacher, None, revision, weights=False)
    sizes, tokenizer = stated_sizes(str(folder)), load_tokenizer(str(folder))
    if "vocabulary_size" not in sizes:
        raise InputError(
            f"{folder / 'config.json'} does not say how large the vocabulary is: give the folder of the model served"
        )

    # One more than sequences are asked about at once, for the prompts of the fingerprint.
    client = CompletionsClient(address, connections + 1, PATIENCE, reporter=reporter)
    try:
        model = client.served_model(teacher)
        _check_length(model, longest, address)
        ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        if (tokens := client.tokens_of(model.name, TEXT)) is None:
            reporter.note(f"{address} does not say how it makes tokens of a text, so the tokenizers were not compared")
        elif tokens != ids:
            raise InputError(
                f"the tokenizer of {model.name} at {address} makes other tokens of a text than that of {teacher}: give the"
                " folder or the hub id of the model that is served"
            )
        prompt = ids[: min(PROMPTS + 1, model.max_length or PROMPTS + 1)]
        answers = client.likeliest(model.name, prompt, min(DEPTH, sizes["vocabulary_size"]))
    except BaseException:
        client.close()
        raise
    description = {
        "name": folder.resolve().name if Path(teacher).is_dir() else teacher,
        "engine": SERVER,
        "engine_version": model.version,
        "served_name": model.name,
        "fingerprint": fingerprint(answers),
        "vocabulary_size": sizes["vocabulary_size"],
        "max_positions": model.max_length,
    }
    return HttpTeacher(description, tokenizer, client, connections, prompt, answers)


def _check_length(model: ServedModel, longest: int, address: str) -> None:
    if model.max_length is not None and longest > model.max_length:
        raise InputError(
            f"{model.name} at {address} takes {model.max_length} tokens and one more that it generates, and sequences have up"
            f" to {longest}: start the server with --max-model-len {longest + 1}, or give a shorter --max-length"
        )
