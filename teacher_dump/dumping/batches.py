"""Batches of sequences, padded on the right, as a teacher is asked for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from knowledge_store.errors import InputError
from knowledge_store.kinds import Arrays
from knowledge_store.kinds.kind import Parameters
from knowledge_store.reporter import SILENT, Reporter
from teacher_dump.configuration import TeacherOptions
from teacher_dump.corpus.tokenisation import TokenSequence
from teacher_dump.extraction import EXTRACTORS, ExtractionBatch, layers_needed, likeliest_needed, need_gradients
from teacher_dump.teachers.protocol import Batching, Prediction, Teacher

ANY = Batching()


def length_batches(lengths: list[int], room: int, batching: Batching = ANY) -> list[np.ndarray]:
    """Batches of sequences of like length, longest first: each has at most `room` positions, padding included, and holds
    sequences that may share a batch.

    A longest-first order meets the largest batch at once, so that a device too small for it fails at the start.
    """
    batches: list[np.ndarray] = []
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        full = (len(batch) + 1) * lengths[batch[0]] > room if batch else False
        if full or (batch and not batching.together(lengths[batch[0]], lengths[index])):
            batches.append(np.array(batch))
            batch = []
        batch.append(index)
    return [*batches, np.array(batch)] if batch else batches


def find_batching(options: TeacherOptions, teacher: Teacher, longest: int, reporter: Reporter = SILENT) -> Batching:
    """Which sequences of at most `longest` tokens a teacher may be asked about in one batch.

    Args:
        reporter: hears of a teacher that cannot be asked about any of them together.

    Raises:
        InputError: its answers depend on more than the sequence, however it is asked, or there is too little memory.
    """
    with enough_memory(options, [np.zeros(longest)]):
        batching = teacher.batching(longest, options.batch_size * longest)
    name = teacher.description["name"]
    if batching.rule == "sides":
        reporter.note(
            f"{name} answers otherwise beside a text of more than {batching.border} tokens: sequences of up to that length and"
            " longer ones are not put into one batch"
        )
    elif batching.rule == "alone":
        reporter.note(f"{name} answers otherwise beside longer texts, so each sequence is asked by itself, which is slower")
    return batching


def batch_room(options: TeacherOptions, teacher: Teacher, longest: int, kinds: Iterable[str]) -> int:
    """How many positions a batch may have, padding included: those of `--batch-size` sequences of `longest` tokens; with
    gradients no more than there is room for, but always one sequence."""
    room = options.batch_size * longest
    if need_gradients(kinds):
        with enough_memory(options, [np.zeros(longest)]):
            room = min(room, max(longest, teacher.gradient_room(longest)))
    return room


def batch_arrays(sequences: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int64 (B, T), padded on the right, and which of them are tokens, bool (B, T), from the B sequences' own."""
    lengths = np.array([len(token_ids) for token_ids in sequences])
    padded = np.zeros((len(sequences), lengths.max(initial=0)), np.int64)
    for row, token_ids in enumerate(sequences):
        padded[row, : len(token_ids)] = token_ids
    return padded, np.arange(padded.shape[1]) < lengths[:, None]


def predict_batch(
    options: TeacherOptions,
    teacher: Teacher,
    sequences: list[TokenSequence],
    parameters: Mapping[str, Parameters] | None = None,
) -> Prediction:
    """Run the teacher on some sequences as one batch, so that some kinds of knowledge can be taken from its prediction.

    Args:
        options: for the sentence that is said where there is too little memory.
        teacher: that is asked.
        sequences: the batch.
        parameters: of each kind that is to be taken.

    Raises:
        InputError: a token is not in the model's vocabulary, the model never gives one that is a target, or there is too
            little memory.
    """
    for sequence in sequences:
        if sequence.token_ids.max() >= teacher.vocabulary_size:
            raise InputError(
                f"the teacher's tokenizer gives token {sequence.token_ids.max()} (row {sequence.document.row} of corpus file"
                f" {sequence.document.file + 1}), and its model knows {teacher.vocabulary_size}: they do not belong together"
            )
        targets = sequence.token_ids[sequence.is_target]
        if len(teacher.impossible_tokens) and (never := np.isin(targets, teacher.impossible_tokens)).any():
            raise InputError(
                f"token {targets[never][0]} (row {sequence.document.row} of corpus file {sequence.document.file + 1}) is one"
                " that the teacher never gives: its logit is −inf. Leave the row out, or choose another teacher"
            )
    token_ids = [sequence.token_ids for sequence in sequences]
    with enough_memory(options, token_ids):
        wanted = parameters or {}
        return teacher.predict(
            *batch_arrays(token_ids),
            gradients=need_gradients(wanted),
            layers=layers_needed(wanted),
            likeliest=min(likeliest_needed(wanted), teacher.vocabulary_size),
        )


def extract_batch(
    options: TeacherOptions, parameters: dict[str, Parameters], prediction: Prediction, sequences: list[TokenSequence]
) -> dict[str, list[Arrays]]:
    """Take each kind of knowledge from the teacher's prediction for a batch.

    Args:
        options: for the sentence that is said where there is too little memory.
        parameters: of each kind to take.
        prediction: of the batch.
        sequences: the batch.

    Returns:
        for each kind, the arrays of each sequence.

    Raises:
        InputError: there is too little memory.
    """
    with enough_memory(options, [sequence.token_ids for sequence in sequences]):
        return {
            kind: EXTRACTORS[kind].function(ExtractionBatch(sequences, prediction, kept, tuple(parameters)))
            for kind, kept in parameters.items()
        }


@contextmanager
def enough_memory(options: TeacherOptions, sequences: Sequence[np.ndarray]) -> Iterator[None]:
    """Run the body on some sequences' token ids; InputError where there is too little memory for it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # Of a CPU's memory, torch has no class for it.
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
            raise
        longest = max(len(token_ids) for token_ids in sequences)
        raise InputError(
            f"the teacher ran out of memory on {len(sequences)} sequences of up to {longest} tokens:"
            f" give a smaller --batch-size (now {options.batch_size}); what is committed stays, and the same command resumes"
        ) from None
