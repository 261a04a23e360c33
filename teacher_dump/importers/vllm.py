"""JSON lines of vLLM and of servers with OpenAI's API: what was asked for as `prompt_logprobs` or `logprobs`, with token ids.

A line is a reply, the line of a batch's results around it, or one choice of it with the ids beside it. Tokens are told by their
ids: vLLM gives them as `prompt_token_ids` and `token_ids`, and names tokens `token_id:N` when asked with
`return_tokens_as_token_ids`. The text of a token alone does not say which one it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, compress
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from teacher_dump.importers.layout import NO_CANDIDATE, BadLayout, Layout, LayoutRow, Predictions
from teacher_dump.importers.rows import lines

TOKEN = "token_id:"
ABSENT = -9999.0  # what a server says in place of a log-probability that it does not have
ADVICE = "ask the server with return_token_ids (and return_tokens_as_token_ids), so that it says the ids"

MORE = "ask the server for more (prompt_logprobs, logprobs or top_logprobs of 1 and above)"

Prediction = dict[Any, dict[str, Any]]  # by token ids, as numbers or text, in any order, what is said of each: its "logprob"

_logprob = itemgetter("logprob")


class Vllm(Layout):
    """The layout `vllm`."""

    token_beside: ClassVar[bool] = True

    def rows(self, path: Path, first: int, offset: int) -> Iterator[LayoutRow]:
        """See `Layout`."""
        for number, start, record in lines(path, first, offset):
            try:
                sequences = [sequence for sequence in map(_sequence, _choices(record)) if sequence is not None]
            except BadLayout as error:
                raise BadLayout(f"line {number}: {error}") from None
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise BadLayout(f"line {number} is no reply of such a server ({type(error).__name__}: {error})") from None
            if self.shift:
                raise BadLayout("--row-predicts next: replies say themselves which token each prediction is of")
            yield LayoutRow(number, start, sequences)


def _choices(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices of a line, each with what the reply around it says of the prompt."""
    if isinstance(record.get("response"), dict):  # a line of a batch's results
        record = {"error": record.get("error"), **(record["response"].get("body") or record["response"])}
    if record.get("error") or record.get("object") == "error":
        raise BadLayout("it is of a request that failed: ask again, or leave the line out")
    around = {name: record[name] for name in ("prompt_token_ids", "prompt_logprobs") if record.get(name) is not None}
    choices = record.get("choices", [record])
    return [{**around, **{name: value for name, value in choice.items() if value is not None}} for choice in choices]


def _sequence(choice: dict[str, Any]) -> Predictions | None:
    """What a choice says of its tokens; None of one that has fewer than two."""
    prompt = choice.get("prompt_token_ids")
    tokens: list[int] = [] if prompt is None else list(prompt)
    predictions: list[Prediction | None] = [None] * len(tokens)
    asked = choice.get("prompt_logprobs")
    if asked is not None:
        if prompt is None:
            raise BadLayout(f"it has prompt_logprobs and no prompt_token_ids: {ADVICE}")
        if len(asked) != len(tokens):
            raise BadLayout(f"it has predictions of {len(asked)} tokens, and {len(tokens)} prompt_token_ids")
        predictions = asked
    answer = len(tokens)
    given = _answer(choice.get("logprobs"))
    if given is not None:
        ids, of_answer, whole = given
        if whole and (prompt is None or ids[: len(tokens)] == tokens):  # echoed: the prompt is among them
            tokens, predictions, answer = ids, of_answer, 0 if prompt is None else answer
        elif prompt is None:
            raise BadLayout(f"it has logprobs and no prompt_token_ids, so that nobody knows what stood before: {ADVICE}")
        else:
            stated = choice.get("token_ids")
            if stated is not None and list(stated) != ids:
                raise BadLayout("its token_ids are others than those of its logprobs")
            tokens, predictions = tokens + ids, predictions + of_answer
    elif asked is None:
        raise BadLayout("it has neither prompt_logprobs nor logprobs")
    if len(tokens) < 2:
        return None
    return _predictions(tokens, predictions, answer if given is not None and answer else None)


def _predictions(tokens: list[int], predictions: list[Prediction | None], answer: int | None) -> Predictions:
    places = [place for place, prediction in enumerate(predictions) if prediction is not None and place]
    rows = [prediction for prediction in predictions[1:] if prediction is not None]
    # Each entry is read once, by loops that are not Python's: there are millions of them.
    counts = np.fromiter(map(len, rows), np.int64, len(rows))
    if any(next(iter(row.values())).get("rank", 1) != 1 for row in compress(rows, counts == 1)):
        raise BadLayout(f"it has the token alone where others are likelier: {MORE}")
    filled = np.arange(counts.max(initial=0)) < counts[:, None]
    ids, logprobs = np.full(filled.shape, NO_CANDIDATE, np.int64), np.full(filled.shape, -np.inf, np.float32)
    ids[filled] = np.fromiter(map(int, chain.from_iterable(rows)), np.int64, counts.sum())
    entries = chain.from_iterable(map(dict.values, rows))
    logprobs[filled] = np.fromiter(map(_logprob, entries), np.float32, counts.sum())
    if (logprobs == ABSENT).any():
        raise BadLayout(f"it has a log-probability of {ABSENT:g}, which stands for one that the server does not have")
    is_target = None if answer is None else np.arange(len(tokens)) >= answer
    return Predictions(np.array(tokens, np.int64), np.array(places, np.int64), ids, logprobs, is_target)


def _token(name: Any) -> int:
    if not isinstance(name, str) or not name.startswith(TOKEN):
        raise BadLayout(f"it names tokens by their text ({str(name)[:20]!r}): {ADVICE}")
    return int(name.removeprefix(TOKEN))


def _answer(logprobs: dict[str, Any] | None) -> tuple[list[int], list[Prediction | None], bool] | None:
    """Tokens, their predictions, and whether they begin with one that nothing predicts, so that the prompt is among them."""
    if logprobs is None:
        return None
    if "content" in logprobs:  # of a chat
        entries = logprobs["content"] or []
        if entries and not any(entry["top_logprobs"] for entry in entries):
            raise BadLayout(f"it has the tokens of its answer alone: {MORE}")
        tokens = [_token(entry["token"]) for entry in entries]
        rows: list[Prediction | None] = [
            _with_token(
                [_token(top["token"]) for top in entry["top_logprobs"]],
                [top["logprob"] for top in entry["top_logprobs"]],
                token,
                entry["logprob"],
            )
            for token, entry in zip(tokens, entries, strict=True)
        ]
        return tokens, rows, False
    tokens = [_token(name) for name in logprobs["tokens"]]
    stated, tops = logprobs["token_logprobs"], logprobs["top_logprobs"] or [None] * len(tokens)
    rows = [
        None if own is None or not top else _with_token([_token(name) for name in top], list(top.values()), token, own)
        for token, own, top in zip(tokens, stated, tops, strict=True)
    ]
    return tokens, rows, bool(stated) and stated[0] is None


def _with_token(ids: list[int], logprobs: list[float], token: int, logprob: float) -> Prediction:
    """Candidates, and the token that stands there where it is none of them."""
    if token not in ids:
        ids, logprobs = [token, *ids], [logprob, *logprobs]
    return {candidate: {"logprob": value} for candidate, value in zip(ids, logprobs, strict=True)}
