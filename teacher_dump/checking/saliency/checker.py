"""How the shares that were kept are held against those of the teacher now.

What is asked now is rounded as what was kept. Of each sequence one number says how far they are apart: the share of its
saliency that stands at other tokens than it did, half the sum of |kept − asked|. It is 0 where the teacher is the same and
answers alike to the last digits.

    numeric noise    batching, device, dtype: little stands elsewhere, in every sequence
    damage           some sequences have more elsewhere, or hold what no saliency can be
    another teacher  the median sequence has
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from knowledge_store import KnowledgeStore, Manifest
from knowledge_store.errors import DamageError
from knowledge_store.format.sequences import token_hash
from knowledge_store.kinds.kind import Parameters
from knowledge_store.kinds.saliency import MAX_EXCESS, has_tokens, in_steps, saliency_of
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
    """What numeric noise can do to shares: how much of a sequence's saliency it moves to other tokens.

    Attributes:
        typical: in the median sequence. single: in any one.
    """

    typical: float
    single: float


# Measured on a trained teacher (4 layers, 260,000 parameters) and three of random weights (2, 8 and 24 layers), both methods,
# of gold and of teacher, 12 texts each. In float32 another batch moves at most 0.01 %. In the median sequence bfloat16 moves
# 1 % (input-x-gradient 3 %) of the trained one's, and 3 to 20 % (7 to 40 %) of the others', the more the deeper; float16 a
# fifth of that; another batch in bfloat16 up to 5 %. Where another token becomes the teacher's likeliest, nearly half may move.
FLOAT32 = Limits(0.002, 0.02)
SHORT = Limits(0.25, 0.6)


@dataclass(frozen=True, kw_only=True)
class SaliencyAgreement(Agreement):
    """How far a teacher agrees with the saliency that a dump keeps.

    Attributes:
        limits: what counts as numeric noise here.
        moved: of each sequence that was compared, the share of its saliency that stands at other tokens now.
        sequences_off: how many have more than `limits.single` there, or cannot be read.
    """

    limits: Limits
    moved: tuple[float, ...] = ()
    sequences_off: int = 0

    @property
    def lines(self) -> list[str]:
        """How much of the saliency stands elsewhere, and the verdict with what it rests on."""
        lines = [f"{self.dump}: the saliency of {self.sequences} sequences asked again"]
        if self.moved:
            quantiles = np.quantile(self.moved, list(QUANTILES.values()), method="higher")
            shares = ", ".join(f"{name} {value:.2%}" for name, value in zip(QUANTILES, quantiles, strict=True))
            lines.append(f"share of a sequence's saliency that stands at other tokens: {shares}")
        dtype = "float32" if self.limits is FLOAT32 else "a dtype of 16 bits"
        lines.append(
            f"Noise ({dtype}): up to {self.limits.typical:.1%} in the median sequence, and {self.limits.single:.0%} in any one."
            " Damage: some sequences beyond that. Another teacher: the median one (damage if its weights are the dump's own)."
        )
        return [*lines, f"Verdict: {self.verdict}", *(f"  {reason}" for reason in self.reasons)]


def check_saliency(
    store: KnowledgeStore,
    manifest: Manifest,
    ordinals: np.ndarray,
    teacher: LocalTeacher,
    config: CheckConfig,
    reporter: Reporter,
) -> SaliencyAgreement:
    """How far a teacher agrees with the saliency that was kept of some sequences (a `run.Checker`).

    Raises:
        InputError: the teacher cannot give gradients, or there is too little memory.
    """
    dtypes = {manifest.teacher.get("dtype", "float32"), teacher.description["dtype"]}
    limits = FLOAT32 if dtypes <= {"float32", "float64"} else SHORT
    weights_are_same, notes = same_weights(manifest, teacher)
    tokenizer = other_tokenizer(store, manifest, teacher, notes)
    refusal = other_model(manifest, teacher)
    if refusal:
        verdict, reasons = OTHER_TOKENIZER if tokenizer else OTHER_TEACHER, (*tokenizer, refusal)
        return SaliencyAgreement(
            dump=manifest.dump, sequences=0, verdict=verdict, reasons=reasons, notes=tuple(notes), limits=limits
        )
    check_needs(("saliency",), teacher)
    moved: dict[int, float] = {}
    unreadable: list[str] = []
    with reporter.progress("asking the teacher for gradients", len(ordinals), "sequences") as advance:
        for ordinal in ordinals.tolist():
            try:
                number, sequence, kept = _kept(store, manifest, ordinal)
            except DamageError as error:
                unreadable.append(str(error))
            else:
                moved[number] = _moved(manifest, teacher, config, sequence, kept)
            advance(1)
    off = sorted((number for number, share in moved.items() if share > limits.single), key=lambda number: -moved[number])
    typical = float(np.median(list(moved.values()))) if moved else 0.0
    typically = (
        f"in the median sequence {typical:.2%} of the saliency stands at other tokens (noise: up to {limits.typical:.1%})"
    )
    found = [*unreadable, *(f"sequence {number}: {moved[number]:.1%} of its saliency stands at other tokens" for number in off)]
    listed = [*found[:SHOWN], *([f"and {len(found) - SHOWN} more sequences"] if len(found) > SHOWN else [])]
    if tokenizer:
        verdict, listed = OTHER_TOKENIZER, tokenizer
    elif typical > limits.typical:
        verdict, listed = DAMAGE if weights_are_same else OTHER_TEACHER, [typically, *listed]
    elif found:
        verdict = DAMAGE
    else:
        verdict, listed = AGREES, [f"{typically}, and in none more than {limits.single:.0%}"]
        if not weights_are_same and limits is SHORT:
            notes.append("a teacher that differs by less than a short dtype's noise passes too: --dtype float32 tells more")
    return SaliencyAgreement(
        dump=manifest.dump,
        sequences=len(ordinals),
        verdict=verdict,
        reasons=tuple(listed),
        notes=tuple(notes),
        limits=limits,
        moved=tuple(moved.values()),
        sequences_off=len(found),
    )


def _kept(store: KnowledgeStore, manifest: Manifest, ordinal: int) -> tuple[int, TokenSequence, np.ndarray]:
    """A sequence's id, its tokens, and the shares that were kept of them, float64 (L,).

    Raises:
        DamageError: they cannot be read, or are none.
    """
    rows, stated = store.stored(ordinal, "saliency", manifest.dump)
    beside = rows if has_tokens(manifest) else store.stored(ordinal, "positions", manifest.dump)[0]
    number, token_ids = rows["sequence_id"][0].as_py(), beside["token_id"].to_numpy().astype(np.int64)
    is_target, shares = beside["is_target"].to_numpy(), rows["share"].fill_null(0).to_numpy().astype(np.float64)
    complaint = None
    if len(token_ids) > manifest.plan["max_length"]:
        complaint = f"it has {len(token_ids):,} tokens, and the dump's longest have {manifest.plan['max_length']:,}"
    elif token_hash(token_ids) != stated or (token_ids >= manifest.vocabulary_size).any():
        complaint = "its token ids do not match the hash that was kept of them, or are beyond the vocabulary"
    elif not np.isfinite(shares).all() or (shares < 0).any() or (shares.any() and abs(shares.sum() - 1) > MAX_EXCESS):
        complaint = "its shares do not sum to one"
    elif is_target[:1].any() or not is_target.any():
        complaint = "it has no target that something stands before"
    if complaint:
        raise DamageError(f"sequence {number}: {complaint}")
    return number, TokenSequence(Document(0, 0, 1, 0, 0), 0, token_ids, is_target), shares


def _moved(manifest: Manifest, teacher: LocalTeacher, config: CheckConfig, sequence: TokenSequence, kept: np.ndarray) -> float:
    """The share of a sequence's saliency that stands at other tokens now; asked by itself, so that what a batch did shows."""
    parameters: dict[str, Parameters] = {"saliency": saliency_of(manifest)}
    prediction = predict_batch(config, teacher, [sequence], parameters)
    [arrays] = extract_batch(config, parameters, prediction, [sequence])["saliency"]
    steps = np.round(in_steps(arrays["share"].filled(0)))
    asked = steps / steps.sum() if steps.any() else steps
    # Where one of them has none, all of the other's stands elsewhere.
    return float(max(np.abs(kept - asked).sum() / 2, abs(kept.sum() - asked.sum())))
