"""How a model answers multiple-choice questions, and how sure it is; `prompts` has the forward passes.

Three confidences, of the same passes:

    first_token   the full-vocabulary probability of the token that an option begins with: what FIRST evaluates by (Shum et
                  al. 2024, arXiv 2408.12168). The largest is the answer, and it as it stands is the confidence.
    options       the same, made to sum to one over the options
    sequence      softmax over the options of the log-likelihood of the whole option, the sum over its tokens

The first two say nothing of a question whose options share their first token; such questions are left out of them. Where
options are one token each, `sequence` and `options` are the same numbers.

A post-hoc temperature T (Guo et al. 2017) divides what is compared: the logits z of the first token, over the vocabulary or
over the options, or the options' log-likelihoods. It changes how sure the model is and no answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from knowledge_store.calibration.temperature import FittedTemperature, fit_temperature
from knowledge_store.reporter import SILENT, Reporter
from student_train.evaluation.metrics import (
    brier,
    brier_from_sums,
    check_finite,
    describe_answers,
    negative_log_likelihood,
    rounded,
    softmax,
)
from student_train.evaluation.prompts import readings
from student_train.evaluation.questions import TokenisedQuestion

CONFIDENCES = ("first_token", "options", "sequence")
# Questions that a temperature is fitted on at most: their logits over the whole vocabulary are held.
FIT_QUESTIONS = 2000
# Of these, read at a time.
FIT_SLICE = 64

_EMPTY = float("-inf")


@dataclass(frozen=True)
class Scores:
    """What a model makes of N questions of at most C options; −inf where a question has fewer.

    Attributes:
        answers: (N,) int64, the right option.
        first_tokens_differ: (N,) bool, whether the first token tells the options apart.
        first: (N, C) float64, logits of the options' first tokens.
        totals: for each temperature T asked for, (N,) float64: log Σ exp(z / T) over the vocabulary at that position.
        sequence: (N, C) float64, log-likelihoods of the options in nats.
        logits: (N, V) float32, all logits at the first token, when asked for.
    """

    answers: np.ndarray
    first_tokens_differ: np.ndarray
    first: np.ndarray
    totals: dict[float, np.ndarray]
    sequence: np.ndarray
    logits: Tensor | None = None


def score(
    model: PreTrainedModel,
    questions: Sequence[TokenisedQuestion],
    *,
    batch_size: int = 8,
    temperatures: Sequence[float] = (1.0,),
    keep_logits: bool = False,
    title: str = "evaluating",
    reporter: Reporter = SILENT,
) -> Scores:
    """Ask a model, which stays on its device and is put in evaluation mode.

    Args:
        model: a causal language model.
        questions: at least one.
        batch_size: options in a forward pass, as in `readings`.
        temperatures: at which log-sum-exps over the vocabulary are taken.
        keep_logits: whether to keep all logits at the first token.
        title: of the progress that the reporter hears of.
        reporter: hears of progress.

    Raises:
        InputError: the model gives numbers that are not finite.
    """
    widest = max(len(question.completions) for question in questions)
    first, sequence = (np.full((len(questions), widest), _EMPTY) for _ in range(2))
    totals = {temperature: np.zeros(len(questions)) for temperature in temperatures}
    kept: Tensor | None = None
    model.eval()
    with torch.inference_mode(), reporter.progress(title, len(questions), "questions") as advance:
        for reading in readings(model, questions, batch_size, reporter):
            logits = reading.logits
            check_finite(reading.totals.cpu().numpy())
            for question, row in reading.firsts.items():
                chosen = logits[row, list(questions[question].first_tokens)]
                first[question, : len(chosen)] = chosen.cpu().double().numpy()
                for temperature in temperatures:
                    totals[temperature][question] = torch.logsumexp(logits[row] / temperature, dim=-1).item()
                if keep_logits:
                    if kept is None:
                        kept = logits.new_empty(len(questions), logits.shape[-1])
                    kept[question] = logits[row]
            for (question, option), likelihood in reading.likelihoods(questions).items():
                sequence[question, option] = likelihood
            advance(len(reading.firsts))
    return Scores(
        answers=np.array([question.answer for question in questions]),
        first_tokens_differ=np.array([question.first_tokens_differ for question in questions]),
        first=first,
        totals=totals,
        sequence=sequence,
        logits=kept,
    )


def fit_temperatures(scores: Scores) -> dict[str, FittedTemperature]:
    """For each confidence the temperature of the lowest negative log-likelihood.

    Args:
        scores: with logits.

    Returns:
        By the names of `CONFIDENCES`; without the first two when no question's options differ in their first token.
    """
    fitted = {}
    apart = np.flatnonzero(scores.first_tokens_differ)
    if len(apart):
        assert scores.logits is not None
        label = scores.first[apart, scores.answers[apart]].mean()
        parts = scores.logits[torch.from_numpy(apart).to(scores.logits.device)].split(FIT_SLICE)

        def over_vocabulary(temperature: float) -> float:
            total = sum(float(torch.logsumexp(part / temperature, dim=-1).cpu().double().sum()) for part in parts)
            return total / len(apart) - label / temperature

        fitted["first_token"] = fit_temperature(over_vocabulary)
        fitted["options"] = fit_temperature(_over_options(scores.first[apart], scores.answers[apart]))
    fitted["sequence"] = fit_temperature(_over_options(scores.sequence, scores.answers))
    return fitted


def _over_options(values: np.ndarray, answers: np.ndarray) -> Callable[[float], float]:
    return lambda temperature: float(negative_log_likelihood(values, answers, temperature).mean())


def figures(scores: Scores, temperatures: dict[str, float] | None = None) -> dict[str, dict[str, Any]]:
    """What the scores amount to, for each confidence, at its temperature (1 unless given).

    Returns:
        By the names of `CONFIDENCES`, those that any question serves: `questions` (how many do), what `describe_answers`
        gives, and `answers`: confidence, correct, nll and brier of each of these questions, in their order.
    """
    temperatures = temperatures or {}
    by_confidence = {}
    for name in CONFIDENCES:
        temperature = temperatures.get(name, 1.0)
        served = np.flatnonzero(scores.first_tokens_differ | (name == "sequence"))
        if not len(served):
            continue
        values = (scores.sequence if name == "sequence" else scores.first)[served]
        answers = scores.answers[served]
        row = np.arange(len(served))
        if name == "first_token":
            logprobs = values / temperature - scores.totals[temperature][served][:, None]
            probabilities = np.exp(np.minimum(logprobs, 0.0))  # float32's rounding can end a hair above 0
            nll = -logprobs[row, answers]
            # Everything that is no option is one more class, which is never the answer.
            rest = np.maximum(0.0, 1 - probabilities.sum(axis=1))
            squares = (probabilities**2).sum(axis=1) + rest**2
            score = brier_from_sums(squares, probabilities[row, answers])
        else:
            probabilities = softmax(values, temperature)
            nll = negative_log_likelihood(values, answers, temperature)
            score = brier(probabilities, answers)
        choice = values.argmax(axis=1)
        confidence, correct = probabilities[row, choice], choice == answers
        by_confidence[name] = {
            "questions": len(served),
            **describe_answers(confidence, correct, {"nll": nll, "brier": score}),
            "answers": {
                "confidence": rounded(confidence),
                "correct": correct.astype(int).tolist(),
                "nll": rounded(nll),
                "brier": rounded(score),
            },
        }
    return by_confidence


def measure_questions(
    model: PreTrainedModel,
    questions: Sequence[TokenisedQuestion],
    *,
    batch_size: int = 8,
    fit_on: Sequence[TokenisedQuestion] | None = None,
    temperature: float | None = None,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """All figures of a model in memory on questions, and again with a post-hoc temperature.

    Args:
        model: stays on its device and is put in evaluation mode.
        questions: to measure on, at least one.
        batch_size: as in `score`.
        fit_on: other questions, to fit a temperature for each confidence on; the first `FIT_QUESTIONS` of them are used.
        temperature: one for all confidences, used as it stands.
        reporter: hears of progress.

    Returns:
        The confidences as `figures` gives them, and `post_hoc` when asked for: `questions` (how many were fitted on) and
        the confidences once more, each with its `temperature`, `at_edge`, and `fitted_nll` before and after.
    """
    fitted: dict[str, FittedTemperature] = {}
    temperatures: dict[str, float] = {}
    if fit_on is not None:
        fit_on = fit_on[:FIT_QUESTIONS]
        title = "fitting the temperature"
        fitted = fit_temperatures(score(model, fit_on, batch_size=batch_size, keep_logits=True, title=title, reporter=reporter))
        temperatures = {name: fit.temperature for name, fit in fitted.items()}
    elif temperature is not None:
        temperatures = dict.fromkeys(CONFIDENCES, temperature)
    at_temperatures = tuple(dict.fromkeys((1.0, temperatures.get("first_token", 1.0))))
    scores = score(model, questions, batch_size=batch_size, temperatures=at_temperatures, reporter=reporter)
    result: dict[str, Any] = figures(scores)
    if temperatures:
        scaled = {name: answers for name, answers in figures(scores, temperatures).items() if name in temperatures}
        for name, answers in scaled.items():
            answers["temperature"] = temperatures[name]
            if name in fitted:
                answers["at_edge"] = fitted[name].at_edge
                answers["fitted_nll"] = [fitted[name].nll_before, fitted[name].nll]
        result["post_hoc"] = {**({"questions": len(fit_on)} if fit_on is not None else {}), **scaled}
    return result
