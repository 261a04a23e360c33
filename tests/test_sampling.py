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
from teacher_dump.extraction.sampling import BLOCK, block_sums, counted, draw, independent_points, likeliest, systematic_points

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


def target_of(found: dict[str, torch.Tensor], vocabulary: int) -> np.ndarray:
    """The target that candidates and draws make, (N, V) in float64: a draw stands for its share of the tail."""
    target = torch.zeros(len(found["tail_logprob"]), vocabulary, dtype=torch.float64)
    target.scatter_add_(1, found["candidate_ids"], found["candidate_logprobs"].double().exp())
    counts = found["tail_counts"].double()
    weights = found["tail_logprob"].double().exp()[:, None] * counts / counts.sum(1, keepdim=True)
    target.scatter_add_(1, found["tail_ids"], weights)
    return target.numpy()


def chi_square(seen: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    """Pearson's statistic over bins of like probability, at least 25 expected draws in each, and how many bins."""
    order = np.argsort(-expected)
    full = np.flatnonzero(np.diff(np.floor(expected[order].cumsum() / 25), prepend=0))
    edges = np.concatenate([[0], full[:-1] + 1])
    observed, hoped = np.add.reduceat(seen[order], edges), np.add.reduceat(expected[order], edges)
    return float(((observed - hoped) ** 2 / hoped).sum()), len(edges)


@pytest.mark.parametrize("vocabulary", [512, 151_936, 262_144])
@pytest.mark.parametrize(("candidates", "draws"), [(5, 4), (0, 50), (1, 300)])
def test_the_mean_of_many_draws_is_the_full_softmax(vocabulary, candidates, draws):
    """Over 60,000 draws, how often each token comes is what the full softmax outside the candidates says.

    Independent draws make Pearson's statistic over B bins a chi-square variable of B − 1 degrees; systematic draws vary
    less, so that the same limit holds. A sound sampler fails each case with a probability below 10⁻⁶, by that limit.
    """
    full = torch.softmax(zipf_logits(vocabulary).double(), dim=1)[0]
    weights = torch.softmax(zipf_logits(vocabulary), dim=1)
    weights[0, full.topk(candidates).indices] = 0
    full[full.topk(candidates).indices] = 0
    sums = block_sums(weights)
    make = systematic_points if candidates else independent_points
    positions = 60_000 // draws
    points = torch.from_numpy(make(1, positions, draws)).reshape(1, -1)
    # In parts so small that a large vocabulary is searched by blocks, and a small one directly.
    drawn = torch.cat([draw(weights, sums, part) for part in points.split(500, dim=1)], dim=1)
    seen = np.bincount(drawn[0].numpy(), minlength=vocabulary)
    expected = (full / full.sum() * positions * draws).numpy()
    statistic, bins = chi_square(seen.astype(np.float64), expected)
    assert bins > 50
    assert statistic < chi_square_limit(bins - 1, FALSE_ALARM)


def test_a_faulty_sampler_is_found_by_that_statistic():
    """Running sums in half precision over a large vocabulary, the usual fault: rare tokens come too seldom."""
    vocabulary, draws = 262_144, 60_000
    expected = torch.softmax(zipf_logits(vocabulary).double(), dim=1)[0]
    coarse = expected.half().cumsum(0).half().double()
    points = torch.from_numpy(independent_points(1, 1, draws))[0]
    drawn = torch.searchsorted(coarse, points * coarse[-1], right=True).clamp(max=vocabulary - 1)
    seen = np.bincount(drawn.numpy(), minlength=vocabulary).astype(np.float64)
    statistic, bins = chi_square(seen, (expected * draws).numpy())
    assert statistic > chi_square_limit(bins - 1, FALSE_ALARM)


def test_draws_beside_candidates_vary_less_than_random_sampling_of_as_many_ids():
    """Where the candidates hold two thirds of the probability, as five of a small model's do on open text."""
    logits = zipf_logits(4096) * 1.35
    q = torch.softmax(logits.double(), dim=1).numpy()
    rows = 2000
    assert 0.6 < np.sort(q[0])[-5:].sum() < 0.75

    def error(selection: Selection, points) -> tuple[float, float]:
        at = torch.from_numpy(points(1, rows, selection.draws))
        found = knowledge_of(logits.expand(rows, -1).clone(), torch.zeros(rows, dtype=torch.long), selection, at)
        ids = selection.candidates + float((found["tail_counts"] > 0).sum(1).double().mean())
        return float(((target_of(found, 4096) - q) ** 2).sum(1).mean()), ids

    mixed, mixed_ids = error(Selection("top-k", 5, 4), systematic_points)
    sampled, sampled_ids = error(Selection("random-sampling", 0, 20), independent_points)
    assert mixed_ids < sampled_ids  # fewer ids, and yet
    assert mixed < 0.7 * sampled


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
    draws=st.integers(1, 4),
    zeros=st.floats(0, 0.99),
    seed=st.integers(0, 2**32),
)
def test_only_what_has_weight_is_drawn(vocabulary, draws, zeros, seed):
    generator = np.random.default_rng(seed)
    weights = generator.exponential(size=(5, vocabulary)).astype(np.float32) ** 8
    weights[generator.random(weights.shape) < zeros] = 0
    weights[np.arange(5), generator.integers(0, vocabulary, 5)] = 1
    points = generator.random((5, draws))
    points[0] = np.nextafter(1, 0)
    points[1] = 0
    tensor = torch.from_numpy(weights)
    ids = draw(tensor, block_sums(tensor), torch.from_numpy(points)).numpy()
    assert (np.take_along_axis(weights, ids, 1) > 0).all()
    # Each is where a plain running sum in float64 passes its point, to within rounding.
    ends = weights.astype(np.float64).cumsum(axis=1)
    at = points * ends[:, -1:]
    slack = 1e-6 * ends[:, -1:]
    assert (np.take_along_axis(ends, ids, 1) >= at - slack).all()
    assert (np.take_along_axis(ends - weights, ids, 1) <= at + slack).all()


@given(st.lists(st.lists(st.integers(0, 5), min_size=6, max_size=6), min_size=1, max_size=4))
def test_counts(tokens):
    ids, counts = (each.numpy() for each in counted(torch.tensor(tokens)))
    for row, names, times in zip(tokens, ids, counts, strict=True):
        found = {int(name): int(count) for name, count in zip(names, times, strict=True) if count}
        assert found == {token: row.count(token) for token in row}
        assert list(found) == sorted(found)


def test_systematic_draws_take_each_token_nearly_as_often_as_its_probability_says():
    probabilities = torch.tensor([[0.5, 0.25, 0.15, 0.1]])
    for sequence in range(50):
        points = torch.from_numpy(systematic_points(sequence, 1, 8))
        taken = torch.bincount(draw(probabilities, block_sums(probabilities), points)[0], minlength=4)
        assert taken[:2].tolist() == [4, 2]  # 8 q is whole: always exactly
        assert int(taken[2]) in (1, 2)
        assert int(taken[3]) in (0, 1)


def test_points_belong_to_their_sequence_and_position():
    """So a shard is the same whoever draws it, and no two sequences share their luck."""
    for points in (independent_points, systematic_points):
        long, short = points(7, 100, 4), points(7, 10, 4)
        assert np.array_equal(long[:10], short)  # position t has its points whatever the length
        assert not np.array_equal(points(8, 10, 4), short)
        assert ((long >= 0) & (long < 1)).all()
    assert len(np.unique(independent_points(7, 100, 4))) == 400
    # Pinned: another generator would draw other tokens from the same corpus.
    np.testing.assert_array_equal(independent_points(65536, 1, 2)[0], PINNED)


PINNED = [0.6734117262146567, 0.04251906136648387]


@pytest.mark.parametrize("selection", [Selection("top-k", 7, 3), Selection("top-p", 7, 3)])
def test_nothing_is_drawn_where_nothing_is_left_over(selection):
    points = torch.from_numpy(systematic_points(0, 2, 3))
    found = knowledge_of(torch.randn(2, 7), torch.tensor([0, 1]), selection, points, 2.0)
    assert not found["tail_counts"].any()
    assert found["tail_logprob"].isneginf().all() and found["tail_logsumexp"].isneginf().all()


def test_top_p_takes_as_many_candidates_as_it_takes():
    probabilities = torch.tensor([[0.65, 0.28, 0.04, 0.03], [0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]])
    found = knowledge_of(probabilities.log(), torch.tensor([3, 0, 0]), Selection("top-p", 3, 0, 0.9))
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
