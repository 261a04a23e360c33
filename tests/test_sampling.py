"""Draws are unbiased, belong to their sequence alone, and never name a token that cannot be drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knowledge_store.kinds.positions.selection import Selection
from teacher_dump.extraction.distributions import knowledge_of
from teacher_dump.extraction.sampling import BLOCK, block_sums, draw, likeliest, starts

FALSE_ALARM = 1e-6  # how often a sound sampler may fail one of the tests of this file


def zipf_logits(vocabulary: int, seed: int = 0) -> torch.Tensor:
    """Logits as a language model's: probabilities that fall about as 1/rank, in no order, one row."""
    generator = np.random.default_rng(seed)
    logits = -1.1 * np.log(1 + np.arange(vocabulary)) + generator.normal(0, 0.5, vocabulary)
    return torch.from_numpy(generator.permutation(logits)[None].astype(np.float32))


def chi_square_limit(degrees: int, false_alarm: float) -> float:
    """What a chi-square variable exceeds with at most that probability (Laurent and Massart 2000, lemma 1)."""
    x = -math.log(false_alarm)
    return degrees + 2 * math.sqrt(degrees * x) + 2 * x


def target_of(found: dict[str, torch.Tensor], draw_weight: float, vocabulary: int) -> np.ndarray:
    """The target that candidates and draws make, (N, V) in float64."""
    target = torch.zeros(len(found["tail_logprob"]), vocabulary, dtype=torch.float64)
    target.scatter_add_(1, found["candidate_ids"], found["candidate_logprobs"].double().exp())
    drawn = found["tail_ids"]
    target.scatter_add_(1, drawn.clamp(min=0), draw_weight * (drawn >= 0).double())
    return target.numpy()


def chi_square(seen: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    """Pearson's statistic over bins of like probability, at least 25 expected draws in each, and how many bins."""
    order = np.argsort(-expected)
    full = np.flatnonzero(np.diff(np.floor(expected[order].cumsum() / 25), prepend=0))
    edges = np.concatenate([[0], full[:-1] + 1])
    observed, hoped = np.add.reduceat(seen[order], edges), np.add.reduceat(expected[order], edges)
    return float(((observed - hoped) ** 2 / hoped).sum()), len(edges)


@pytest.mark.parametrize("vocabulary", [512, 151_936, 262_144])
@pytest.mark.parametrize("candidates", [0, 5])
def test_the_mean_of_many_draws_is_the_full_softmax(vocabulary, candidates):
    """Over 60,000 draws, how often each token comes is what the full softmax outside the candidates says.

    Independent draws make Pearson's statistic over B bins a chi-square variable of B − 1 degrees; systematic draws vary
    less, so that the same limit holds. A sound sampler fails each case with a probability below 10⁻⁶, by that limit.
    """
    full = torch.softmax(zipf_logits(vocabulary).double(), dim=1)[0]
    weights = torch.softmax(zipf_logits(vocabulary), dim=1)
    weights[0, full.topk(candidates).indices] = 0
    full[full.topk(candidates).indices] = 0
    positions, draws = 200, 300
    # As many as search a large vocabulary by blocks, and a small one directly.
    spacing = (full.sum() / draws).expand(50)
    begin = torch.from_numpy(starts(1, positions, 0))
    sums = block_sums(weights).expand(50, -1)
    drawn = torch.cat([draw(weights.expand(50, -1), sums, spacing, part, draws + 1).flatten() for part in begin.split(50)])
    seen = np.bincount(drawn[drawn >= 0].numpy(), minlength=vocabulary)
    assert abs(seen.sum() - positions * draws) <= positions
    statistic, bins = chi_square(seen.astype(np.float64), (full / full.sum() * positions * draws).numpy())
    assert bins > 50
    assert statistic < chi_square_limit(bins - 1, FALSE_ALARM)


def test_a_faulty_sampler_is_found_by_that_statistic():
    """Running sums in half precision over a large vocabulary, the usual fault: rare tokens come too seldom."""
    vocabulary, draws = 262_144, 60_000
    expected = torch.softmax(zipf_logits(vocabulary).double(), dim=1)[0]
    coarse = expected.half().cumsum(0).half().double()
    points = torch.from_numpy(np.random.default_rng(1).random(draws))
    drawn = torch.searchsorted(coarse, points * coarse[-1], right=True).clamp(max=vocabulary - 1)
    seen = np.bincount(drawn.numpy(), minlength=vocabulary).astype(np.float64)
    statistic, bins = chi_square(seen, (expected * draws).numpy())
    assert statistic > chi_square_limit(bins - 1, FALSE_ALARM)


@pytest.mark.parametrize(
    "selection",
    [Selection("top-k", 5, 0.03), Selection("top-p", 9, 0.07, p=0.6), Selection.threshold(0.05), Selection.threshold(0.4)],
)
def test_the_mean_of_many_targets_is_the_full_softmax(selection):
    """Candidates with their own probability, draws with the same one: each token's mean over 4,000 starts lies within five
    standard errors of a draw or none."""
    rows, vocabulary = 4000, 300
    logits = zipf_logits(vocabulary) * 1.35
    q = torch.softmax(logits.double(), dim=1)[0].numpy()
    begin = torch.from_numpy(starts(3, rows, 0))
    found = knowledge_of(logits.repeat(rows, 1), torch.zeros(rows, dtype=torch.long), selection, begin)
    target = target_of(found, selection.draw_weight, vocabulary)
    # A token of q below the weight is drawn with a probability q / weight; of a larger one the rest after whole draws counts.
    part = (q / selection.draw_weight) % 1
    error = selection.draw_weight * np.sqrt(part * (1 - part) / rows)
    assert (np.abs(target.mean(0) - q) < 5 * error + 1e-6).all()
    assert np.ptp(target.sum(1)) < selection.draw_weight + 1e-5  # the drawn mass is less than one draw off


def test_draws_of_one_weight_vary_less_than_independent_draws_of_as_many_ids():
    """Where the candidates hold two thirds of the probability, as five of a small model's do on open text."""
    logits = zipf_logits(4096) * 1.35
    q = torch.softmax(logits.double(), dim=1).numpy()
    rows = 2000
    assert 0.6 < np.sort(q[0])[-5:].sum() < 0.75

    def error(selection: Selection) -> tuple[float, float]:
        begin = torch.from_numpy(starts(1, rows, 0))
        found = knowledge_of(logits.repeat(rows, 1), torch.zeros(rows, dtype=torch.long), selection, begin)
        ids = (found["candidate_logprobs"] > -torch.inf).sum(1) + (found["tail_ids"] >= 0).sum(1)
        return float(((target_of(found, selection.draw_weight, 4096) - q) ** 2).sum(1).mean()), float(ids.double().mean())

    independent = np.random.default_rng(0).multinomial(20, q[0] / q[0].sum(), rows) / 20
    sampled, sampled_ids = float(((independent - q) ** 2).sum(1).mean()), float((independent > 0).sum(1).mean())
    mixed, mixed_ids = error(Selection("top-k", 5, 0.08))
    threshold, threshold_ids = error(Selection.threshold(0.08))
    assert mixed_ids < sampled_ids and mixed < 0.7 * sampled  # fewer ids, and yet
    assert threshold_ids < mixed_ids and threshold < 1.3 * mixed


@settings(max_examples=60)
@given(
    vocabulary=st.sampled_from([1, 7, 256, 257, 511, 1024, 1500, 4001]),
    count=st.integers(1, 9),
    distinct=st.integers(2, 10_000),
    offset=st.sampled_from([-1e30, -300.0, 0.0]),
    seed=st.integers(0, 2**32),
)
def test_the_likeliest_are_those_of_a_plain_ranking(vocabulary, count, distinct, offset, seed):
    """Also where many logits are equal, and where all are below what fills up the last block in a sum."""
    count = min(count, vocabulary)
    logits = np.random.default_rng(seed).integers(0, distinct, (4, vocabulary)).astype(np.float32) + np.float32(offset)
    values, ids = (each.numpy() for each in likeliest(torch.from_numpy(logits), count))
    np.testing.assert_array_equal(values, -np.sort(-logits, axis=1)[:, :count])
    np.testing.assert_array_equal(values, np.take_along_axis(logits, ids, axis=1))
    assert all(len(set(row)) == count for row in ids.tolist())


@settings(max_examples=60)
@given(
    vocabulary=st.sampled_from([1, 2, 255, 256, 257, 700, 3 * BLOCK]),
    draws=st.floats(0.1, 4),
    dense=st.booleans(),
    zeros=st.floats(0, 0.99),
    seed=st.integers(0, 2**32),
)
def test_each_draw_is_where_the_running_sum_passes_its_point(vocabulary, draws, dense, zeros, seed):
    generator = np.random.default_rng(seed)
    weights = generator.exponential(size=(5, vocabulary)).astype(np.float32) ** 8
    weights[generator.random(weights.shape) < zeros] = 0
    weights[np.arange(4), generator.integers(0, vocabulary, 4)] = 1
    weights[4] = 0
    ends = weights.astype(np.float64).cumsum(axis=1)
    whole = ends[:, -1]
    begin = generator.random(5)
    begin[:2] = np.nextafter(1, 0), 0
    spacing = np.where(whole > 0, whole / draws, 1.0)
    tensor = torch.from_numpy(weights)
    most = 10_000 if dense else 5  # more of them look at every token
    ids = draw(tensor, block_sums(tensor), *map(torch.from_numpy, (spacing, begin)), most).numpy()
    drawn = ids >= 0
    assert (np.diff(drawn.astype(int), axis=1) <= 0).all()  # no draw behind a filler
    assert (drawn.sum(1) <= draws + 1).all() and (drawn.sum(1) >= np.where(whole > 0, draws - 1, 0)).all()
    assert not drawn[4].any()
    assert (np.diff(ids, axis=1)[drawn[:, 1:]] >= 0).all()
    rows, numbers = np.nonzero(drawn)
    tokens = ids[rows, numbers]
    assert (weights[rows, tokens] > 0).all()
    points = (begin[rows] + numbers) * spacing[rows]
    slack = 1e-6 * whole[rows]
    assert (ends[rows, tokens] >= points - slack).all()
    assert ((ends - weights)[rows, tokens] <= points + slack).all()


def test_draws_take_each_token_nearly_as_often_as_its_probability_says():
    probabilities = torch.tensor([[0.5, 0.25, 0.15, 0.1]])
    for sequence in range(50):
        begin = torch.from_numpy(starts(sequence, 1, 0))
        drawn = draw(probabilities, block_sums(probabilities), torch.tensor([0.125], dtype=torch.float64), begin, 9)[0]
        taken = torch.bincount(drawn[drawn >= 0], minlength=4)
        assert taken[:2].tolist() == [4, 2]  # 8 q is whole: always exactly
        assert int(taken[2]) in (1, 2)
        assert int(taken[3]) in (0, 1)


def test_starts_belong_to_their_sequence_position_and_seed():
    """So a shard is the same whoever draws it, no two sequences share their luck, and neither do two seeds."""
    long, short = starts(7, 100, 0), starts(7, 10, 0)
    assert np.array_equal(long[:10], short)  # position t has its start whatever the length
    assert not np.isin(short, [starts(8, 10, 0), starts(7, 10, 1), starts(7, 10, 2**32 - 1)]).any()
    assert ((long >= 0) & (long < 1)).all() and len(np.unique(long)) == 100
    # Pinned: another generator would draw other tokens from the same corpus.
    np.testing.assert_array_equal(starts(65536, 2, 0), PINNED)
    np.testing.assert_array_equal(starts(65536, 2, 3), PINNED_OF_SEED_3)


PINNED = [0.6734117262146567, 0.04251906136648387]
PINNED_OF_SEED_3 = [0.8800041765393831, 0.457646775386471]


@pytest.mark.parametrize("selection", [Selection("top-k", 7, 0.3), Selection("top-p", 7, 0.3), Selection.threshold(0.001)])
def test_nothing_is_drawn_where_nothing_is_left_over(selection):
    begin = torch.zeros(2, dtype=torch.float64)
    found = knowledge_of(torch.randn(2, 7), torch.tensor([0, 1]), selection, begin, 2.0)
    assert not (found["tail_ids"] >= 0).any()
    assert found["tail_logprob"].isneginf().all() and found["tail_logsumexp"].isneginf().all()


def test_a_threshold_keeps_what_reaches_it_and_may_keep_nothing():
    probabilities = torch.tensor([[0.65, 0.28, 0.04, 0.03], [0.25, 0.25, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01]])
    begin = torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64)
    found = knowledge_of(probabilities.log(), torch.tensor([3, 0, 0]), Selection.threshold(0.26), begin)
    assert (found["candidate_logprobs"] > -torch.inf).sum(1).tolist() == [2, 0, 1]
    np.testing.assert_allclose(found["tail_logprob"].exp(), [0.07, 1, 0.03], rtol=1e-5)
    np.testing.assert_allclose(found["token_logprob"].exp(), [0.03, 0.25, 0.97], rtol=1e-5)
    # Points 0, 0.26, …; 0.13, 0.39, 0.65, 0.91; none below 0.03.
    assert found["tail_ids"].tolist() == [[2, -1, -1, -1], [0, 1, 2, 3], [-1, -1, -1, -1]]
    found = knowledge_of(probabilities[1:2].log(), torch.tensor([3]), Selection.threshold(0.26), begin[1:2])
    assert found["candidate_ids"].shape == (1, 0)


def test_top_p_takes_as_many_candidates_as_it_takes():
    probabilities = torch.tensor([[0.65, 0.28, 0.04, 0.03], [0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]])
    found = knowledge_of(probabilities.log(), torch.tensor([3, 0, 0]), Selection("top-p", 3, p=0.9))
    kept = found["candidate_logprobs"] > -torch.inf
    assert kept.sum(1).tolist() == [2, 1, 3]  # 0.65 + 0.28 reaches it, one is enough, and three are the most
    assert torch.allclose(found["tail_logprob"].exp(), torch.tensor([0.07, 0.03, 0.25]))
    assert torch.allclose(found["token_logprob"].exp(), torch.tensor([0.03, 0.97, 0.25]))


def test_log_probabilities_at_another_temperature_follow_exactly_from_what_is_kept():
    logits = zipf_logits(2000) * 1.7
    for temperature in (0.5, 1.3, 3.0):
        found = knowledge_of(logits.clone(), torch.tensor([11]), Selection("top-k", 5), None, temperature)
        kept = torch.cat([found["candidate_logprobs"] / temperature, found["tail_logsumexp"][:, None]], dim=1).double()
        full = torch.log_softmax(logits.double() / temperature, dim=1)
        ids = found["candidate_ids"]
        np.testing.assert_allclose(torch.log_softmax(kept, dim=1)[:, :-1], full.gather(1, ids), atol=1e-5)
        rest = torch.logsumexp(full.scatter(1, ids, -torch.inf), dim=1)
        np.testing.assert_allclose(torch.log_softmax(kept, dim=1)[:, -1], rest, atol=1e-5)
        token = found["token_logprob"].double() / temperature - torch.logsumexp(kept, dim=1)
        np.testing.assert_allclose(token, full[:, 11], atol=1e-5)
