"""How often the most salient tokens of a context are of the answer, beside what chance gives. Imports no torch.

That they are shows that the teacher copies, not that it knows: a teacher that picks an option at random is led by that option
all the same. So the random baseline and the teacher's accuracy stand beside every share, and what they leave in doubt is said.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from knowledge_store import KnowledgeStore
from knowledge_store.errors import InputError
from knowledge_store.kinds.positions import knows_likeliest
from knowledge_store.quantities import percentage
from student_train.rationales.configuration import RationalesConfig
from student_train.rationales.contexts import Context, check_saliency, contexts, most_salient
from student_train.rationales.spans import AnswerPlaces

_Z = 1.96  # of a 95% interval


@dataclass(frozen=True)
class Share:
    """A share of examples.

    Attributes:
        count, of: how many of how many.
        random: what as many tokens drawn at random from each context give on average; None where that has no meaning.
    """

    count: int
    of: int
    random: float | None = None

    @property
    def value(self) -> float:
        """The share."""
        return self.count / self.of

    @property
    def interval(self) -> tuple[float, float]:
        """Where it lies with 95% confidence (Wilson)."""
        n, p = self.of, self.value
        centre, reach = p + _Z**2 / (2 * n), _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
        return max(0.0, (centre - reach) / (1 + _Z**2 / n)), min(1.0, (centre + reach) / (1 + _Z**2 / n))


@dataclass(frozen=True)
class Overlap:
    """What the rationales of a dump hold.

    Attributes:
        examples: sequences with a target, and at least as much context as a rationale takes.
        left_out: sequences with a target and less.
        stands: examples in whose context the answer stands.
        gold: examples whose rationale holds a token of it.
        own: the same of what the teacher would have answered; None where the dump does not say.
        accuracy: examples in which each token of the answer is the teacher's likeliest there; None where it does not say.
        chance: share of answers that are right by guessing.
    """

    examples: int
    left_out: int
    stands: Share
    gold: Share
    own: Share | None
    accuracy: Share | None
    chance: float

    def rows(self) -> list[tuple[str, str, str]]:
        """Label, share with its interval, and what chance gives."""
        shares = [
            ("the answer stands in the context", self.stands, None),
            ("a rationale holds a token of the answer", self.gold, self.gold.random),
            ("… of the teacher's own answer", self.own, self.own.random if self.own else None),
            ("the teacher is right", self.accuracy, self.chance),
        ]
        return [
            (label, _shown(share) if share else "not known", "" if chance is None or not share else percentage(chance))
            for label, share, chance in shares
        ]

    def warnings(self) -> Iterator[str]:
        """What is in doubt, a sentence each."""
        for name, share in (("the answer", self.gold), ("the teacher's own answer", self.own)):
            if share is not None and share.random is not None and share.interval[0] <= share.random:
                yield f"rationales hold {name} no more often than tokens drawn at random: they say nothing of it"
        if self.accuracy is None:
            yield "whether the teacher knows the answers is not known, since the dump keeps no candidates of `positions`"
        elif self.accuracy.interval[0] <= self.chance:
            yield (
                f"the teacher is right in {percentage(self.accuracy.value)}, and chance gives {percentage(self.chance)}: its"
                " rationales show what it copies, not what it knows"
            )


def _shown(share: Share) -> str:
    low, high = share.interval
    return f"{percentage(share.value)} [{percentage(low)}, {percentage(high)}]"


def measure_overlap(store: KnowledgeStore, config: RationalesConfig) -> Overlap:
    """Hold the rationales of a dump against the answers, by the characters that they take up (see `spans`).

    The answer are the targets, without what ends them; the teacher's own is what it finds likeliest at each of them, after the
    right tokens before it.

    Raises:
        InputError: there is no saliency, the dumps are not of one corpus, or no context is long enough.
    """
    dump, count = store.dump(config.dump), config.rationale_tokens
    source = store.dump(config.rationale_dump) if config.rationale_dump is not None else dump
    check_saliency(store, source)
    if source != dump:
        store.lacking([dump, source])
    known = knows_likeliest(store.manifest(dump))
    answers = AnswerPlaces(store.tokens(source)["text"].to_pylist())
    # Of a dump beside the other, what the teacher said at the targets alone.
    said = {
        context.sequence_id: context.likeliest[context.is_target]
        for context in (contexts(store, dump, shares=False, likeliest=True) if known and source != dump else ())
        if context.likeliest is not None
    }
    tally: Counter[str] = Counter()
    expected: dict[str, float] = {"gold": 0.0, "own": 0.0}
    commonest: Counter[str] = Counter()
    for context in contexts(store, source, shares=True, likeliest=known and source == dump):
        if not context.is_target.any() or (said and context.sequence_id not in said):
            continue
        places = context.places
        if len(places) < count:
            tally["left out"] += 1
            continue
        tally["examples"] += 1
        rationale = np.isin(places, most_salient(context, places, count))
        gold = answers.answers(context)
        commonest["\n".join(gold)] += 1
        own = _said(context, said)
        for name, texts in (("gold", gold), ("own", answers.answers(context, own) if own is not None else None)):
            if texts is None:
                continue
            held = answers.places(context, texts)
            tally[f"{name} stands"] += bool(held.any())
            tally[name] += bool((held & rationale).any())
            expected[name] += 1 - math.comb(int((~held).sum()), count) / math.comb(len(places), count)
        if own is not None:
            words = [place for place in np.flatnonzero(context.is_target) if answers.is_word(int(context.token_ids[place]))]
            tally["right"] += bool(words) and bool((own[words] == context.token_ids[words]).all())
    total = tally["examples"]
    if not total:
        raise InputError(
            f"no sequence of the dump {source} has a target and {count} tokens of context: use a lower --rationale-tokens"
        )
    chance = config.chance if config.chance is not None else commonest.most_common(1)[0][1] / total
    shares = {name: Share(tally[name], total, expected[name] / total) for name in expected}
    return Overlap(
        examples=total,
        left_out=tally["left out"],
        stands=Share(tally["gold stands"], total),
        gold=shares["gold"],
        own=shares["own"] if known else None,
        accuracy=Share(tally["right"], total) if known else None,
        chance=chance,
    )


def _said(context: Context, said: dict[int, np.ndarray]) -> np.ndarray | None:
    """The teacher's likeliest token at each target, int64 (L,); None where it is not known."""
    if context.sequence_id not in said:
        return context.likeliest
    tokens = context.token_ids.copy()
    tokens[context.is_target] = said[context.sequence_id]
    return tokens
