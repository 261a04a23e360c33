"""A teacher behind a vLLM server (see `completions`). Its tokenizer and configuration lie here, and its weights do not.

It gives the likeliest tokens and nothing else. Requests for a batch are made when it is asked for, and several batches may be
asked for before the first is read, so that the server always has as many as `--batch-size` at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from knowledge_store.errors import InputError
from knowledge_store.reporter import SILENT, Reporter
from teacher_dump.teachers.completions import CompletionsClient, Patience, ServedModel, server_address
from teacher_dump.teachers.files import find_folder, stated_sizes
from teacher_dump.teachers.fingerprint import DEPTH, PROMPTS, TEXT, fingerprint, same_fingerprint
from teacher_dump.teachers.loading import SERVER
from teacher_dump.teachers.protocol import Ability, Batching, Likeliest
from teacher_dump.teachers.tokenizer import load_tokenizer, token_texts

BATCHES_AHEAD = 2


@dataclass
class HttpPrediction:
    """What was asked about a batch of B sequences (see `protocol.Prediction`).

    Attributes:
        teacher: whose.
        hidden: there is none.
        replies: B of them, each about all tokens of a sequence but the first.
    """

    teacher: HttpTeacher
    replies: list[Future[Likeliest]]
    hidden: None = None

    def likeliest(self, rows: np.ndarray, positions: np.ndarray) -> Likeliest:
        """See `protocol.Prediction`; waits for the replies."""
        replies = [reply.result() for reply in self.replies]
        parts = [reply.part(positions[rows == row]) for row, reply in enumerate(replies)]
        order = np.argsort(np.concatenate([np.flatnonzero(rows == row) for row in range(len(replies))]))
        names = ("ids", "logprobs", "token_ids", "token_logprobs")
        return Likeliest(*(np.concatenate([getattr(part, name) for part in parts])[order] for name in names))

    def drop(self) -> None:
        """See `protocol.Prediction`."""
        for reply in self.replies:
            reply.cancel()
        self.teacher.give_up()

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
class HttpTeacher:
    """A teacher behind a server (see `protocol.Teacher`).

    Attributes:
        description: what the manifest says of it; instead of its files' hashes the engine, its version, the name that the
            model is served by, and a fingerprint.
        tokenizer: the one of the folder.
        connect: makes a client of the server.
        connections: requests at once.
        fingerprint_answers: what it says to the prompts of its fingerprint.
    """

    description: dict[str, Any]
    tokenizer: Any
    connect: Callable[[], CompletionsClient]
    connections: int
    fingerprint_answers: Likeliest
    _client: CompletionsClient | None = field(default=None, repr=False)
    _threads: ThreadPoolExecutor | None = field(default=None, repr=False)

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

    def check_gradients(self) -> None:
        """Never asked for."""
        raise NotImplementedError

    def gradient_room(self, longest: int) -> int:
        """Never asked for."""
        raise NotImplementedError

    def predict(
        self,
        token_ids: np.ndarray,
        attention_mask: np.ndarray,
        gradients: bool = False,
        layers: Collection[int] = (),
        likeliest: int = 0,
    ) -> HttpPrediction:
        """Ask for a batch (see `protocol.Teacher`); returns at once."""
        if self._client is None or self._threads is None:
            self._client, self._threads = self.connect(), ThreadPoolExecutor(self.connections, "server")
        client, name = self._client, self.description["served_name"]
        sequences = [row[mask].tolist() for row, mask in zip(token_ids, attention_mask, strict=True)]
        return HttpPrediction(
            self, [self._threads.submit(client.likeliest, name, sequence, likeliest) for sequence in sequences]
        )

    def give_up(self) -> None:
        """End all requests, without waiting for their replies; what is asked afterwards is asked anew."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        if self._client is not None:
            self._client.close()
        self._client = self._threads = None

    def tokens(self) -> tuple[list[str | None], list[str | None]]:
        """For each token id its text and the tokenizer's own name for it (see `tokenizer.token_texts`)."""
        return token_texts(self.tokenizer, self.vocabulary_size)

    def recognise(self, kept: dict[str, Any]) -> None:
        """Take over the fingerprint of a teacher that a manifest describes, if this one may be it: it says the same up to numeric
        noise."""
        if isinstance(prompts := kept.get("fingerprint"), list) and same_fingerprint(prompts, self.fingerprint_answers):
            self.description["fingerprint"] = prompts


def open_server(
    teacher: str,
    url: str,
    longest: int,
    connections: int,
    revision: str | None = None,
    patience: Patience = Patience(),  # noqa: B008
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
        patience: with requests that fail.
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

    def connect() -> CompletionsClient:
        return CompletionsClient(address, connections, patience, reporter=reporter)

    client = connect()
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
        prompts = ids[: min(PROMPTS + 1, model.max_length or PROMPTS + 1)]
        answers = client.likeliest(model.name, prompts, min(DEPTH, sizes["vocabulary_size"]))
    finally:
        client.close()
    description = {
        "name": folder.resolve().name if Path(teacher).is_dir() else teacher,
        "engine": SERVER,
        "engine_version": model.version,
        "served_name": model.name,
        "fingerprint": fingerprint(answers),
        "vocabulary_size": sizes["vocabulary_size"],
        "max_positions": model.max_length,
    }
    return HttpTeacher(description, tokenizer, connect, connections, answers)


def _check_length(model: ServedModel, longest: int, address: str) -> None:
    if model.max_length is not None and longest > model.max_length:
        raise InputError(
            f"{model.name} at {address} takes {model.max_length} tokens and one more that it generates, and sequences have up to"
            f" {longest}: start the server with --max-model-len {longest + 1}, or give a shorter --max-length"
        )
