"""The order in which sequences of several dumps are read: a pure function of seed, epoch, dumps and weights, the same for ever
and on every machine. It takes no memory: what stands in any slot is computed from the slot.

Of each dump there is an endless stream: its sequences in one permutation after the other. An epoch takes the next so many of
each, its share: a dump with a larger share than it has sequences is repeated in new permutations, and one with a smaller share
goes on in the next epoch where it stopped. The streams are interleaved as evenly as whole numbers allow, and within chunks of
slots which dump comes when is shuffled, so that none always falls to the same rank; each stream stays in its order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np

from knowledge_store.errors import InputError
from knowledge_store.reading.ordinals import Chosen
from knowledge_store.reading.permutation import permuted

CHUNK = 1024
MOST = 2**32 - 1  # slots of an epoch of several dumps: products of two such numbers fit a word
_SLOTS = -1  # where a dump's place stands in the key of a permutation of its own


class Order(Protocol):
    """What stands in the slots of one epoch."""

    def __len__(self) -> int: ...

    def items(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the slots from `start` to `stop`, as far as there are any: the places of their dumps in the order in which these
        were named, and their ordinals there; both int64."""
        ...


class Stream(Protocol):
    """The sequences of one dump, again and again."""

    def __len__(self) -> int:
        """How many sequences there are, each once in so many items."""
        ...

    def ordinals(self, items: np.ndarray) -> np.ndarray:
        """The ordinals that stand at some items of the stream (int64, each at least 0)."""
        ...


def passes(items: np.ndarray, count: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Items of a stream by permutation: its number, which of the items are of it, and their places in it."""
    numbers, places = np.divmod(items, count)
    for number in np.unique(numbers).tolist():
        where = np.flatnonzero(numbers == number)
        yield number, where, places[where]


class InOrder:
    """Sequences as they are stored, or listed."""

    def __init__(self, chosen: Chosen):
        self._chosen = chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def ordinals(self, items: np.ndarray) -> np.ndarray:
        return self._chosen[items % len(self)]


class Shuffled:
    """Any sequence after any other; every permutation is another, by its number.

    Args:
        chosen: the sequences.
        seed: of the order.
        place: of the dump among those that are read.
    """

    def __init__(self, chosen: Chosen, seed: int, place: int):
        self._chosen, self._seed, self._place = chosen, seed, place

    def __len__(self) -> int:
        return len(self._chosen)

    def ordinals(self, items: np.ndarray) -> np.ndarray:
        result = np.empty(len(items), np.int64)
        for number, where, places in passes(items, len(self)):
            result[where] = self._chosen[permuted(places, len(self), self._seed, self._place, number)]
        return result


class EpochOrder:
    """One epoch of several streams.

    Args:
        streams: of the dumps, in the order in which they were named.
        shares: how many sequences the epoch has of each.
        seed, epoch: which order.
        shuffle: False has the dumps one after the other.

    Raises:
        InputError: the epoch is too long.
    """

    def __init__(self, streams: Sequence[Stream], shares: Sequence[int], seed: int, epoch: int, shuffle: bool = True):
        if len(streams) > 1 and sum(shares) > MOST:
            raise InputError(f"an epoch of several dumps has at most {MOST:,} sequences, not {sum(shares):,}: use fewer dumps")
        self.streams, self.shares = streams, shares
        self._seed, self._epoch, self._shuffle = seed, epoch, shuffle

    def __len__(self) -> int:
        return sum(self.shares)

    def items(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        slots = np.arange(start, max(start, min(stop, len(self))), dtype=np.int64)
        places, within = self._shared(slots)
        ordinals = np.empty_like(slots)
        for place, (stream, share) in enumerate(zip(self.streams, self.shares, strict=True)):
            where = np.flatnonzero(places == place)
            if len(where):
                ordinals[where] = stream.ordinals(within[where] + self._epoch * share)
        return places, ordinals

    def _shared(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The place of the dump of each slot, and which item of its share it takes."""
        if len(self.streams) == 1:
            return np.zeros_like(slots), slots
        if not self._shuffle:
            ends = np.cumsum(self.shares)
            places = np.searchsorted(ends, slots, side="right")
            return places, slots - (ends - self.shares)[places]
        places, within = np.empty_like(slots), np.empty_like(slots)
        for chunk in np.unique(slots // CHUNK).tolist():
            where = np.flatnonzero(slots // CHUNK == chunk)
            of_chunk = self._chunk(chunk)
            places[where], within[where] = (numbers[slots[where] - chunk * CHUNK] for numbers in of_chunk)
        return places, within

    def _chunk(self, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """As `_shared`, of all slots of a chunk."""
        first = chunk * CHUNK
        size = min(CHUNK, len(self) - first)
        even, within = divided(np.arange(first, first + size), self.shares)
        places = even[permuted(np.arange(size), size, self._seed, _SLOTS, self._epoch, chunk)]
        moved = np.empty_like(within)
        for place in range(len(self.shares)):
            moved[places == place] = within[even == place]
        return places, moved


def divided(slots: np.ndarray, shares: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Slots divided among shares as evenly as whole numbers allow.

    The first share has item number floor(slot · share / all) at each slot where that number grows; the slots that are left,
    which become consecutive numbers again, are divided among the other shares in the same way.

    Args:
        slots: int64, below the sum of the shares, which is at most `MOST`.
        shares: how many slots each gets.

    Returns:
        which share each slot is of, and which of its items, both int64.
    """
    places, within = np.empty_like(slots), np.empty_like(slots)
    rest, where = slots.astype(np.uint64), np.arange(len(slots))
    left = sum(shares)
    for place, share in enumerate(shares[:-1]):
        before, after = (number * np.uint64(share) // np.uint64(max(left, 1)) for number in (rest, rest + np.uint64(1)))
        taken = after > before
        places[where[taken]], within[where[taken]] = place, before[taken]
        rest, where = (rest - before)[~taken], where[~taken]
        left -= share
    places[where], within[where] = len(shares) - 1, rest
    return places, within


def epoch_shares(counts: Mapping[str, int], weights: Mapping[str, float] | None) -> list[int]:
    """How many sequences an epoch has of each dump: all together as many as the dumps have.

    Args:
        counts: sequences of each dump.
        weights: of the same dumps, shares that need not sum to one; None shares by the counts.

    Returns:
        whole numbers by the method of largest remainders (the first of equals), in the order of `counts`.

    Raises:
        InputError: a dump has a weight and no sequence, or its share is less than one sequence.
    """
    if weights is None or len(counts) == 1:
        return list(counts.values())
    total = sum(counts.values())
    exact = {dump: Fraction(repr(float(weights[dump]))) for dump in counts}  # of 0.7, seven tenths
    quotas = [total * weight / sum(exact.values()) for weight in exact.values()]
    shares = [int(quota) for quota in quotas]
    remainders = sorted(range(len(quotas)), key=lambda place: (shares[place] - quotas[place], place))
    for place in remainders[: total - sum(shares)]:
        shares[place] += 1
    for (dump, count), share in zip(counts.items(), shares, strict=True):
        if not count:
            raise InputError(f"there is no sequence to read in the dump {dump}, which has a weight: leave it out")
        if not share:
            raise InputError(
                f"the weight {weights[dump]:g} of the dump {dump} is less than one of the {total:,} sequences of an epoch:"
                " raise it, or leave the dump out"
            )
    return shares


def batch_items(step: int, rank: int, world_size: int, batch_size: int, consumed: int) -> slice:
    """Which items of the order make batch `step` of `rank`: [(s·W + r)·B, (s·W + r + 1)·B), counted from `consumed`."""
    start = consumed + (step * world_size + rank) * batch_size
    return slice(start, start + batch_size)


def step_count(items: int, world_size: int, batch_size: int) -> int:
    """Steps in which every rank takes a batch until `items` are gone; the last may be short on some ranks."""
    return -(-max(items, 0) // (world_size * batch_size))
