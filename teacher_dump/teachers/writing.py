"""Texts that a teacher on this machine writes, by transformers' own decoding: each with draws of its own.

A token is drawn as the largest of logits / temperature plus a Gumbel variable for each token of the vocabulary, which is a draw
from the softmax. The variables are a function of the request's key, the step and the token, so that a text does not depend on
the batch it was written in; where logits move by rounding, a draw moves only where the two largest sums are as near as that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from knowledge_store.errors import InputError
from teacher_dump.teachers.prediction import with_finite_padding
from teacher_dump.teachers.protocol import Likeliest, TextRequest, Writing, WrittenText

if TYPE_CHECKING:
    from teacher_dump.teachers.local import LocalTeacher

# SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014): its n-th number is a mix of
# key + n · GAMMA, so that any of them can be had without those before it. As signed numbers, which wrap around.
GAMMA, FIRST, SECOND = (number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
PROBE_LENGTHS = (5, 11)  # tokens
TOLERANCE, SHORT_TOLERANCE = 1e-4, 0.05  # nats that padding may move a log-probability, in float32 and in 16 bits
STEP = 2**24  # numbers of a step, more than any vocabulary has tokens


def random_numbers(keys: torch.Tensor, step: int, count: int) -> torch.Tensor:
    """Uniform draws in (0, 1), float32 (B, count): the same on every device, and with full precision near 0.

    Args:
        keys: int64 (B,).
        step: counted from 0. count: at most STEP.
    """
    counters = torch.arange(step * STEP + 1, step * STEP + 1 + count, device=keys.device)
    mixed = keys[:, None] + counters * GAMMA
    for shift, factor in ((30, FIRST), (27, SECOND)):
        mixed = (mixed ^ _shifted(mixed, shift)) * factor
    bits = _shifted(mixed ^ _shifted(mixed, 31), 11)  # the upper 53
    return (bits.float() + 0.5) * 2.0**-53


def _shifted(values: torch.Tensor, by: int) -> torch.Tensor:
    """Shifted to the right as numbers without a sign are."""
    return (values >> by) & (2 ** (64 - by) - 1)


class _Drawing(LogitsProcessor):
    """Draws the tokens of B texts, and keeps what each step says of those that it drew."""

    def __init__(self, keys: torch.Tensor, writing: Writing, teacher: LocalTeacher):
        self._keys, self._writing, self._impossible = keys, writing, teacher.impossible_tokens
        self._nameless = torch.from_numpy(teacher.nameless_tokens).to(keys.device)
        self.drawn: list[torch.Tensor] = []  # int64 (B,) a step
        self.logprobs: list[torch.Tensor] = []  # float32 (B,) a step
        # A step: logprobs float32 (B, k), their ids int64 (B, k), and the log-probability of the others, float32 (B,).
        self.likeliest: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits = with_finite_padding(scores.float(), self._impossible)
        logprobs = logits.log_softmax(dim=-1)
        logits[:, self._nameless] = -torch.inf  # there is no text for them
        if self._writing.temperature:
            uniform = random_numbers(self._keys, len(self.drawn), logits.shape[1])
            # −log E, with E = −log(1 − u), is a Gumbel variable.
            logits = logits / self._writing.temperature - torch.log(-torch.log1p(-uniform))
        chosen = logits.argmax(dim=-1)
        self.drawn.append(chosen)
        self.logprobs.append(logprobs.gather(1, chosen[:, None])[:, 0])
        if self._writing.likeliest:
            values, ids = logprobs.topk(self._writing.likeliest, dim=-1)
            self.likeliest.append((values, ids, logprobs.scatter(1, ids, -torch.inf).logsumexp(dim=-1)))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def write_texts(teacher: LocalTeacher, requests: Sequence[TextRequest], writing: Writing) -> list[WrittenText]:
    """Write some texts as one batch (see `protocol.Teacher.write`).

    Raises:
        InputError: log-probabilities are not finite.
    """
    longest = max(len(request.prompt) for request in requests)
    padded = np.zeros((len(requests), longest), np.int64)
    mask = np.zeros((len(requests), longest), np.int64)
    for row, request in enumerate(requests):
        padded[row, longest - len(request.prompt) :] = request.prompt
        mask[row, longest - len(request.prompt) :] = 1
    keys = torch.from_numpy(np.array([request.key for request in requests], np.uint64).view(np.int64)).to(teacher.device)
    drawing = _Drawing(keys, writing, teacher)
    given = teacher.model.generation_config
    # What a model says of how it likes to be sampled, such as a penalty for repetitions, would be taken beside that.
    teacher.model.generation_config = GenerationConfig()
    try:
        with torch.inference_mode():
            teacher.model.generate(
                input_ids=torch.from_numpy(padded).to(teacher.device),
                attention_mask=torch.from_numpy(mask).to(teacher.device),
                generation_config=GenerationConfig(
                    max_new_tokens=writing.max_new_tokens,
                    do_sample=False,
                    eos_token_id=list(writing.stop_tokens) or None,
                    pad_token_id=writing.stop_tokens[0] if writing.stop_tokens else 0,
                ),
                logits_processor=LogitsProcessorList([drawing]),
            )
    finally:
        teacher.model.generation_config = given
    token_ids = torch.stack(drawing.drawn, dim=1).cpu().numpy()
    logprobs = torch.stack(drawing.logprobs, dim=1).double().cpu().numpy()
    ends = np.isin(token_ids, writing.stop_tokens)
    stopped = np.asarray(ends.any(axis=1))
    lengths: np.ndarray = np.where(stopped, ends.argmax(axis=1) + 1, token_ids.shape[1])
    texts = []
    for row, length in enumerate(lengths):
        if not np.isfinite(logprobs[row, :length]).all():
            raise InputError(
                f"{teacher.description['name']} gives log-probabilities that are not finite: its weights are damaged, or too"
                " large for --dtype"
            )
        texts.append(WrittenText(token_ids[row, :length], bool(stopped[row]), logprobs[row, :length]))
    return texts if not writing.likeliest else [_with_likeliest(text, row, drawing) for row, text in enumerate(texts)]


def writes_padded(teacher: LocalTeacher) -> bool:
    """Whether a text is the same where its prompt is padded on the left: some models without attention know no padding.

    Raises:
        InputError: it cannot write at all.
    """
    count = min(teacher.vocabulary_size, 2**15)
    probes = [TextRequest(np.arange(length) * 7919 % count, 0) for length in PROBE_LENGTHS]
    writing = Writing(0.0, 2, ())
    try:
        together = write_texts(teacher, probes, writing)
        alone = [write_texts(teacher, [probe], writing)[0] for probe in probes]
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{teacher.description['name']} cannot write texts by transformers' generate: {lines[0]}") from None
    tolerance = TOLERANCE if teacher.description["dtype"] == "float32" else SHORT_TOLERANCE
    pairs = zip(together, alone, strict=True)
    return all(np.abs(one.logprobs - other.logprobs).max() <= tolerance for one, other in pairs)


def _with_likeliest(text: WrittenText, row: int, drawing: _Drawing) -> WrittenText:
    steps = drawing.likeliest[: len(text.token_ids)]
    logprobs, ids, tails = (torch.stack([step[part][row] for step in steps]).cpu().numpy() for part in range(3))
    likeliest = Likeliest(ids, logprobs.astype(np.float64), text.token_ids, text.logprobs)
    return WrittenText(text.token_ids, text.stopped, text.logprobs, likeliest, tails.astype(np.float64))
