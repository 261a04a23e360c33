"""How knowledge that was kept is held against the teacher's of now, where one number says how far a sequence's is off.

What is asked now is rounded as what was kept: packed, unpacked and decoded. The number is 0 where the teacher is the same and
answers alike to the last digits.

    numeric noise    batching, device, dtype: little in every sequence
    damage           some sequences are farther off, or hold what no knowledge of the kind can be
    another teacher  the median sequence is
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from knowledge_store import KINDS, KnowledgeStore, Manifest
from knowledge_store.errors import DamageError
from knowledge_store.format.sequences import split_sequence_id, token_hash
from knowledge_store.kinds.field import KEYS
from knowledge_store.kinds.kind import Parameters
from knowledge_store.reporter import Reporter
from teacher_dump.checking.agreement import AGREES, DAMAGE, OTHER_TEACHER, OTHER_TOKENIZER, Agreement
from teacher_dump.checking.distances.distance import Limits
from teacher_dump.checking.distances.saliency import SALIENCY
from teacher_dump.checking.distances.states import STATES
from teacher_dump.checking.identity import other_model, other_tokenizer, same_weights
from teacher_dump.checking.token_source import TokenSource, find_tokens
from teacher_dump.configuration import CheckConfig
from teacher_dump.corpus.documents import Document
from teacher_dump.corpus.tokenisation import TokenSequence
from teacher_dump.dumping.batches import extract_batch, predict_batch
from teacher_dump.extraction import check_needs
from teacher_dump.teachers.protocol import Teacher

DISTANCES = {"saliency": SALIENCY, "vectors": STATES, "hidden": STATES}
SHOWN = 5
QUANTILES = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "most": 1.0}


@dataclass(frozen=True, kw_only=True)
class DistanceAgreement(Agreement):
    """How far a teacher agrees with a kind of knowledge that a dump keeps.

    Attributes:
        kind: of knowledge.
        limits: what counts as numeric noise here.
        distances: of each sequence that was compared, what `Distance.between` gives.
        sequences_off: how many are farther off than `limits.single`, or cannot be read.
    """

    kind: str
    limits: Limits
    distances: tuple[float, ...] = ()
    sequences_off: int = 0

    @property
    def lines(self) -> list[str]:
        """How far sequences are off, and the verdict with what it rests on."""
        distance = DISTANCES[self.kind]
        lines = [f"{self.dump}, kind {self.kind}: {self.sequences} sequences asked again"]
        if self.distances:
            quantiles = np.quantile(self.distances, list(QUANTILES.values()), method="higher")
            shares = ", ".join(f"{name} {value:.2%}" for name, value in zip(QUANTILES, quantiles, strict=True))
            lines.append(f"of a sequence, {distance.words.format('…')}: {shares}")
        dtype = "float32" if self.limits is distance.float32 else "a dtype of 16 bits"
        lines.append(
            f"Noise ({dtype}): up to {self.limits.typical:.1%} in the median sequence, and {self.limits.single:.0%} in any one."
            " Damage: some sequences beyond that. Another teacher: the median one (damage if its weights are the dump's own)."
        )
        return [*lines, f"Verdict: {self.verdict}", *(f"  {reason}" for reason in self.reasons)]


def check_distances(
    kind: str,
    store: KnowledgeStore,
    manifest: Manifest,
    ordinals: np.ndarray,
    teacher: Teacher,
    config: CheckConfig,
    reporter: Reporter,
) -> DistanceAgreement:
    """How far a teacher agrees with what was kept of some sequences (with a kind, a `run.Checker`).

    Raises:
        InputError: the teacher cannot give what the kind is made of, or there is too little memory.
    """
    distance = DISTANCES[kind]
    dtypes = {manifest.teacher.get("dtype", "float32"), teacher.description["dtype"]}
    limits = distance.float32 if dtypes <= {"float32", "float64"} else distance.short
    weights_are_same, notes = same_weights(manifest, teacher)
    tokenizer = other_tokenizer(store, manifest, teacher, notes)
    distances: dict[int, float] = {}
    unreadable: list[str] = []
    refusal = other_model(manifest, teacher) or distance.difference(manifest.teacher, teacher.description)
    if refusal:
        ordinals = ordinals[:0]
    else:
        check_needs((kind,), teacher)
        source = find_tokens(store, manifest)
        assert source is not None  # `run.check` has refused a dump without any
        with reporter.progress(f"asking the teacher for {distance.asked_for}", len(ordinals), "sequences") as advance:
            for ordinal in ordinals.tolist():
                try:
                    sequence_id, apart = _distance(kind, store, manifest, source, ordinal, teacher, config)
                    distances[sequence_id] = apart
                except DamageError as error:
                    unreadable.append(str(error))
                advance(1)
    typical = float(np.median(list(distances.values()))) if distances else 0.0
    typically = f"in the median sequence {distance.words.format(f'{typical:.2%}')} (noise: up to {limits.typical:.1%})"
    off = sorted((apart, number) for number, apart in distances.items() if apart > limits.single)
    found = [*unreadable, *(f"sequence {number}: {distance.words.format(f'{apart:.1%}')}" for apart, number in reversed(off))]
    reasons = [*found[:SHOWN], *([f"and {len(found) - SHOWN} more sequences"] if len(found) > SHOWN else [])]
    if tokenizer or refusal:
        verdict, reasons = OTHER_TOKENIZER if tokenizer else OTHER_TEACHER, [*tokenizer, *([refusal] if refusal else [])]
    elif typical > limits.typical:
        verdict, reasons = DAMAGE if weights_are_same else OTHER_TEACHER, [typically, *reasons]
    elif found:
        verdict = DAMAGE
    else:
        verdict, reasons = AGREES, [f"{typically}, and in none more than {limits.single:.0%}"]
        if not weights_are_same and limits is distance.short:
            notes.append("a teacher that differs by less than a short dtype's noise passes too: --dtype float32 tells more")
    return DistanceAgreement(
        dump=manifest.dump,
        sequences=len(ordinals),
        verdict=verdict,
        reasons=tuple(reasons),
        notes=tuple(notes),
        kind=kind,
        limits=limits,
        distances=tuple(distances.values()),
        sequences_off=len(found),
    )


def _distance(
    kind: str,
    store: KnowledgeStore,
    manifest: Manifest,
    source: TokenSource,
    ordinal: int,
    teacher: Teacher,
    config: CheckConfig,
) -> tuple[int, float]:
    """A sequence's id, and how far it is off; asked by itself, so that what a batch did shows.

    Raises:
        DamageError: what was kept cannot be read, or is no knowledge of the kind.
    """
    declared = KINDS[kind]
    kept, stated = store.stored(ordinal, kind, manifest.dump)
    number = kept["sequence_id"][0].as_py()
    tokens = kept if (manifest.dump, kind) == source[:2] else source.rows(store, number)
    with _damage_in(number):
        sequence = _sequence(number, tokens["token_id"].to_numpy(), tokens["is_target"].to_numpy(), stated, manifest)
        arrays = declared.decode(kept, manifest)
    parameters: dict[str, Parameters] = {kind: declared.parameters.from_record(manifest.kinds[kind])}
    prediction = predict_batch(config, teacher, [sequence], parameters)
    [extracted] = extract_batch(config, parameters, prediction, [sequence])[kind]
    keys = kept.select([field.name for field in KEYS[declared.per]])
    asked = declared.unpack(declared.pack(keys, extracted, manifest), manifest)
    with _damage_in(number):
        return number, DISTANCES[kind].between(arrays, declared.decode(asked, manifest))


@contextmanager
def _damage_in(number: int) -> Iterator[None]:
    """Run the body on what was kept of a sequence; DamageError where it says by a ValueError that this is none."""
    try:
        yield
    except ValueError as error:
        raise DamageError(f"sequence {number}: {error}") from None


def _sequence(number: int, token_ids: np.ndarray, is_target: np.ndarray, stated: int, manifest: Manifest) -> TokenSequence:
    """A sequence to ask about. ValueError: its tokens are not those that were dumped."""
    longest = manifest.plan["max_length"]
    if len(token_ids) > longest:
        raise ValueError(f"it has {len(token_ids):,} tokens, and the dump's longest have {longest:,}")
    if token_hash(token_ids) != stated or (token_ids >= manifest.vocabulary_size).any():
        raise ValueError("its token ids do not match the hash that was kept of them, or are beyond the vocabulary")
    if is_target[0]:
        raise ValueError("its first token is a target, which nothing stands before")
    document, window = split_sequence_id(number)  # by which positions may be chosen
    return TokenSequence(Document(document, 0, 1, 0, 0), window, token_ids.astype(np.int64), is_target)
