"""What has to hold of a table of positions, and of its tokens beside the table of sequences."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from knowledge_store.format.sequences import token_hash
from knowledge_store.kinds.columns import list_mask, padded_lists
from knowledge_store.kinds.positions.packing import NO_MASS, quantise, total_mass
from knowledge_store.kinds.positions.selection import Selection

ROUNDED = 1.5  # steps that a log-probability can be off


def tokens_match(table: pa.Table, sequences: pa.Table) -> Iterator[str]:
    """Whether the token hashes and the numbers of targets in `sequences` are those of all their positions."""
    ends = np.cumsum(sequences["length"].to_numpy())
    tokens, targets = table["token_id"].to_numpy(), table["is_target"].to_numpy()
    rows = zip(*(sequences[name].to_pylist() for name in ("sequence_id", "length", "targets", "token_hash")), strict=True)
    for (sequence, length, target_count, expected), end in zip(rows, ends, strict=True):
        if token_hash(tokens[end - length : end]) != expected:
            yield f"the token ids of sequence {sequence} do not match its token_hash"
            return
        if int(targets[end - length : end].sum()) != target_count:
            yield f"sequence {sequence} does not have {target_count} targets"
            return


def invariants(table: pa.Table, rule: Selection, step: float, vocabulary: int, unknown: bool = False) -> Iterator[str]:
    """What is wrong with a table of positions, in words.

    Args:
        table: all rows of some sequences.
        rule: the selection.
        step: of log-probabilities, nats.
        vocabulary: its size.
        unknown: whether the log-probability of a token that is no candidate may be unknown.
    """
    kept = table["candidate_ids"].is_valid().to_numpy()
    for name in table.column_names[table.column_names.index("token_logprob") :]:
        valid = table[name].is_valid().to_numpy()
        if (valid & ~kept).any() or ((kept & ~valid).any() and not (unknown and name == "token_logprob")):
            yield f"{name} is null where candidate_ids is not, or the reverse"
            return
    position = table["position"].to_numpy()
    if kept[position == 0].any():
        yield "position 0, which nothing predicts, has knowledge"
    if (table["is_target"].to_numpy() & ~kept).any():
        yield "a target has no knowledge"

    ids, id_counts = padded_lists(table["candidate_ids"], -1, np.int64)
    logprobs, logprob_counts = padded_lists(table["candidate_logprobs"], NO_MASS, np.float32)
    width = min(rule.candidates, vocabulary)
    min_count = {"top-k": width, "top-p": min(width, 1), "threshold": 0}[rule.name]
    counts = id_counts[kept]
    if (counts < min_count).any() or (counts > width).any() or (logprob_counts[kept] != counts).any():
        yield f"a position does not have {width if min_count == width else f'{min_count} to {width}'} candidates"
        return
    ids, logprobs = ids[kept], logprobs[kept]
    filled = list_mask(counts, ids.shape[1])
    token_id = table["token_id"].to_numpy()[kept].astype(np.int64)
    token_logprob = table["token_logprob"].to_numpy()[kept]
    known = table["token_logprob"].is_valid().to_numpy()[kept]
    tail = table["tail_logprob"].fill_null(NO_MASS).to_numpy()[kept]

    if (table["token_id"].to_numpy() >= vocabulary).any() or (ids >= vocabulary).any():
        yield f"a token id is not below the vocabulary size, {vocabulary}"
    # Each filler is another number below every id.
    distinct = np.where(filled, ids, -1 - np.arange(ids.shape[1]))
    if (np.diff(np.sort(distinct, axis=1), axis=1) == 0).any():
        yield "a token stands twice among the candidates of one position"
    if not (np.isfinite(logprobs[filled]).all() and np.isfinite(token_logprob[known]).all()) or np.isnan(tail).any():
        yield "a log-probability is not a finite number"
        return
    if ((logprobs[:, 1:] > logprobs[:, :-1]) & filled[:, 1:]).any():
        yield "candidates are not sorted, likeliest first"
    if (np.isneginf(tail) != (counts == vocabulary)).any():
        yield "the tail is empty although candidates are left out, or the reverse"
    values = np.concatenate([logprobs[filled], token_logprob[known], tail[np.isfinite(tail)]])
    if (values > 0).any():
        yield "a log-probability is above zero"
    if (np.abs(np.log(total_mass(logprobs, tail))) > 1e-4).any():  # room for float32
        yield "candidates and tail do not sum to one within the rounding"
    among = ids == token_id[:, None]
    if (np.where(among, logprobs, 0).sum(axis=1)[among.any(axis=1)] != token_logprob[among.any(axis=1)]).any():
        yield "token_logprob is not the log-probability of the candidate it equals"
    if "tail_logsumexp" in table.column_names:
        yield from _tempered_damage(table["tail_logsumexp"].to_numpy()[kept], counts == vocabulary, step)
    if "tail_entropy" in table.column_names:
        yield from _entropy_damage(table["tail_entropy"].to_numpy()[kept], vocabulary - id_counts[kept], step)
    if rule.name == "threshold" and (logprobs[filled] < np.log(rule.draw_weight) - ROUNDED * step).any():
        yield f"a candidate is less likely than {rule.draw_weight:g}"
    if rule.draw_weight:
        yield from _draws_damage(table, kept, distinct, tail, rule, step, vocabulary)


def _tempered_damage(tail_logsumexp: np.ndarray, whole: np.ndarray, step: float) -> Iterator[str]:
    """What is wrong with the tail at the calibration's temperature; `whole`: the candidates are the whole vocabulary."""
    finite = tail_logsumexp[~whole]
    if not np.isfinite(finite).all() or not np.isneginf(tail_logsumexp[whole]).all():
        yield "tail_logsumexp is not a finite number although there is a tail, or the reverse"
    elif (quantise(finite, step) != finite).any():
        yield f"tail_logsumexp is not a multiple of {step}"


def _entropy_damage(tail_entropy: np.ndarray, tail_sizes: np.ndarray, step: float) -> Iterator[str]:
    """What is wrong with the tail's entropy; `tail_sizes`: of how many tokens each tail is."""
    most = np.log(np.maximum(tail_sizes, 1))
    if not ((tail_entropy >= 0) & (tail_entropy <= most + step)).all():
        yield "tail_entropy is below 0, or above the logarithm of the tail's tokens"
    elif (quantise(tail_entropy, step) != tail_entropy).any():
        yield f"tail_entropy is not a multiple of {step}"


def _draws_damage(
    table: pa.Table, kept: np.ndarray, candidates: np.ndarray, tail: np.ndarray, rule: Selection, step: float, vocabulary: int
) -> Iterator[str]:
    """What is wrong with the draws; of the N kept positions candidates (N, K), fillers below 0, and the tail's log (N,)."""
    drawn, counts = (array[kept] for array in padded_lists(table["tail_ids"], -1, np.int64))
    filled = list_mask(counts, drawn.shape[1])
    if (drawn >= vocabulary).any():
        yield f"a drawn token's id is not below the vocabulary size, {vocabulary}"
    # As many as lie so far apart in the tail as it was before it was rounded, from wherever they start.
    margin = np.exp(ROUNDED * step)
    expected = np.exp(tail.astype(np.float64)) / rule.draw_weight
    if ((counts <= expected / margin - 1 - 1e-6) | (counts >= expected * margin + 1 + 1e-6)).any():
        yield f"a position does not have as many draws of weight {rule.draw_weight:g} as its tail is large"
    if ((drawn[:, 1:] < drawn[:, :-1]) & filled[:, 1:]).any():
        yield "drawn tokens are not in the order of their ids"
    if rule.name == "threshold" and ((drawn[:, 1:] == drawn[:, :-1]) & filled[:, 1:]).any():
        yield "a token that is less likely than a draw's weight was drawn twice"
    if any(((drawn == candidate[:, None]) & filled).any() for candidate in candidates.T):
        yield "a drawn token is among the candidates"
