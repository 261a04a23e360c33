"""Is a teacher as confident as it is right, and which temperature makes it so? Fitted on text that it was not trained on.

The temperature T minimises the negative log-likelihood of the text's tokens under softmax(z / T), over the whole vocabulary
(Guo et al. 2017, arXiv 1706.04599). That is convex in 1 / T, with the slope E[z] − z(token), so one pass over a grid of
temperatures brackets the optimum and its neighbours' slopes place it; a second pass measures what it changes. Calibration
error is reported and not fitted: it is no proper score.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from knowledge_store.calibration.expected_calibration_error import expected_calibration_error
from knowledge_store.calibration.file import Calibration
from knowledge_store.calibration.temperature import root_of_slopes
from knowledge_store.errors import InputError
from knowledge_store.format.corpus_counts import CorpusCounts, Sentence
from knowledge_store.reporter import SILENT, Advance, Reporter
from teacher_dump.configuration import CalibrateConfig
from teacher_dump.corpus.documents import problem_text, read_documents
from teacher_dump.corpus.rows import BadRow, Start, stops
from teacher_dump.corpus.sources import with_local_corpus
from teacher_dump.corpus.tally import Tally
from teacher_dump.corpus.tokenisation import CorpusTokenizer, TokenSequence, describe_tokenizer
from teacher_dump.dumping.batches import find_batching, length_batches, predict_batch
from teacher_dump.dumping.inspection import corpus_tokenizer, teacher_tokenizer, ways_out
from teacher_dump.dumping.plan import corpus_files
from teacher_dump.teachers.opening import open_teacher
from teacher_dump.teachers.protocol import Teacher

FEW_TARGETS = 200
MIN_GAIN = 1e-3  # of the negative log-likelihood, below which a temperature does not help
GRID = np.geomspace(0.25, 4, 17)  # 1 is one of them
NORMAL_95 = 1.96


@dataclass(frozen=True)
class TemperatureFit:
    """A calibration, and how far it can be trusted.

    Attributes:
        calibration: of method `temperature`.
        sequences: how many it was fitted on.
        gain: by how much it lowers the negative log-likelihood, nats per target.
        gain_error: the standard error of that, over sequences; None for a single one.
        at_edge: whether the grid ends at the optimum, which may then lie beyond.
        counts: what became of the rows that were tokenised. all_rows: whether those are all that the corpus has.
        max_length: of a sequence.
    """

    calibration: Calibration
    sequences: int
    gain: float
    gain_error: float | None
    at_edge: bool
    counts: CorpusCounts
    all_rows: bool
    max_length: int

    @property
    def sentences(self) -> list[Sentence]:
        """What became of the rows, in words."""
        sentences = self.counts.sentences(self.max_length)
        if self.all_rows:
            return sentences
        return [replace(sentence, text=f"of the rows that were looked at, {sentence.text}") for sentence in sentences]

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the gain; None for a single sequence."""
        if self.gain_error is None:
            return None
        return self.gain - NORMAL_95 * self.gain_error, self.gain + NORMAL_95 * self.gain_error

    @property
    def doubts(self) -> list[str]:
        """What speaks against using it, in words; empty when nothing does."""
        before, after = self.calibration.before, self.calibration.after
        temperature, targets = self.calibration.temperature, self.calibration.targets
        doubts = []
        if self.at_edge:
            doubts.append(
                f"the best temperature is {temperature:g} or beyond, where the search ends: look at teacher and corpus"
            )
        if self.gain < MIN_GAIN * before["nll"]:
            doubts.append(f"a temperature does not help: {temperature:g} lowers the loss by less than {MIN_GAIN:.1%}")
        elif self.interval is None or self.interval[0] <= 0:
            doubts.append("the gain may be chance: its 95% interval holds 0 or cannot be told")
        if after["ece_15"] > before["ece_15"]:
            doubts.append("the calibration error is higher with it than without")
        if targets < FEW_TARGETS:
            doubts.append(f"{targets} targets are few: fit on {FEW_TARGETS} or more")
        return doubts


def calibrate(config: CalibrateConfig, teacher: Teacher | None = None, *, reporter: Reporter = SILENT) -> TemperatureFit:
    """Fit a temperature to a teacher. Nothing is written (see `knowledge_store.write_calibration`).

    Args:
        config: the teacher, and text that it was not trained on.
        teacher: already loaded as `config` says; loaded here when None.
        reporter: hears of progress.

    Raises:
        InputError: something given cannot be used, or the corpus holds no target.
    """
    config = with_local_corpus(config, reporter=reporter)
    if config.teacher_url is not None:
        raise InputError(
            "--teacher-url gives the likeliest tokens alone, and a temperature is fitted on whole distributions: load the"
            " teacher here, or fit a temperature to the dump with `student-train calibrate`"
        )
    tokenizer = corpus_tokenizer(config, teacher_tokenizer(config, teacher, weights=config.teacher_url is None))
    sequences, counts, all_rows = _sample(config, tokenizer, reporter)
    teacher = teacher or open_teacher(config, config.loading, config.max_length, reporter=reporter)
    files = corpus_files(config, config.corpus, teacher, reporter)
    find_batching(config, teacher, config.max_length, reporter)
    targets = sum(int(sequence.is_target.sum()) for sequence in sequences)
    with reporter.progress("asking the teacher", 2 * targets, "targets") as advance:
        temperature, at_edge = _fit(config, teacher, sequences, advance)
        measured = _measure(config, teacher, sequences, temperature, advance)
    gain, error = mean_and_error(measured.nll[0] - measured.nll[1], measured.sequence)
    calibration = Calibration(
        method="temperature",
        value=temperature,
        teacher=teacher.description,
        tokenizer=describe_tokenizer(teacher.tokenizer),
        fitted_on={"corpus": files},
        targets=targets,
        before=measured.figures(0),
        after=measured.figures(1),
    )
    return TemperatureFit(calibration, len(sequences), gain, error, at_edge, counts, all_rows, config.max_length)


def _sample(
    config: CalibrateConfig, tokenizer: CorpusTokenizer, reporter: Reporter
) -> tuple[list[TokenSequence], CorpusCounts, bool]:
    """The sequences of a uniform random sample of documents with about `config.limit` targets; what became of the rows that
    were tokenised, and whether those were all.

    Each document gets a random number, and those with the lowest are kept: the highest makes room while the others are
    enough, so that most documents of a large corpus are read and never tokenised.
    """
    generator = random.Random(0)
    kept: list[tuple[float, int, int, list[TokenSequence]]] = []  # a heap: −random number, document, targets, sequences
    tally = Tally(config.too_long)
    total, all_rows = 0, True
    with reporter.progress("reading the corpus", None) as advance:
        for document in read_documents(config.corpus, Start(0, 0, 1, 0, 0), config.part_characters, config.column_names):
            advance(document.characters)
            key = generator.random()
            if document.problem is None and total >= config.limit and key >= -kept[0][0]:
                all_rows = False
                continue
            try:
                sequences = tokenizer.sequences(document)
            except BadRow as problem:
                if stops(problem, config.too_long, config.skip_bad_rows):
                    place = problem_text(config.corpus, document.file, document.row, str(problem))
                    raise InputError(f"{place}. {ways_out(problem.reason)}") from None
                tally.leave_out(document, problem)
                continue
            tally.use(document, sequences)
            if targets := sum(int(sequence.is_target.sum()) for sequence in sequences):
                heapq.heappush(kept, (-key, document.number, targets, sequences))
                total += targets
            while kept and total - kept[0][2] >= config.limit:
                total -= heapq.heappop(kept)[2]
    if not kept:
        raise InputError("the corpus has no target to fit a temperature on")
    kept.sort(key=lambda entry: entry[1])
    return [sequence for *_, sequences in kept for sequence in sequences], tally.counts, all_rows


def _logits(
    config: CalibrateConfig, teacher: Teacher, sequences: list[TokenSequence], advance: Advance
) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
    """For slices of all targets: each one's sequence (n,), its logits float32 (n, V), and its token (n,)."""
    lengths = [len(sequence.token_ids) for sequence in sequences]
    batching = find_batching(config, teacher, config.max_length)
    for indices in length_batches(lengths, config.batch_size * config.max_length, batching):
        batch = [sequences[index] for index in indices]
        prediction = predict_batch(config, teacher, batch)
        targets_of = [np.flatnonzero(sequence.is_target) for sequence in batch]
        rows = np.repeat(np.arange(len(batch)), [len(places) for places in targets_of])
        positions = np.concatenate(targets_of)
        tokens = np.concatenate([sequence.token_ids[places] for sequence, places in zip(batch, targets_of, strict=True)])
        arrays = (rows, positions - 1, tokens)
        places, before, targets = (torch.from_numpy(array).to(teacher.device) for array in arrays)
        for part, logits in prediction.logit_slices(places, before):
            if not (logits.amin().isfinite() and logits.amax().isfinite()):
                document = batch[rows[part][0]].document
                raise InputError(
                    f"the teacher's logits are NaN or infinite at row {document.row} of corpus file {document.file + 1} or"
                    " soon after it. Check the teacher's weights; if its dtype is a short one, use --dtype float32"
                )
            yield indices[rows[part]], logits, targets[part]
            advance(len(targets[part]))


def _fit(config: CalibrateConfig, teacher: Teacher, sequences: list[TokenSequence], advance: Advance) -> tuple[float, bool]:
    """The temperature with the least negative log-likelihood, and whether it is where the grid ends."""
    slopes = np.zeros(len(GRID))
    for _, logits, tokens in _logits(config, teacher, sequences, advance):
        logits -= logits.amax(dim=1, keepdim=True)
        token_logits = logits.gather(1, tokens[:, None])[:, 0]
        for index, temperature in enumerate(GRID.tolist()):
            weights = torch.exp(logits / temperature)
            expected = torch.linalg.vecdot(weights, logits) / weights.sum(dim=1)
            slopes[index] += (expected - token_logits).sum().item()
    temperature, at_edge = root_of_slopes(GRID, slopes)
    return round(temperature, 4), at_edge


@dataclass(frozen=True)
class _Measured:
    """Of N targets: sequence, int64 (N,); correct, bool (N,); at temperature 1 and at T: nll, confidence, brier, (2, N)."""

    sequence: np.ndarray
    correct: np.ndarray
    nll: np.ndarray
    confidence: np.ndarray
    brier: np.ndarray

    def figures(self, row: int) -> dict[str, float]:
        return {
            "nll": float(self.nll[row].mean()),
            **{f"ece_{bins}": expected_calibration_error(self.confidence[row], self.correct, bins) for bins in (10, 15)},
            "brier": float(self.brier[row].mean()),
        }


def _measure(
    config: CalibrateConfig,
    teacher: Teacher,
    sequences: list[TokenSequence],
    temperature: float,
    advance: Advance,
) -> _Measured:
    """How the teacher does at temperature 1 and at `temperature`, over the whole vocabulary."""
    numbers: list[np.ndarray] = []
    correct: list[np.ndarray] = []
    figures: list[np.ndarray] = []
    for sequence, logits, tokens in _logits(config, teacher, sequences, advance):
        rows = []
        for divisor in (1.0, temperature):
            logprobs = torch.log_softmax(logits / divisor, dim=1)
            token_logprobs = logprobs.gather(1, tokens[:, None])[:, 0]
            confidence = logprobs.amax(dim=1).exp()
            squares = logprobs.mul_(2).exp_().sum(dim=1)
            rows.append(torch.stack([-token_logprobs, confidence, 1 - 2 * token_logprobs.exp() + squares]))
        numbers.append(sequence)
        correct.append((logits.argmax(dim=1) == tokens).cpu().numpy())
        figures.append(torch.stack(rows).cpu().numpy().astype(np.float64))
    nll, confidence, brier = np.concatenate(figures, axis=2).transpose(1, 0, 2)
    return _Measured(np.concatenate(numbers), np.concatenate(correct), nll, confidence, brier)


def mean_and_error(values: np.ndarray, groups: np.ndarray) -> tuple[float, float | None]:
    """The mean of values (N,), and its standard error where those of one group (N,) hang together (linearised ratio of sums
    over groups); None for a single group."""
    mean = float(values.mean())
    _, place = np.unique(groups, return_inverse=True)
    residuals = np.bincount(place, weights=values - mean)
    count = len(residuals)
    if count < 2:
        return mean, None
    return mean, math.sqrt(count / (count - 1) * float((residuals**2).sum())) / len(values)


def describe(fit: TemperatureFit, output: Path) -> list[str]:
    """A fit in words: a small table, the gain with its interval, what speaks against it, and where it was written."""
    calibration = fit.calibration
    before, after = calibration.before, calibration.after
    lines = [f"{'':<28}{'T = 1':>10}{f'T = {calibration.temperature:g}':>13}"]
    for name, label, form in (
        ("nll", "loss, nats per target", ".4f"),
        ("ece_10", "calibration error, 10 bins", ".2%"),
        ("ece_15", "calibration error, 15 bins", ".2%"),
        ("brier", "Brier score", ".4f"),
    ):
        lines.append(f"{label:<28}{before[name]:>10{form}}{after[name]:>13{form}}")
    interval = "" if fit.interval is None else f", 95% interval {fit.interval[0]:.5f} to {fit.interval[1]:.5f}"
    lines.append(f"the loss falls by {fit.gain:.5f} nats{interval}")
    lines.append(f"fitted on {calibration.targets:,} targets of {fit.sequences:,} sequences; written to {output}")
    return lines
