"""How hidden states that were kept, pooled or not, are held against those of the teacher now.

What is asked now is packed and unpacked as what was kept. Of each sequence one number says how far they are apart: the mean of
‖kept − asked‖ / ‖asked‖ over its states (a pooled vector is one).

    numeric noise    batching, device, dtype: little in every sequence; rounding to 8 bits is in it
    damage           some sequences are farther off, or hold what no states can be
    another teacher  the median sequence is
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from knowledge_store import KINDS, KnowledgeStore, Manifest
from knowledge_store.errors import DamageError
from knowledge_store.format.sequences import split_sequence_id, token_hash
from knowledge_store.kinds import Arrays
from knowledge_store.kinds.field import KEYS
from knowledge_store.kinds.kind import Parameters
from knowledge_store.reporter import Reporter
from teacher_dump.checking.agreement import AGREES, DAMAGE, OTHER_TEACHER, OTHER_TOKENIZER, Agreement
from teacher_dump.checking.identity import other_model, other_tokenizer, same_weights
from teacher_dump.configuration import CheckConfig
from teacher_dump.corpus.documents import Document
from teacher_dump.corpus.tokenisation import TokenSequence
from teacher_dump.dumping.batches import extract_batch, predict_batch
from teacher_dump.extraction import check_needs
from teacher_dump.teachers.local import LocalTeacher

SHOWN = 5
QUANTILES = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "most": 1.0}


@dataclass(frozen=True)
class Limits:
    """What numeric noise can do to hidden states: how far it moves them, as a share of their norm.

    Attributes:
        typical: in the median sequence. single: in any one.
    """

    typical: float
    single: float


FLOAT32 = Limits(0.01, 0.03)
SHORT = Limits(0.25, 0.6)


@dataclass(frozen=True, kw_only=True)
class StatesAgreement(Agreement):
    """How far a teacher agrees with the hidden states that a dump keeps.

    Attributes:
        kind: of knowledge.
        limits: what counts as numeric noise here.
        apart: of each sequence that was compared, how far its states are from those of now, as a share of their norm.
        sequences_off: how many are farther than `limits.single`, or cannot be read.
    """

    kind: str
    limits: Limits
    apart: tuple[float, ...] = ()
    sequences_off: int = 0

    @property
    def lines(self) -> list[str]:
        """How far the states are apart, and the verdict with what it rests on."""
        lines = [f"{self.dump}: the {self.kind} of {self.sequences} sequences asked again"]
        if self.apart:
            quantiles = np.quantile(self.apart, list(QUANTILES.values()), method="higher")
            shares = ", ".join(f"{name} {value:.2%}" for name, value in zip(QUANTILES, quantiles, strict=True))
            lines.append(f"how far a sequence's states are off, as a share of their norm: {shares}")
        dtype = "float32" if self.limits is FLOAT32 else "a dtype of 16 bits"
        lines.append(
            f"Noise ({dtype}): up to {self.limits.typical:.0%} in the median sequence, and {self.limits.single:.0%} in any one."
            " Damage: some sequences beyond that. Another teacher: the median one (damage if its weights are the dump's own)."
        )
        return [*lines, f"Verdict: {self.verdict}", *(f"  {reason}" for reason in self.reasons)]


def check_states(
    kind: str,
    store: KnowledgeStore,
    manifest: Manifest,
    ordinals: np.ndarray,
    teacher: LocalTeacher,
    config: CheckConfig,
    reporter: Reporter,
) -> StatesAgreement:
    """How far a teacher agrees with what was kept of the hidden states of some sequences (with a kind, a `run.Checker`). The
    dump holds `positions`, which have the tokens.

    Raises:
        InputError: the teacher cannot give hidden states, or there is too little memory.
    """
    dtypes = {manifest.teacher.get("dtype", "float32"), teacher.description["dtype"]}
    limits = FLOAT32 if dtypes <= {"float32", "float64"} else SHORT
    weights_are_same, notes = same_weights(manifest, teacher)
    tokenizer = other_tokenizer(store, manifest, teacher, notes)
    refusal = other_model(manifest, teacher) or _other_states(manifest, teacher)
    if refusal:
        verdict, reasons = OTHER_TOKENIZER if tokenizer else OTHER_TEACHER, (*tokenizer, refusal)
        return StatesAgreement(
            dump=manifest.dump, sequences=0, verdict=verdict, reasons=reasons, notes=tuple(notes), kind=kind, limits=limits
        )
    check_needs((kind,), teacher)
    apart: dict[int, float] = {}
    unreadable: list[str] = []
    with reporter.progress("asking the teacher for hidden states", len(ordinals), "sequences") as advance:
        for ordinal in ordinals.tolist():
            try:
                number, sequence = _sequence(store, manifest, ordinal)
                table, _ = store.stored(ordinal, kind, manifest.dump)
                apart[number] = _apart(kind, manifest, teacher, config, sequence, table)
            except (DamageError, ValueError) as error:
                unreadable.append(str(error))
            advance(1)
    off = sorted((number for number, share in apart.items() if share > limits.single), key=lambda number: -apart[number])
    typical = float(np.median(list(apart.values()))) if apart else 0.0
    typically = f"in the median sequence the states are {typical:.2%} off (noise: up to {limits.typical:.0%})"
    found = [*unreadable, *(f"sequence {number}: its states are {apart[number]:.1%} off" for number in off)]
    listed = [*found[:SHOWN], *([f"and {len(found) - SHOWN} more sequences"] if len(found) > SHOWN else [])]
    if tokenizer:
        verdict, listed = OTHER_TOKENIZER, tokenizer
    elif typical > limits.typical:
        verdict, listed = DAMAGE if weights_are_same else OTHER_TEACHER, [typically, *listed]
    elif found:
        verdict = DAMAGE
    else:
        verdict, listed = AGREES, [f"{typically}, and in none more than {limits.single:.0%}"]
    return StatesAgreement(
        dump=manifest.dump,
        sequences=len(ordinals),
        verdict=verdict,
        reasons=tuple(listed),
        notes=tuple(notes),
        kind=kind,
        limits=limits,
        apart=tuple(apart.values()),
        sequences_off=len(found),
    )


def _other_states(manifest: Manifest, teacher: LocalTeacher) -> str | None:
    """Why the teacher's hidden states cannot even be compared."""
    for name, words in (("hidden_size", "hidden states of {:,} values"), ("layers", "{:,} layers")):
        kept, now = manifest.teacher.get(name), teacher.description.get(name)
        if kept != now and kept is not None and now is not None:
            return f"the dump's teacher has {words.format(kept)}, and this one {words.format(now)}"
    return None


def _sequence(store: KnowledgeStore, manifest: Manifest, ordinal: int) -> tuple[int, TokenSequence]:
    """A sequence's id and its tokens. DamageError: they are not those that were hashed."""
    rows, stated = store.stored(ordinal, "positions", manifest.dump)
    number, token_ids = rows["sequence_id"][0].as_py(), rows["token_id"].to_numpy().astype(np.int64)
    if token_hash(token_ids) != stated or (token_ids >= manifest.vocabulary_size).any():
        raise DamageError(
            f"sequence {number}: its token ids do not match the hash that was kept of them, or are beyond the vocabulary"
        )
    document, window = split_sequence_id(number)  # by which positions may be chosen
    return number, TokenSequence(Document(document, 0, 1, 0, 0), window, token_ids, rows["is_target"].to_numpy())


def _apart(
    kind: str, manifest: Manifest, teacher: LocalTeacher, config: CheckConfig, sequence: TokenSequence, kept: pa.Table
) -> float:
    """How far the states that were kept are from those of now; asked by itself, so that what a batch did shows."""
    declared = KINDS[kind]
    parameters: dict[str, Parameters] = {kind: declared.parameters.from_record(manifest.kinds[kind])}
    prediction = predict_batch(config, teacher, [sequence], parameters)
    [arrays] = extract_batch(config, parameters, prediction, [sequence])[kind]
    keys = kept.select([field.name for field in KEYS[declared.per]])
    asked = declared.unpack(declared.pack(keys, arrays, manifest), manifest)
    one, other = (_states(declared.decode(table, manifest)) for table in (kept, asked))
    if one.shape != other.shape:
        raise DamageError(f"sequence {keys['sequence_id'][0].as_py()}: its states are of another shape than the teacher's")
    norms = np.linalg.norm(other, axis=1)
    distances = np.linalg.norm(one - other, axis=1)
    shares = distances[norms > 0] / norms[norms > 0]
    return float(shares.mean()) if len(shares) else float(distances.any())


def _states(arrays: Arrays) -> np.ndarray:
    """The states among a kind's arrays, float64 (N, W): the one that has several values a row."""
    [states] = [array for array in arrays.values() if array.ndim == 2]
    return states.astype(np.float64)
