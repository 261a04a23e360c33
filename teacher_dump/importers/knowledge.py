"""What the store keeps of predictions that a layout gives: sorted, checked, and with the tail."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from knowledge_store.kinds import Arrays
from knowledge_store.kinds.positions import MIN_LOG_REMAINDER, remainder
from teacher_dump.importers.layout import NO_LOGPROB, BadLayout, Predictions

NO_MASS = -np.inf
EXACT_REMAINDER = -32.0  # nats, in place of MIN_LOG_REMAINDER where log-probabilities are float64
DECIMALS = 7  # that float32 has, and no more than what programs write who round


@dataclass(frozen=True)
class Candidates:
    """N predictions, of which each has at least one candidate.

    Attributes:
        places: int64 (N,), which token each is of.
        ids: int64 (N, K), −1 for none. logprobs: float64 (N, K), −∞ for none; likeliest first.
        counts: int64 (N,).
        token_logprobs: float64 (N,), NaN where unknown.
        tail: float64 (N,); None where it is what candidates leave.
        least: nats, below which such a remainder is not known.
    """

    places: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    counts: np.ndarray
    token_logprobs: np.ndarray
    tail: np.ndarray | None
    least: float


def candidates_of(predictions: Predictions, vocabulary: int, slack: float) -> Candidates:
    """The predictions in order, checked.

    Args:
        vocabulary: its size.
        slack: by how much probabilities may sum to more than one.

    Raises:
        BadLayout: an id is beyond the vocabulary or stands twice at a position, a log-probability is NaN, probabilities sum to
            more than one, or with the tail not to one, or the token's own is not what the candidates say; says where.
    """
    tokens, places = predictions.token_ids, predictions.places
    _check_ids(tokens, np.arange(len(tokens)), vocabulary, "the token")
    ids, logprobs = predictions.candidate_ids, predictions.candidate_logprobs
    least = EXACT_REMAINDER if _doubles(logprobs) else MIN_LOG_REMAINDER
    logprobs = logprobs.astype(np.float64)
    if (unknown := np.isnan(logprobs) & (ids >= 0)).any():
        raise BadLayout(f"the log-probability of a candidate at token {places[unknown.any(axis=1)][0]} is NaN")
    present = (ids >= 0) & (logprobs > NO_LOGPROB)
    _check_ids(np.where(present, ids, 0), places, vocabulary, "a candidate")
    logprobs = np.where(present, logprobs, NO_MASS)
    if (logprobs[:, 1:] > logprobs[:, :-1]).any():
        order = np.argsort(-logprobs, axis=1, kind="stable")
        ids, logprobs = (np.take_along_axis(array, order, axis=1) for array in (ids, logprobs))
        present = logprobs > NO_MASS
    ids = np.where(present, ids, -1 - np.arange(ids.shape[1]))
    total = np.exp(logprobs).sum(axis=1)
    if (over := ~(total <= 1 + slack)).any():
        place = int(np.argmax(over))
        raise BadLayout(
            f"the probabilities of the candidates at token {places[place]} sum to {total[place]:.4g}, and may reach one:"
            " these are no log-probabilities of the whole vocabulary at temperature 1"
        )
    ordered = np.sort(ids, axis=1)
    if (twice := (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)).any():
        raise BadLayout(f"a token stands twice among the candidates at token {places[twice][0]}")
    known = np.full(len(ids), np.nan) if predictions.token_logprobs is None else predictions.token_logprobs[places]
    among = ids == tokens[places][:, None]
    found = among.any(axis=1)
    given = np.where(known > NO_LOGPROB, known, np.nan)
    known = np.where(found, np.where(among, logprobs, 0).sum(axis=1, where=among), given)
    kept = present.any(axis=1)
    _check_tokens(given[kept], np.where(found, np.exp(known), -1)[kept], 1 - total[kept], places[kept], slack)
    tail = None if predictions.tail_logprobs is None else predictions.tail_logprobs[kept].astype(np.float64)
    if tail is not None and (off := ~(np.abs(total[kept] + np.exp(tail) - 1) <= slack)).any():
        place = int(np.argmax(off))
        whole = total[kept][place] + np.exp(tail[place])
        raise BadLayout(f"candidates and tail at token {places[kept][place]} sum to {whole:.4g}, not to one")
    return Candidates(
        places[kept],
        np.where(present, ids, -1)[kept],
        logprobs[kept],
        present.sum(axis=1)[kept],
        known[kept],
        tail,
        least,
    )


def _doubles(logprobs: np.ndarray) -> bool:
    """Whether numbers say more than float32 does: in text, all are read as float64."""
    numbers = logprobs[np.isfinite(logprobs)]
    if numbers.dtype != np.float64:
        return False
    return bool((numbers != numbers.astype(np.float32)).any() and (numbers != np.round(numbers, DECIMALS)).any())


def _check_tokens(given: np.ndarray, among: np.ndarray, left: np.ndarray, places: np.ndarray, slack: float) -> None:
    """Make sure that the tokens' own log-probabilities (N,), NaN for none, fit the candidates.

    Args:
        among: the token's probability as a candidate, −1 where it is none.
        left: what the candidates leave.
    """
    probability = np.exp(np.minimum(given, 1))  # above one as above any
    off = np.where(among >= 0, np.abs(probability - among), probability - left) > slack
    if off.any():
        place = int(np.argmax(off))
        expected = (
            f"as a candidate it has {among[place]:.4g}" if among[place] >= 0 else f"the candidates leave {left[place]:.4g}"
        )
        raise BadLayout(
            f"the probability of the token at token {places[place]} is {probability[place]:.4g}, and {expected}:"
            " predictions are off by one (--row-predicts), or its log-probability is at another temperature"
        )


def _check_ids(ids: np.ndarray, places: np.ndarray, vocabulary: int, what: str) -> None:
    beyond = (ids < 0) | (ids >= vocabulary)
    if beyond.any():
        place = int(np.argmax(beyond.reshape(len(ids), -1).any(axis=1)))
        token = ids[beyond][0]
        raise BadLayout(
            f"{what} at token {places[place]} is {token}, beyond the vocabulary of {vocabulary:,}: give the teacher's own"
            " --tokenizer, or --vocabulary-size"
        )


def arrays_of(predictions: Predictions, candidates: Candidates, most: int, vocabulary: int) -> Arrays:
    """What the store takes of a sequence of T tokens, see the kind `positions`.

    Args:
        most: candidates kept at a position; what is beyond goes to the tail.
        vocabulary: its size.
    """
    length = len(predictions.token_ids)
    width = min(most, candidates.logprobs.shape[1])
    logprobs, whole = candidates.logprobs[:, :width], np.minimum(candidates.counts, most) == vocabulary
    if candidates.tail is None:
        tail = np.where(whole, NO_MASS, _remainder(logprobs, candidates.least))
    else:
        beyond = np.exp(candidates.logprobs[:, width:]).sum(axis=1)
        with np.errstate(divide="ignore"):
            tail = np.log(np.exp(candidates.tail) + beyond)
    total = np.exp(logprobs).sum(axis=1) + np.exp(tail)
    logprobs, tail = logprobs - np.log(total)[:, None], tail - np.log(total)
    places = candidates.places
    arrays: Arrays = {
        "token_id": predictions.token_ids.astype(np.uint32),
        "has_knowledge": np.zeros(length, bool),
        "token_logprob": np.zeros(length, np.float32),
        "candidate_ids": np.zeros((length, width), np.uint32),
        "candidate_logprobs": np.full((length, width), NO_MASS, np.float32),
        "tail_logprob": np.zeros(length, np.float32),
    }
    arrays["has_knowledge"][places] = True
    arrays["token_logprob"][places] = np.minimum(candidates.token_logprobs, 0)
    arrays["candidate_ids"][places] = np.maximum(candidates.ids[:, :width], 0)
    arrays["candidate_logprobs"][places] = logprobs
    arrays["tail_logprob"][places] = tail
    targets = arrays["has_knowledge"] if predictions.is_target is None else predictions.is_target & arrays["has_knowledge"]
    arrays["is_target"] = targets.copy()
    return arrays


def _remainder(logprobs: np.ndarray, least: float) -> np.ndarray:
    """See `remainder`; of float64 numbers, less is known to be left."""
    if least == MIN_LOG_REMAINDER:
        return remainder(logprobs)
    left = 1 - np.exp(logprobs).sum(axis=1)
    return np.log(np.maximum(left, np.exp(least)))
