"""A sample of what is imported, asked of the teacher again: whether the file says what the teacher does, of the same tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from knowledge_store.errors import InputError
from knowledge_store.reporter import Reporter
from teacher_dump.dumping.batches import batch_arrays, enough_memory
from teacher_dump.importers.configuration import ImportConfig
from teacher_dump.importers.knowledge import Candidates
from teacher_dump.teachers.protocol import Ability, Prediction, Teacher

SEQUENCES = 16
LENGTH = 512  # tokens of each: what stands behind changes nothing
LIKELIEST = 5  # candidates at a position that are compared where the teacher gives no more than its likeliest tokens
MOST_COUNTED = 20.0  # nats of one candidate
MOST_OFF = 0.25  # nats a candidate, weighted by its probability: what 16-bit numbers and another engine can do, and more


@dataclass
class Sample:
    """Sequences drawn at random from all that there are, each with the same chance.

    Attributes:
        sequences: token ids and predictions, with the file's name.
    """

    sequences: list[tuple[str, np.ndarray, Candidates]] = field(default_factory=list)
    _seen: int = 0
    _chance: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def add(self, file: str, token_ids: np.ndarray, candidates: Candidates) -> None:
        """Maybe take in a sequence."""
        self._seen += 1
        if len(self.sequences) < SEQUENCES:
            self.sequences.append((file, token_ids, candidates))
        elif (place := int(self._chance.integers(self._seen))) < SEQUENCES:
            self.sequences[place] = (file, token_ids, candidates)


def ask_again(config: ImportConfig, teacher: Teacher, sample: Sample, reporter: Reporter) -> None:
    """Make sure that a teacher says what the files do.

    Raises:
        InputError: it says something else, or says it of the neighbouring tokens.
    """
    with reporter.progress("asking the teacher again", max(len(sample.sequences), 1), "sequences") as advance:
        parts = []
        for _, token_ids, candidates in sample.sequences:
            with enough_memory(config, [token_ids[:LENGTH]]):
                parts.append(_distances(teacher, token_ids[:LENGTH], candidates))
            advance(1)
    joined = np.concatenate([np.zeros((0, 3)), *parts])
    if not len(joined):
        raise InputError(
            "no position of the files can be asked again: no sequence has three tokens with a prediction between two"
        )
    off = joined.mean(axis=0)
    if off[1] <= MOST_OFF and off[1] < off[[0, 2]].min() / 2:
        reporter.note(f"{len(joined):,} positions asked again: candidates are {off[1]:.3g} nats from the teacher's on average.")
        return
    best = int(np.argmin(off))
    if best != 1 and off[best] <= MOST_OFF:
        raise InputError(
            f"the predictions are off by one: the teacher says of the token {('before', '', 'behind')[best]} what they say"
            f" ({off[best]:.3g} nats a candidate, {off[1]:.3g} as they are): give --row-predicts, or make the files anew"
        )
    raise InputError(
        f"the teacher {config.teacher} says something else than the files: candidates are {off[1]:.3g} nats from its own on"
        f" average over {len(joined):,} positions, and {MOST_OFF} is what noise can do; give the teacher that made them, and"
        " make sure that they are of temperature 1"
    )


def _distances(teacher: Teacher, token_ids: np.ndarray, candidates: Candidates) -> np.ndarray:
    """Of N positions, how far candidates are from what the teacher says of the token before, the token itself, and the one
    behind it, (N, 3): nats, weighted by the candidates' probabilities."""
    places = candidates.places
    inner = (places > 1) & (places < len(token_ids) - 1)
    if not inner.any():
        return np.zeros((0, 3))
    whole = Ability.DISTRIBUTIONS in teacher.abilities
    width = candidates.ids.shape[1] if whole else min(candidates.ids.shape[1], LIKELIEST)
    places, ids, logprobs = places[inner], candidates.ids[inner, :width], candidates.logprobs[inner, :width]
    weights = np.exp(logprobs)
    prediction = teacher.predict(*batch_arrays([token_ids]), likeliest=0 if whole else width)
    found = np.zeros((len(places), 3))
    for column, shift in enumerate((-1, 0, 1)):
        said = (_whole if whole else _likeliest)(teacher, prediction, places + shift - 1, ids)
        apart = np.where(weights > 0, np.abs(np.where(weights > 0, logprobs, 0) - said), 0)
        found[:, column] = (weights * np.minimum(apart, MOST_COUNTED)).sum(axis=1) / weights.sum(axis=1)
    return found


def _whole(teacher: Teacher, prediction: Prediction, before: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """What is said of some tokens (N, K) behind some positions (N,), by whole distributions."""
    rows, needed = (torch.from_numpy(array).to(teacher.device) for array in (before, np.maximum(ids, 0)))
    said = np.zeros(ids.shape)
    for part, logits in prediction.logit_slices(torch.zeros_like(rows), rows):
        said[part] = torch.log_softmax(logits.double(), dim=1).gather(1, needed[part]).cpu().numpy()
    return said


def _likeliest(teacher: Teacher, prediction: Prediction, before: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The same of a teacher that gives its likeliest tokens: any other is counted as likely as the last of these."""
    answers = prediction.likeliest(np.zeros_like(before), before)
    said = np.repeat(answers.logprobs[:, -1:], ids.shape[1], axis=1)
    for rank in range(answers.ids.shape[1]):
        said = np.where(ids == answers.ids[:, rank, None], answers.logprobs[:, rank, None], said)
    return said
