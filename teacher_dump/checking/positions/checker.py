"""How the predictions that were kept are held against those of the teacher now.

What was kept is rounded, what is asked now is not. Held against each other are the values that the format rounds each by itself
(`positions.exact_steps`): how far each candidate is below the first, the tail's log-odds, and the log-probability of a token
that is no candidate; all else follows, as probabilities sum to one. The *difference* of a value is |kept − asked| less half a
quantisation step: what rounding cannot explain, in nats. It is 0 for most values where the teacher is the same, and grows with
whatever makes it answer otherwise. Below a step noise shows all the same: it carries a share of mean |noise| / step of the
values over the edge between two steps, as many up as down. What moves values one way, by however little, is no noise: the mean
of how far they moved shows it, and noise as large cancels out.

    numeric noise    batching, device, dtype: small everywhere, no single value is far off, and means are near zero
    damage           most sequences agree, some have values or means far off, or are no knowledge that a selection keeps
    another teacher  values are off in most sequences, or their mean over the sample is

Candidates are compared by id, so that two that are nearly as likely may change places; the first and the tail are those that
were kept. That these are the likeliest is compared too: by how many nats another token is ahead of the last of them. Draws are
made at points that the sequence alone decides, so each must lie, in the running sum of the tail's probabilities, where its
token lies; how far beside it, as a share of the tail, is its difference. Noise moves draws by little, a few in float32 and in a
dtype of 16 bits many, the more the larger the vocabulary. Draws that are off where values agree are damage.
"""

from __future__ import annotations

import numpy as np

from knowledge_store import KnowledgeStore, Manifest
from knowledge_store.kinds.positions import positions_of
from knowledge_store.reporter import Reporter
from teacher_dump.checking.agreement import OTHER_TEACHER, OTHER_TOKENIZER
from teacher_dump.checking.identity import other_model, other_tokenizer, same_weights
from teacher_dump.checking.positions.comparison import ask, read_sequences
from teacher_dump.checking.positions.limits import SHORT, limits_of
from teacher_dump.checking.positions.steps import SOUND_REMAINDER
from teacher_dump.checking.positions.verdicts import PositionsAgreement, judge
from teacher_dump.configuration import CheckConfig
from teacher_dump.teachers.protocol import Ability, Teacher


def check_positions(
    store: KnowledgeStore,
    manifest: Manifest,
    ordinals: np.ndarray,
    teacher: Teacher,
    config: CheckConfig,
    reporter: Reporter,
) -> PositionsAgreement:
    """How far a teacher agrees with the predictions that were kept of some sequences (a `run.Checker`)."""
    limits = limits_of(manifest, teacher)
    weights_are_same, notes = same_weights(manifest, teacher)
    if limits is SHORT and teacher.has_experts:
        notes.append(
            "a mixture of experts sends some tokens to other experts where rounding differs, which moves values by more than"
            " any limit here: before believing in damage, ask as the dump did"
            f" (--dtype {manifest.teacher.get('dtype')}, a device of the same kind)"
        )
    tokenizer = other_tokenizer(store, manifest, teacher, notes)
    refusal = other_model(manifest, teacher)
    if refusal:
        verdict = OTHER_TOKENIZER if tokenizer else OTHER_TEACHER
        reasons = (*tokenizer, refusal)
        return PositionsAgreement(
            dump=manifest.dump, sequences=0, positions=0, verdict=verdict, reasons=reasons, notes=tuple(notes), limits=limits
        )
    if Ability.DISTRIBUTIONS not in teacher.abilities:
        notes.append("this teacher gives its likeliest tokens alone: draws and the entropy of tails are not compared")
    if Ability.DISTRIBUTIONS not in teacher.abilities or positions_of(manifest).tail == "remainder":
        notes.append(f"a tail is known as what candidates leave of one: below e^{SOUND_REMAINDER:g} it is not compared")
    kept, unreadable = read_sequences(store, manifest, ordinals.tolist())
    compared = ask(manifest, teacher, kept, config, reporter)
    return judge(manifest, kept, compared, unreadable, tokenizer, weights_are_same, notes, limits, len(ordinals))
